// Exact integer dot products of 16-bit activation codes with small weight codes. One AVX2 and one
// portable form of each; the sums are integers, so both give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "device/tile_cpu.h"

namespace thaw {

// Eight partial sums of a 32-element block's products; their total is the dot product.
using i32x8 = std::int32_t __attribute__((vector_size(32)));

inline f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }

#ifdef __AVX2__

// x: 32 codes; w: 16 bytes, element j in the low nibble of byte j, j + 16 in the high one.
inline i32x8 dot_nibbles(const std::int16_t* x, const std::byte* w) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
  const __m128i mask = _mm_set1_epi8(15);
  const __m256i low = _mm256_cvtepu8_epi16(_mm_and_si128(bytes, mask));
  const __m256i high = _mm256_cvtepu8_epi16(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask));
  const __m256i* codes = reinterpret_cast<const __m256i*>(x);
  return reinterpret_cast<i32x8>(
      _mm256_add_epi32(_mm256_madd_epi16(low, _mm256_loadu_si256(codes)),
                       _mm256_madd_epi16(high, _mm256_loadu_si256(codes + 1))));
}

// x: 32 codes; w: 32 signed bytes.
inline i32x8 dot_bytes(const std::int16_t* x, const std::byte* w) {
  const __m128i* bytes = reinterpret_cast<const __m128i*>(w);
  const __m256i first = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes));
  const __m256i second = _mm256_cvtepi8_epi16(_mm_loadu_si128(bytes + 1));
  const __m256i* codes = reinterpret_cast<const __m256i*>(x);
  return reinterpret_cast<i32x8>(
      _mm256_add_epi32(_mm256_madd_epi16(first, _mm256_loadu_si256(codes)),
                       _mm256_madd_epi16(second, _mm256_loadu_si256(codes + 1))));
}

// sum += for each of 8 columns, the dot product of a pair of codes; `w` holds 8 pairs, `x` one.
inline i32x8 add_pairs(i32x8 sum, const std::int16_t* x, i32x8 w) {
  std::int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  const __m256i products = _mm256_madd_epi16(_mm256_set1_epi32(pair), reinterpret_cast<__m256i>(w));
  return reinterpret_cast<i32x8>(_mm256_add_epi32(reinterpret_cast<__m256i>(sum), products));
}

#else

inline i32x8 dot_nibbles(const std::int16_t* x, const std::byte* w) {
  i32x8 sum = {};
  for (int i = 0; i < 16; ++i) {
    const int byte = std::to_integer<int>(w[i]);
    sum[i / 2] += x[i] * (byte & 15) + x[i + 16] * (byte >> 4);
  }
  return sum;
}

inline i32x8 dot_bytes(const std::int16_t* x, const std::byte* w) {
  i32x8 sum = {};
  for (int i = 0; i < 32; ++i) sum[i % 16 / 2] += x[i] * static_cast<std::int8_t>(w[i]);
  return sum;
}

inline i32x8 add_pairs(i32x8 sum, const std::int16_t* x, i32x8 w) {
  std::int16_t pairs[16];
  std::memcpy(pairs, &w, sizeof pairs);
  for (int c = 0; c < 8; ++c) sum[c] += x[0] * pairs[2 * c] + x[1] * pairs[2 * c + 1];
  return sum;
}

#endif

}  // namespace thaw
