// Exact integer products of 16-bit activation codes with the small codes of weight blocks, for
// AVX-512 VNNI, for AVX2, and portably; the sums are integers, so all give the same bits.
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

// The f32 values of the two halves at rows[0] + at, then of those at rows[1] + at, and so on.
inline f32x8 load_halves(const std::byte* const* rows, std::int64_t at) {
  std::int32_t bits[4];
  for (int i = 0; i < 4; ++i) std::memcpy(&bits[i], rows[i] + at, sizeof bits[i]);
#ifdef __F16C__
  return reinterpret_cast<f32x8>(
      _mm256_cvtph_ps(_mm_setr_epi32(bits[0], bits[1], bits[2], bits[3])));
#else
  f32x8 values;
  for (int i = 0; i < 8; ++i)
    values[i] = f16_to_f32(static_cast<std::uint16_t>(bits[i / 2] >> i % 2 * 16));
  return values;
#endif
}

#ifdef __AVX2__

inline f32x8 broadcast_element(f32x8 v, int i) {
  return reinterpret_cast<f32x8>(
      _mm256_permutevar8x32_ps(reinterpret_cast<__m256>(v), _mm256_set1_epi32(i)));
}

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

// Adds a[2c] b[2c] + a[2c + 1] b[2c + 1] to element c.
inline void add_products(i32x8& sum, i16x16 a, i16x16 b) {
  const auto x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  sum = reinterpret_cast<i32x8>(_mm256_dpwssd_epi32(reinterpret_cast<__m256i>(sum), x, y));
#else
  sum += reinterpret_cast<i32x8>(_mm256_madd_epi16(x, y));
#endif
}

#else

inline f32x8 broadcast_element(f32x8 v, int i) { return f32x8{} + v[i]; }

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

inline void add_products(i32x8& sum, i16x16 a, i16x16 b) {
  for (int c = 0; c < 8; ++c) sum[c] += a[2 * c] * b[2 * c] + a[2 * c + 1] * b[2 * c + 1];
}

#endif

// Eight partial sums of the products of a block with 32 activation codes.
inline i32x8 dot_block(const std::int16_t* x, const BlockCodes& w) {
  i16x16 even, odd;
  std::memcpy(&even, x, sizeof even);
  std::memcpy(&odd, x + 16, sizeof odd);
  i32x8 sum = {};
  add_products(sum, even, w.even), add_products(sum, odd, w.odd);
  return sum;
}

// ---- rows of a tile: a pair of codes of each of kTileCols weight rows, in kTileParts vectors ----

using CodePairs = std::int16_t __attribute__((vector_size(sizeof(TilePart))));
using CodeSums = std::int32_t __attribute__((vector_size(sizeof(TilePart))));

// kCodeTileRows: activation rows at a time, whose sums stay in registers.
#ifdef __AVX512BW__

inline constexpr int kCodeTileRows = 12;

inline void add_products(CodeSums& sum, CodePairs a, CodePairs b) {
  const auto x = reinterpret_cast<__m512i>(a), y = reinterpret_cast<__m512i>(b);
#ifdef __AVX512VNNI__
  sum = reinterpret_cast<CodeSums>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum), x, y));
#else
  sum += reinterpret_cast<CodeSums>(_mm512_madd_epi16(x, y));
#endif
}

#else

inline constexpr int kCodeTileRows = 4;

#endif

// The two codes at x in every pair of lanes.
inline CodePairs broadcast_pair(const std::int16_t* x) {
  std::int32_t pair;
  std::memcpy(&pair, x, sizeof pair);
  return reinterpret_cast<CodePairs>(CodeSums{} + pair);
}

}  // namespace thaw
