// Exact integer products of activation codes with weight blocks as stored: one block of 32 of four
// weight rows against a few rows of activations. AVX-512 VNNI multiplies bytes and takes an
// activation's 16 bits as two; AVX2 and portable code widen weights to 16 bits.
#pragma once

#include "device/codes_cpu.h"

namespace thaw {

inline constexpr int kDotCols = 4;  // weight rows that are taken together
using f32x4 = float __attribute__((vector_size(16)));

// The sums of elements 0 to 3 of a, of b, of elements 4 to 7 of a, of b.
inline f32x4 sums_of_fours(f32x8 a, f32x8 b) {
  const f32x8 pairs = __builtin_shufflevector(a, b, 0, 1, 8, 9, 4, 5, 12, 13) +
                      __builtin_shufflevector(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  return __builtin_shufflevector(pairs, pairs, 0, 2, 4, 6) +
         __builtin_shufflevector(pairs, pairs, 1, 3, 5, 7);
}

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline constexpr bool kDotPlanes = true;
inline constexpr int kDotRows = 7;  // activation rows up to which this is faster than tiles

using i32x16 = std::int32_t __attribute__((vector_size(64)));
using f32x16 = float __attribute__((vector_size(64)));

// The sums of four weight rows, 4 elements each.
struct DotSums {
  f32x16 rows = {};

  f32x4 total() const {
    f32x8 halves[2];
    std::memcpy(halves, &rows, sizeof rows);
    const f32x4 sums = sums_of_fours(halves[0], halves[1]);
    return __builtin_shufflevector(sums, sums, 0, 2, 1, 3);
  }
};

inline i32x16 load_four_times(const std::int16_t* p) {  // 16 bytes
  return reinterpret_cast<i32x16>(
      _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}

// Elements 0, 2, 4, 6, each four times.
inline f32x16 spread_even(f32x8 v) {
  const __m512i from = _mm512_setr_epi32(0, 0, 0, 0, 2, 2, 2, 2, 4, 4, 4, 4, 6, 6, 6, 6);
  return reinterpret_cast<f32x16>(_mm512_maskz_permutexvar_ps(
      0xffff, from, _mm512_castps256_ps512(reinterpret_cast<__m256>(v))));
}

// 16 bytes of each of four rows.
inline i32x16 load_rows(const std::byte* w, std::int64_t stride) {
  const auto load = [&](int r) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * stride));
  };
  __m512i all = _mm512_zextsi128_si512(load(0));
  all = _mm512_mask_broadcast_i32x4(all, 0x00f0, load(1));
  all = _mm512_mask_broadcast_i32x4(all, 0x0f00, load(2));
  return reinterpret_cast<i32x16>(_mm512_mask_broadcast_i32x4(all, 0xf000, load(3)));
}

