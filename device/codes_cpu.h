// Exact integer products of 16-bit activation codes with the small codes of weight blocks that a
// tile holds unpacked, for AVX-512 VNNI, for AVX2, and portably; the sums are integers, so all give
// the same bits. device/dots_cpu.h has those with blocks as stored.
//
// The order of codes: of a block of 32 first the even elements, then the odd ones, activations and
// weights alike. A 16-bit lane of stored bytes holds an even element and the odd one after it, so
// this needs shifts and masks alone, no shuffles.
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

// The 16 bytes at `first`, then the 16 at `second`.
inline i16x16 load_two(const void* first, const void* second) {
#ifdef __AVX2__
  const auto load = [](const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); };
  return reinterpret_cast<i16x16>(
      _mm256_inserti128_si256(_mm256_castsi128_si256(load(first)), load(second), 1));
#else
  i16x16 both;
  std::memcpy(&both, first, 16);
  std::memcpy(reinterpret_cast<char*>(&both) + 16, second, 16);
  return both;
#endif
}

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

// Adds a[2c] b[2c] + a[2c + 1] b[2c + 1] to element c.
#ifdef __AVX2__
inline void add_products(i32x8& sum, i16x16 a, i16x16 b) {
  const auto x = reinterpret_cast<__m256i>(a), y = reinterpret_cast<__m256i>(b);
#ifdef __AVXVNNI__
  sum = reinterpret_cast<i32x8>(_mm256_dpwssd_avx_epi32(reinterpret_cast<__m256i>(sum), x, y));
#else
  sum += reinterpret_cast<i32x8>(_mm256_madd_epi16(x, y));
#endif
}

#else
inline void add_products(i32x8& sum, i16x16 a, i16x16 b) {
  for (int c = 0; c < 8; ++c) sum[c] += a[2 * c] * b[2 * c] + a[2 * c + 1] * b[2 * c + 1];
}
#endif

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
