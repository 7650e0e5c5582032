// Blocks whose codes have more than four bits, and K-quants, as a DeviceWeights holds them
// (model/device_weights.h): in no more bits but for 16, and where kernels find each part's at once.
//
// Codes are a unit of 16 bytes for each part of 32 elements, with its low bits as in a block of
// Q4_1. Scales are, in words of 32 bits:
//   1     the block's f16 d and f16 e; e = 0 in kQ6_K; f16 d and f16 m in kQ5_1; in kQ5_0 half a
//         word, f16 d
//   3     kQ4_K, kQ5_K: a byte a part, the low four bits of s and of m, and then four bits a part,
//         the high two of s and of m
//   4     kQ6_K: two bytes a part, s of its first 16 elements and s of the others
//   n     a part, the n high bits of its codes: 1 in kQ5_0, kQ5_1 and kQ5_K, 2 in kQ6_K. Those of
//         elements 4 q to 4 q + 3 are in the four bytes of word n q / 8, from bit n q % 8 on
// The highest bit of kQ6_K is flipped, so that the six are c - 32, with a sign.
#pragma once

#include "model/k_quants.h"

namespace thaw {

// High bits of a code, and bytes of a block's scales before them.
constexpr int n_high_bits(DType type) { return has_five_bits(type) ? 1 : k_high_bits(type); }
constexpr int high_bits_at(DType type) {
  if (type == DType::kQ5_0) return 2;
  return type == DType::kQ5_1 ? 4 : type == DType::kQ6_K ? 20 : 16;
}

// The part's low bits into a unit, and its high bits.
inline void split_k_part(std::byte* unit, std::byte* high_bits, const std::byte* block, DType type,
                         int p) {
  const KPart at = k_part(type, p);
  const auto word = [&](int byte) {
    std::uint32_t bits;
    std::memcpy(&bits, block + byte, sizeof bits);
    return bits;
  };
  for (int i = 0; i < kPartCols / 2; i += 4) {
    const std::uint32_t first = word(at.low_at + i) >> at.low_shift & 0x0f0f0f0f,
                        other = word(at.low_at + 16 + i) >> at.low_shift & 0x0f0f0f0f;
    const std::uint32_t both = first | other << 4;
    std::memcpy(unit + i, &both, sizeof both);
  }
  const int n_bits = k_high_bits(type);
  std::uint32_t high[2] = {};
  for (int q = 0; n_bits > 0 && q < kPartCols / 4; ++q) {
    const std::uint32_t mask = n_bits == 2 ? 0x03030303 : 0x01010101;
    const std::uint32_t bits = word(at.high_at + 4 * q) >> at.high_shift & mask;
    high[n_bits * q / 8] |= (n_bits == 2 ? bits ^ 0x02020202 : bits) << n_bits * q % 8;
  }
  std::memcpy(high_bits, high, static_cast<std::size_t>(4 * n_bits));
}

// A block into kKParts units, and scales, which are zeros before.
inline void split_k_block(std::byte* units, std::byte* scales, const std::byte* block, DType type) {
  std::byte* of_parts = scales + 4;
  if (type == DType::kQ6_K) {
    std::memcpy(scales, block + k_d_at(type), 2);
    std::memcpy(of_parts, block + k_scales_at(type), 2 * kKParts);
  } else {
    std::memcpy(scales, block + k_d_at(type), 4);
    const KScales all = k_scales(block);
    for (int p = 0; p < kKParts; ++p) {
      const int s = all.s[p], m = all.m[p];
      of_parts[p] = static_cast<std::byte>((s & 15) | (m & 15) << 4);
      of_parts[8 + p / 2] |= static_cast<std::byte>((s >> 4 | m >> 4 << 2) << p % 2 * 4);
    }
  }
  const int high_bytes = 4 * k_high_bits(type);  // of a part
  for (int p = 0; p < kKParts; ++p)
    split_k_part(units + 16 * p, scales + high_bits_at(type) + high_bytes * p, block, type, p);
}

// A block of kQ5_0 or kQ5_1 into a unit, and 6 or 8 bytes of scales.
inline void split_five_bits(std::byte* unit, std::byte* scales, const std::byte* block,
                            DType type) {
  const auto header = static_cast<std::size_t>(high_bits_at(type));
  const std::byte* fifths = block + header;
  std::uint32_t high = 0;
  for (int i = 0; i < kPartCols; ++i)
    high |= (std::to_integer<std::uint32_t>(fifths[i / 8]) >> i % 8 & 1) << (i % 4 * 8 + i / 4);
  std::memcpy(scales, block, header), std::memcpy(scales + header, &high, sizeof high);
  std::memcpy(unit, fifths + 4, 16);
}

}  // namespace thaw
