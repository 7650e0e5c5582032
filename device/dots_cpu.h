// Exact integer products of activation codes with weight blocks as stored: one block of 32 of four
// weight rows against a few rows of activations. AVX-512 VNNI multiplies bytes and takes an
// activation's 16 bits as two; AVX2 and portable code widen weights to 16 bits.
#pragma once

#include "device/codes_cpu.h"

namespace thaw {

inline constexpr int kDotCols = 4;  // weight rows that are taken together

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

inline constexpr bool kDotPlanes = true;
inline constexpr int kDotRows = 7;  // activation rows up to which this is faster than tiles

using i32x16 = std::int32_t __attribute__((vector_size(64)));
using f32x16 = float __attribute__((vector_size(64)));

// The sums of four weight rows, 4 elements each.
struct DotSums {
  f32x16 rows = {};

  void finish(float* out) const {
    for (int r = 0; r < kDotCols; ++r)
      out[r] = (rows[4 * r] + rows[4 * r + 2]) + (rows[4 * r + 1] + rows[4 * r + 3]);
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

struct DotSums {
  f32x8 rows[kDotCols] = {};

  void finish(float* out) const {
    for (int r = 0; r < kDotCols; ++r) out[r] = sum8(rows[r]);
  }
};

// The 32 codes of a block, widened to 16 bits.
struct BlockCodes {
  i16x16 even, odd;
};

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

template <bool kNibbles, int kRows>
[[gnu::always_inline]] inline void add_dots(DotSums (&sums)[kRows], const f32x8 (&scaled)[kRows],
                                            const std::int16_t* codes, std::int64_t code_stride,
                                            const std::byte* w, std::int64_t stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kDotCols; ++r) {
    const BlockCodes unpacked =
        kNibbles ? unpack_nibbles(w + r * stride) : unpack_bytes(w + r * stride);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
      sums[i].rows[r] += broadcast_element(scaled[i], 2 * r) *
                         to_float(dot_block(codes + i * code_stride, unpacked));
  }
}

#endif

}  // namespace thaw
