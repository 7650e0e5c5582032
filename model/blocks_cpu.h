// Blocks of every format with codes, as the products on the CPU take them apart: 32 codes at a
// time, with their scale d and, in some formats, an offset m, x = d * c + m.
#pragma once

#include "device/dots_cpu.h"
#include "model/k_quants.h"

namespace thaw {

// kParts: parts of 32 codes in a block. kOffset: m is so many times what header() gives as m.
template <DType kType>
struct Blocks {
  static constexpr std::int64_t kBytes = dtype_info(kType).block_bytes;
  static constexpr int kParts = dtype_info(kType).block / kPartCols;
  static constexpr bool kIsK = is_k_quant(kType);
  static constexpr int kGroups = kType == DType::kQ6_K ? 2 : 1;
  static constexpr bool kHasFifths = kType == DType::kQ5_0 || kType == DType::kQ5_1;
  static constexpr bool kHasMin = kType == DType::kQ4_1 || kType == DType::kQ5_1 ||
                                  kType == DType::kQ4_K || kType == DType::kQ5_K;
  static constexpr int kOffset = kType == DType::kQ4_0   ? -8
                                 : kType == DType::kQ5_0 ? -16
                                                         : static_cast<int>(kHasMin);
  static constexpr int kCodesAt = kIsK ? 0 : kHasMin ? 4 : 2;

  static constexpr auto layout(int part) {
    if constexpr (kIsK) {
      const KPart at = k_part(kType, part);
      return SplitLayout<k_high_bits(kType)>{at.low_at, at.low_shift, at.high_at, at.high_shift};
    } else if constexpr (kType == DType::kQ8_0) {
      return ByteLayout{};
    } else if constexpr (kHasFifths) {
      return FiveBitLayout{};
    } else {
      return NibbleLayout{};
    }
  }
};

inline float load_half(const std::byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return f16_to_f32(bits);
}

// 8 small integers.
template <class Integer>
f32x8 load_bytes(const Integer* p) {
#ifdef __AVX2__
  const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<f32x8>(_mm256_cvtepi32_ps(
      std::is_signed_v<Integer> ? _mm256_cvtepi8_epi32(all) : _mm256_cvtepu8_epi32(all)));
#else
  f32x8 values;
  for (int i = 0; i < 8; ++i) values[i] = static_cast<float>(p[i]);
  return values;
#endif
}

// Of the 8 parts of a block of a K-quant: d, and m; with two groups, their d.
template <DType kType>
[[gnu::always_inline]] inline void k_block_scales(f32x8& first, f32x8& second,
                                                  const std::byte* block) {
  const float d = load_half(block + k_d_at(kType));
  if constexpr (kType == DType::kQ6_K) {
    std::int8_t groups[2][kKParts];
    for (int i = 0; i < 2 * kKParts; ++i)
      groups[i % 2][i / 2] = static_cast<std::int8_t>(block[k_scales_at(kType) + i]);
    first = d * load_bytes(groups[0]), second = d * load_bytes(groups[1]);
  } else {
    const KScales scales = k_scales(block);
    first = d * load_bytes(scales.s), second = -load_half(block + 2) * load_bytes(scales.m);
  }
}

// headers[p]: of part p of four rows' blocks, each row's d, then its m (or its second group's d; d
// again, where the format has no m).
template <DType kType>
[[gnu::always_inline]] inline void load_headers(f32x8 (&headers)[Blocks<kType>::kParts],
                                                const std::byte* const (&rows)[kDotCols]) {
  if constexpr (Blocks<kType>::kIsK) {
    for (int r = 0; r < kDotCols; ++r)
      k_block_scales<kType>(headers[2 * r], headers[2 * r + 1], rows[r]);
    transpose_8x8(headers);
  } else {
    headers[0] = load_halves(rows, 0);
    if constexpr (!Blocks<kType>::kHasMin)
      headers[0] = __builtin_shufflevector(headers[0], headers[0], 0, 0, 2, 2, 4, 4, 6, 6);
  }
}

}  // namespace thaw
