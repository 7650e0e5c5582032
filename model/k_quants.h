// Where things are in a block of a K-quant: 256 elements in 8 parts of 32, which have scales of
// their own.   (llama.cpp, ggml-common.h: block_q4_K, block_q5_K, block_q6_K)
//
//   kQ4_K: f16 d, f16 e, 12 bytes of scales, 128 bytes of low bits
//   kQ5_K: f16 d, f16 e, 12 bytes of scales, 32 bytes of high bits, 128 bytes of low bits
//   kQ6_K: 128 bytes of low bits, 64 bytes of high bits, 16 x int8 scales, f16 d
//
// x = d * s * c - e * m, s and m 6 bits a part (kQ4_K, kQ5_K); x = d * s * (c - 32), s for every 16
// elements (kQ6_K). A code c is four low bits and, above them, 0, 1 or 2 high ones.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "model/tensor.h"

namespace thaw {

inline constexpr int kPartCols = 32, kKParts = 8;  // elements of a part, parts of a block

// Bytes from a block's beginning: of its f16 d, and of its scales.
constexpr int k_d_at(DType type) { return type == DType::kQ6_K ? 208 : 0; }
constexpr int k_scales_at(DType type) { return type == DType::kQ6_K ? 192 : 4; }
constexpr int k_high_bits(DType type) {
  return type == DType::kQ6_K ? 2 : type == DType::kQ5_K ? 1 : 0;
}

// The codes of a part: element i's low bits are those of byte low_at + i from bit low_shift on, its
// high ones those of byte high_at + i from bit high_shift on.
struct KPart {
  int low_at, low_shift, high_at, high_shift;
};
constexpr KPart k_part(DType type, int p) {
  if (type == DType::kQ6_K)
    return {p / 4 * 64 + p % 2 * 32, p / 2 % 2 * 4, 128 + p / 4 * 32, p % 4 * 2};
  return {(type == DType::kQ5_K ? 48 : 16) + p / 2 * 32, p % 2 * 4, 16, p};
}

// Element i of part p: its code, which has no sign yet.
inline int k_code(const std::byte* block, DType type, int p, int i) {
  const KPart at = k_part(type, p);
  const int low = std::to_integer<int>(block[at.low_at + i]) >> at.low_shift & 15;
  const int mask = (1 << k_high_bits(type)) - 1;
  if (mask == 0) return low;
  return low | (std::to_integer<int>(block[at.high_at + i]) >> at.high_shift & mask) << 4;
}

// The scales of kQ4_K and kQ5_K: bytes s and m of every part, from 12 bytes. Those of the first
// four parts are the low six bits of the first eight bytes; of the others, the four low bits are
// the nibbles of the last four bytes, and the two high ones the rest of the first eight.
struct KScales {
  std::uint8_t s[kKParts], m[kKParts];
};
inline KScales k_scales(const std::byte* block) {
  std::uint32_t words[3];
  std::memcpy(words, block + 4, sizeof words);
  const std::uint32_t s[] = {words[0] & 0x3f3f3f3f,
                             (words[2] & 0x0f0f0f0f) | (words[0] >> 2 & 0x30303030)};
  const std::uint32_t m[] = {words[1] & 0x3f3f3f3f,
                             (words[2] >> 4 & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030)};
  KScales scales;
  std::memcpy(scales.s, s, sizeof s), std::memcpy(scales.m, m, sizeof m);
  return scales;
}

}  // namespace thaw
