// Blocks of every format with codes, as the products on the CPU take them apart: 32 codes at a
// time, with their scale d and, in some formats, an offset m, x = d * c + m.
#pragma once

#include "device/dots_cpu.h"
#include "model/k_quants.h"

namespace thaw {

// kParts: parts of 32 codes in a block. kOffset: m is so many times what load_headers() gives as m.
template <DType kType>
struct Blocks {
  static constexpr std::int64_t kBytes = dtype_info(kType).block_bytes;
  static constexpr int kParts = dtype_info(kType).block / kPartCols;
  static constexpr bool kIsK = is_k_quant(kType);
  static constexpr int kGroups = kType == DType::kQ6_K ? 2 : 1;
  static constexpr bool kHasMin = has_min(kType);
  static constexpr int kOffset = kHasMin ? 1 : -zero_code(kType);
  static constexpr int kCodesAt = kIsK ? 0 : kHasMin ? 4 : 2;

  static constexpr auto layout(int part) {
    if constexpr (kIsK) {
      const KPart at = k_part(kType, part);
      return SplitLayout<k_high_bits(kType)>{at.low_at, at.low_shift, at.high_at, at.high_shift};
    } else if constexpr (kType == DType::kQ8_0) {
      return ByteLayout{};
    } else if constexpr (has_five_bits(kType)) {
      return FiveBitLayout{};
    } else {
      return NibbleLayout{};
    }
  }
};

using u32x4 = std::uint32_t __attribute__((vector_size(16)));
using u32x8 = std::uint32_t __attribute__((vector_size(32)));

// Word i of each row becomes row i.
inline void transpose_4x4(u32x4 (&v)[4]) {
  const u32x4 a = __builtin_shufflevector(v[0], v[1], 0, 4, 1, 5);
  const u32x4 b = __builtin_shufflevector(v[2], v[3], 0, 4, 1, 5);
  const u32x4 c = __builtin_shufflevector(v[0], v[1], 2, 6, 3, 7);
  const u32x4 d = __builtin_shufflevector(v[2], v[3], 2, 6, 3, 7);
  v[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  v[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  v[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  v[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Of kQ4_K and kQ5_K: of the parts' s and m, as in k_scales(), but of four rows at once; a row's
// four bytes are those of four parts.
inline void load_k_headers(f32x8 (&headers)[kKParts], const std::byte* const (&rows)[kDotCols]) {
  u32x4 words[4];  // d and e, and 12 bytes of scales
  for (int r = 0; r < kDotCols; ++r) std::memcpy(&words[r], rows[r], sizeof words[r]);
  transpose_4x4(words);
  const f32x8 signs = {1, -1, 1, -1, 1, -1, 1, -1};
  const f32x8 de = load_halves(rows, 0) * signs;
  const u32x4 s[] = {words[1] & 0x3f3f3f3f, (words[3] & 0x0f0f0f0f) | (words[1] >> 2 & 0x30303030)};
  const u32x4 m[] = {words[2] & 0x3f3f3f3f,
                     (words[3] >> 4 & 0x0f0f0f0f) | (words[2] >> 2 & 0x30303030)};
#pragma GCC unroll 8
  for (int p = 0; p < kKParts; ++p) {
    const u32x8 both = __builtin_shufflevector(s[p / 4], m[p / 4], 0, 4, 1, 5, 2, 6, 3, 7);
    headers[p] = to_float(reinterpret_cast<i32x8>(both >> 8 * (p % 4) & 255)) * de;
  }
}

// Of kQ6_K: 16 scales with signs, two a part.
inline void load_q6_k_headers(f32x8 (&headers)[kKParts], const std::byte* const (&rows)[kDotCols]) {
  u32x4 words[4];
  for (int r = 0; r < kDotCols; ++r)
    std::memcpy(&words[r], rows[r] + k_scales_at(DType::kQ6_K), sizeof words[r]);
  transpose_4x4(words);
  const f32x8 last = load_halves(rows, k_d_at(DType::kQ6_K) - 2);  // two scales, and d
  const f32x8 d = __builtin_shufflevector(last, last, 1, 1, 3, 3, 5, 5, 7, 7);
#pragma GCC unroll 8
  for (int p = 0; p < kKParts; ++p) {
    const u32x4 word = words[p / 2];
    const u32x8 both = __builtin_shufflevector(word, word, 0, 0, 1, 1, 2, 2, 3, 3);
    const u32x8 up =
        p % 2 == 0 ? u32x8{24, 16, 24, 16, 24, 16, 24, 16} : u32x8{8, 0, 8, 0, 8, 0, 8, 0};
    headers[p] = to_float(reinterpret_cast<i32x8>(both << up) >> 24) * d;
  }
}

// headers[p]: of part p of four rows' blocks, each row's d, then its m (or its second group's d; d
// again, where the format has no m).
template <DType kType>
[[gnu::always_inline]] inline void load_headers(f32x8 (&headers)[Blocks<kType>::kParts],
                                                const std::byte* const (&rows)[kDotCols]) {
  if constexpr (kType == DType::kQ6_K) {
    load_q6_k_headers(headers, rows);
  } else if constexpr (Blocks<kType>::kIsK) {
    load_k_headers(headers, rows);
  } else {
    headers[0] = load_halves(rows, 0);
    if constexpr (!Blocks<kType>::kHasMin)
      headers[0] = __builtin_shufflevector(headers[0], headers[0], 0, 0, 2, 2, 4, 4, 6, 6);
  }
}

}  // namespace thaw