// sum[c] += a[4 c] b[4 c] + .. + a[4 c + 3] b[4 c + 3], bytes without and with signs.
inline void add_byte_products(i32x16& sum, i32x16 a, i32x16 b) {
  sum = reinterpret_cast<i32x16>(_mm512_dpbusd_epi32(
      reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
}

// sums[i] += scaled[i][2 r] * (block of weight row r . block i of codes), r < 4; blocks of codes
// `code_stride` apart. w: the first row's codes, nibbles or bytes.
template <bool kNibbles, int kRows>
[[gnu::always_inline]] inline void add_dots(DotSums (&sums)[kRows], const f32x8 (&scaled)[kRows],
                                            const std::int16_t* codes, std::int64_t code_stride,
                                            const std::byte* w, std::int64_t stride) {
  // Bytes are multiplied as unsigned by signed. Nibbles have no signs; where weights have, 128 is
  // added to the bytes of activations, and 128 * 256 + 128 times the sum of weights is taken away.
  constexpr auto kSigns = static_cast<std::int32_t>(0x80808080);
  i32x16 low = load_rows(w, stride), high, excess = {};  // elements 0 .. 15 and 16 .. 31
  if constexpr (kNibbles) {
    high = low >> 4 & 0x0f0f0f0f;
    low &= 0x0f0f0f0f;
  } else {
    const i32x16 ones = i32x16{} + 0x01010101;
    high = load_rows(w + 16, stride);
    add_byte_products(excess, ones, low), add_byte_products(excess, ones, high);
    excess *= 128 * 256 + 128;
  }
  const auto add = [&](i32x16& sum, const std::int16_t* plane, i32x16 weights) {
    const i32x16 x = load_four_times(plane);
    if constexpr (kNibbles) {
      add_byte_products(sum, weights, x);
    } else {
      add_byte_products(sum, x ^ kSigns, weights);
    }
  };
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i, codes += code_stride) {
    i32x16 sum = {};
    add(sum, codes, low), add(sum, codes + 8, high);
    sum <<= 8;
    add(sum, codes + 16, low), add(sum, codes + 24, high);
    sum -= excess;
    sums[i].rows += spread_even(scaled[i]) * __builtin_convertvector(sum, f32x16);
  }
}

#else

inline constexpr bool kDotPlanes = false;
inline constexpr int kDotRows = 3;

// The sums of four weight rows, 4 elements each: of rows 0 and 2, and of rows 1 and 3.
struct DotSums {
  f32x8 pairs[2] = {};

  f32x4 total() const { return sums_of_fours(pairs[0], pairs[1]); }
};

inline i16x16 load_twice(const std::int16_t* p) {  // 16 bytes
#ifdef __AVX2__
  return reinterpret_cast<i16x16>(
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  return load_two(p, p);
#endif
}

// Elements i and i + 4, each four times.
template <int i>
f32x8 spread(f32x8 v) {
  return __builtin_shufflevector(v, v, i, i, i, i, i + 4, i + 4, i + 4, i + 4);
}

// A block of 32 codes of two weight rows, widened to 16 bits: part p holds the eight codes from
// position 8 p on, in the order of codes, of the first row, then of the second.
struct BlockCodes {
  i16x16 parts[4];
};

// first, second: where the rows' codes begin, 16 bytes of nibbles or 32 signed bytes.
template <bool kNibbles>
BlockCodes unpack(const std::byte* first, const std::byte* second) {
  const i16x16 bytes = load_two(first, second);
  if constexpr (kNibbles) {
    using u16x16 = std::uint16_t __attribute__((vector_size(32)));
    const auto word = reinterpret_cast<u16x16>(bytes);
    return {reinterpret_cast<i16x16>(word & 15), reinterpret_cast<i16x16>(word >> 4 & 15),
            reinterpret_cast<i16x16>(word >> 8 & 15), reinterpret_cast<i16x16>(word >> 12)};
  } else {
    const i16x16 more = load_two(first + 16, second + 16);
    return {bytes << 8 >> 8, more << 8 >> 8, bytes >> 8, more >> 8};
  }
}

template <bool kNibbles, int kRows>
[[gnu::always_inline]] inline void add_dots(DotSums (&sums)[kRows], const f32x8 (&scaled)[kRows],
                                            const std::int16_t* codes, std::int64_t code_stride,
                                            const std::byte* w, std::int64_t stride) {
  const BlockCodes even = unpack<kNibbles>(w, w + 2 * stride);
  const BlockCodes odd = unpack<kNibbles>(w + stride, w + 3 * stride);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i, codes += code_stride) {
    i32x8 sum[2] = {};
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const i16x16 x = load_twice(codes + 8 * part);
      add_products(sum[0], even.parts[part], x), add_products(sum[1], odd.parts[part], x);
    }
    sums[i].pairs[0] += spread<0>(scaled[i]) * to_float(sum[0]);
    sums[i].pairs[1] += spread<2>(scaled[i]) * to_float(sum[1]);
  }
}

#endif

}  // namespace thaw
