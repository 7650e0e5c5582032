// Exact integer products of 16-bit activation codes with the small codes of weight blocks. One AVX2
// and one portable form of each; the sums are integers, so both give the same bits.
//
// The 32 codes of a block, activations and weights alike, stand in the order 0, 2, .. 30, 1, 3, ..
// 31: a 16-bit lane of stored bytes holds an even element and the odd one after it, so this order
// needs shifts and masks alone, no shuffles.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "device/half.h"
#include "device/tile_cpu.h"

namespace thaw {

using i32x8 = std::int32_t __attribute__((vector_size(32)));
using i16x16 = std::int16_t __attribute__((vector_size(32)));

inline f32x8 to_float(i32x8 v) { return __builtin_convertvector(v, f32x8); }

// Where element i of a block stands among its codes.
constexpr int code_position(int i) { return i / 2 + i % 2 * 16; }

// The 32 codes of a block, widened to 16 bits.
struct BlockCodes {
  i16x16 even, odd;
};

// Elements 0 and 1 are the f32 values of the two halves at p; 2 and 3 are zero.
inline f32x4 load_halves(const std::byte* p) {
#ifdef __F16C__
  std::int32_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return reinterpret_cast<f32x4>(_mm_cvtph_ps(_mm_cvtsi32_si128(bits)));
#else
  std::uint16_t bits[2];
  std::memcpy(bits, p, sizeof bits);
  return f32x4{f16_to_f32(bits[0]), f16_to_f32(bits[1]), 0, 0};
#endif
}

#ifdef __AVX2__

// w: 16 bytes, element j in the low nibble of byte j, j + 16 in the high one.
inline BlockCodes unpack_nibbles(const std::byte* w) {
  const __m256i mask = _mm256_set1_epi16(15);
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w)));
  const __m256i halves = _mm256_srlv_epi32(both, _mm256_setr_epi32(0, 0, 0, 0, 4, 4, 4, 4));
  return {reinterpret_cast<i16x16>(_mm256_and_si256(halves, mask)),
          reinterpret_cast<i16x16>(_mm256_and_si256(_mm256_srli_epi16(halves, 8), mask))};
}

// w: 32 signed bytes.
inline BlockCodes unpack_bytes(const std::byte* w) {
  const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
  return {reinterpret_cast<i16x16>(_mm256_srai_epi16(_mm256_slli_epi16(bytes, 8), 8)),
          reinterpret_cast<i16x16>(_mm256_srai_epi16(bytes, 8))};
}

// Element c is a[2c] b[2c] + a[2c + 1] b[2c + 1].
inline i32x8 multiply_pairs(i16x16 a, i16x16 b) {
  return reinterpret_cast<i32x8>(
      _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
}

#else

inline BlockCodes unpack_nibbles(const std::byte* w) {
  BlockCodes codes;
  for (int i = 0; i < 8; ++i) {
    const int even = std::to_integer<int>(w[2 * i]), odd = std::to_integer<int>(w[2 * i + 1]);
    codes.even[i] = static_cast<std::int16_t>(even & 15);
    codes.even[i + 8] = static_cast<std::int16_t>(even >> 4);
    codes.odd[i] = static_cast<std::int16_t>(odd & 15);
    codes.odd[i + 8] = static_cast<std::int16_t>(odd >> 4);
  }
  return codes;
}

inline BlockCodes unpack_bytes(const std::byte* w) {
  BlockCodes codes;
  for (int i = 0; i < 16; ++i) {
    codes.even[i] = static_cast<std::int8_t>(w[2 * i]);
    codes.odd[i] = static_cast<std::int8_t>(w[2 * i + 1]);
  }
  return codes;
}

inline i32x8 multiply_pairs(i16x16 a, i16x16 b) {
  i32x8 products;
  for (int c = 0; c < 8; ++c) products[c] = a[2 * c] * b[2 * c] + a[2 * c + 1] * b[2 * c + 1];
  return products;
}

#endif

// Eight partial sums of the products of a block with 32 activation codes.
inline i32x8 dot_block(const std::int16_t* x, const BlockCodes& w) {
  i16x16 even, odd;
  std::memcpy(&even, x, sizeof even);
  std::memcpy(&odd, x + 16, sizeof odd);
  return multiply_pairs(even, w.even) + multiply_pairs(odd, w.odd);
}

// The two codes at x in every pair of lanes.
inline i16x16 broadcast_pair(const std::int16_t* x) {
  std::int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  const i32x8 all = {pair, pair, pair, pair, pair, pair, pair, pair};
  return reinterpret_cast<i16x16>(all);
}

}  // namespace thaw
