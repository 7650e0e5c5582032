// Exact integer products of activation codes with weight blocks as stored: 32 codes of each of four
// weight rows against a few rows of activations. AVX-512 VNNI multiplies bytes and takes an
// activation's 16 bits as two; AVX2 and portable code widen weights to 16 bits.
//
// How codes are stored is a Layout: bytes(low, high, load) gives codes 0 .. 15 and 16 .. 31 as
// bytes, of several rows, where load(at) is 16 bytes of each row from byte `at` on. The bytes have
// signs if kSigned; with kGroups = 2 low and high have scales of their own.
#pragma once

#include <type_traits>

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

// The byte in every byte of a vector.
template <class Vector>
Vector all_bytes(int byte) {
  using Element = std::remove_cvref_t<decltype(Vector{}[0])>;
  return Vector{} + static_cast<Element>(0x01010101u * static_cast<unsigned>(byte));
}

// 16 bytes: code j in the low half of byte j, code j + 16 in the high one.
struct NibbleLayout {
  static constexpr bool kSigned = false;
  static constexpr int kGroups = 1;
  template <class Vector, class Load>
  [[gnu::always_inline]] void bytes(Vector& low, Vector& high, const Load& load) const {
    const Vector both = load(0);
    low = both & all_bytes<Vector>(15), high = both >> 4 & all_bytes<Vector>(15);
  }
};

// 32 bytes.
struct ByteLayout {
  static constexpr bool kSigned = true;
  static constexpr int kGroups = 1;
  template <class Vector, class Load>
  [[gnu::always_inline]] void bytes(Vector& low, Vector& high, const Load& load) const {
    low = load(0), high = load(16);
  }
};

#ifdef __AVX2__
// Of bits `first` to `first` + 15, the byte that each is in.
inline __m128i byte_of_bit(int first) {
  return _mm_set_epi64x(0x0101010101010101 * (first / 8 + 1), 0x0101010101010101 * (first / 8));
}
#endif

// Of each 16 bytes, byte i: 16 if bit `first` + i of the first four bytes is set, else 0.
template <class Vector>
[[gnu::always_inline]] inline Vector fifth_bits(const Vector& v, int first) {
#ifdef __AVX512BW__
  if constexpr (sizeof v == 64) {
    const __m512i bytes = _mm512_shuffle_epi8(
        reinterpret_cast<__m512i>(v), _mm512_maskz_broadcast_i32x4(0xffff, byte_of_bit(first)));
    const __m512i bits = _mm512_set1_epi64(static_cast<std::int64_t>(0x8040201008040201));
    return reinterpret_cast<Vector>(
        _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bytes, bits), _mm512_set1_epi8(16)));
  }
#endif
#ifdef __AVX2__
  if constexpr (sizeof v == 32) {
    const __m256i bytes = _mm256_shuffle_epi8(reinterpret_cast<__m256i>(v),
                                              _mm256_broadcastsi128_si256(byte_of_bit(first)));
    const __m256i bits = _mm256_set1_epi64x(static_cast<std::int64_t>(0x8040201008040201));
    return reinterpret_cast<Vector>(_mm256_and_si256(
        _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bits), bits), _mm256_set1_epi8(16)));
  }
#endif
  unsigned char bytes[sizeof v], set[sizeof v];
  std::memcpy(bytes, &v, sizeof v);
  for (std::size_t i = 0; i < sizeof v; ++i) {
    const std::size_t bit = first + i % 16;
    set[i] = bytes[i / 16 * 16 + bit / 8] >> bit % 8 & 1 ? 16 : 0;
  }
  Vector out;
  std::memcpy(&out, set, sizeof out);
  return out;
}

// As NibbleLayout, behind 4 bytes with a fifth bit of every code.
struct FiveBitLayout {
  static constexpr bool kSigned = false;
  static constexpr int kGroups = 1;
  template <class Vector, class Load>
  [[gnu::always_inline]] void bytes(Vector& low, Vector& high, const Load& load) const {
    const Vector fifths = load(0), both = load(4);
    low = (both & all_bytes<Vector>(15)) | fifth_bits(fifths, 0);
    high = (both >> 4 & all_bytes<Vector>(15)) | fifth_bits(fifths, 16);
  }
};

using i8x32 = std::int8_t __attribute__((vector_size(32)));
using i8x64 = std::int8_t __attribute__((vector_size(64)));

// Four low bits in bytes from low_at on, kHighBits more in bytes from high_at on; with 2 of them,
// codes have 32 taken away, and two scales.
template <int kHighBits>
struct SplitLayout {
  static constexpr bool kSigned = kHighBits == 2;
  static constexpr int kGroups = kSigned ? 2 : 1;
  int low_at, low_shift, high_at, high_shift;

  template <class Vector, class Load>
  [[gnu::always_inline]] void bytes(Vector& low, Vector& high, const Load& load) const {
    low = codes<Vector>(load, 0), high = codes<Vector>(load, 16);
  }
  template <class Vector, class Load>
  [[gnu::always_inline]] Vector codes(const Load& load, int at) const {
    Vector c = load(low_at + at) >> low_shift & all_bytes<Vector>(15);
    if constexpr (kHighBits > 0)
      c |= (load(high_at + at) >> high_shift & all_bytes<Vector>((1 << kHighBits) - 1)) << 4;
    if constexpr (kSigned) {
      using Bytes = std::conditional_t<sizeof(Vector) == 32, i8x32, i8x64>;
      c = reinterpret_cast<Vector>(reinterpret_cast<Bytes>(c) - 32);
    }
    return c;
  }
};

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

// Elements i, i + 2, i + 4, i + 6, each four times.
template <int i>
f32x16 spread(f32x8 v) {
  const __m512i from = _mm512_setr_epi32(i, i, i, i, i + 2, i + 2, i + 2, i + 2, i + 4, i + 4,
                                         i + 4, i + 4, i + 6, i + 6, i + 6, i + 6);
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
// `code_stride` apart. w: where the first row's block begins. With two groups, scaled[i][2 r + 1]
// is the second's.
template <class Layout, int kRows>
[[gnu::always_inline]] inline void add_dots(DotSums (&sums)[kRows], const f32x8 (&scaled)[kRows],
                                            const std::int16_t* codes, std::int64_t code_stride,
                                            const std::byte* w, std::int64_t stride,
                                            const Layout& layout) {
  // Bytes are multiplied as unsigned by signed: codes by activations, or, where codes have signs,
  // activations by codes: 128 is added to the bytes of activations, and 128 * 256 + 128 times the
  // sum of weights is taken away.
  constexpr auto kSigns = static_cast<std::int32_t>(0x80808080);
  constexpr int kGroups = Layout::kGroups, kLast = kGroups - 1;
  i32x16 low, high, excess[kGroups] = {};  // elements 0 .. 15 and 16 .. 31
  layout.bytes(low, high, [&](int at) { return load_rows(w + at, stride); });
  if constexpr (Layout::kSigned) {
    const i32x16 ones = i32x16{} + 0x01010101;
    add_byte_products(excess[0], ones, low), add_byte_products(excess[kLast], ones, high);
    for (i32x16& sum : excess) sum *= 128 * 256 + 128;
  }
  const auto add = [&](i32x16& sum, const std::int16_t* plane, i32x16 weights) {
    const i32x16 x = load_four_times(plane);
    if constexpr (Layout::kSigned) {
      add_byte_products(sum, x ^ kSigns, weights);
    } else {
      add_byte_products(sum, weights, x);
    }
  };
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i, codes += code_stride) {
    i32x16 sum[kGroups] = {};
    add(sum[0], codes, low), add(sum[kLast], codes + 8, high);
    for (i32x16& group : sum) group <<= 8;
    add(sum[0], codes + 16, low), add(sum[kLast], codes + 24, high);
    for (int g = 0; g < kGroups; ++g) sum[g] -= excess[g];
    sums[i].rows += spread<0>(scaled[i]) * __builtin_convertvector(sum[0], f32x16);
    if constexpr (kGroups == 2)
      sums[i].rows += spread<1>(scaled[i]) * __builtin_convertvector(sum[1], f32x16);
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

// first, second: where the rows' blocks begin.
template <class Layout>
[[gnu::always_inline]] inline BlockCodes unpack(const Layout& layout, const std::byte* first,
                                                const std::byte* second) {
  using u16x16 = std::uint16_t __attribute__((vector_size(32)));
  u16x16 low, high;
  layout.bytes(low, high,
               [&](int at) { return reinterpret_cast<u16x16>(load_two(first + at, second + at)); });
  const auto with_signs = [](u16x16 bytes) { return reinterpret_cast<i16x16>(bytes); };
  if constexpr (Layout::kSigned) {
    const i16x16 l = with_signs(low), h = with_signs(high);
    return {l << 8 >> 8, h << 8 >> 8, l >> 8, h >> 8};
  } else {
    return {with_signs(low & 255), with_signs(high & 255), with_signs(low >> 8),
            with_signs(high >> 8)};
  }
}

template <class Layout, int kRows>
[[gnu::always_inline]] inline void add_dots(DotSums (&sums)[kRows], const f32x8 (&scaled)[kRows],
                                            const std::int16_t* codes, std::int64_t code_stride,
                                            const std::byte* w, std::int64_t stride,
                                            const Layout& layout) {
  constexpr int kGroups = Layout::kGroups;  // of two, parts 0 and 2 are the first
  const BlockCodes even = unpack(layout, w, w + 2 * stride);
  const BlockCodes odd = unpack(layout, w + stride, w + 3 * stride);
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i, codes += code_stride) {
    i32x8 sum[2][kGroups] = {};
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const i16x16 x = load_twice(codes + 8 * part);
      add_products(sum[0][part % kGroups], even.parts[part], x);
      add_products(sum[1][part % kGroups], odd.parts[part], x);
    }
    sums[i].pairs[0] += spread<0>(scaled[i]) * to_float(sum[0][0]);
    sums[i].pairs[1] += spread<2>(scaled[i]) * to_float(sum[1][0]);
    if constexpr (kGroups == 2) {
      sums[i].pairs[0] += spread<1>(scaled[i]) * to_float(sum[0][1]);
      sums[i].pairs[1] += spread<3>(scaled[i]) * to_float(sum[1][1]);
    }
  }
}

#endif

}  // namespace thaw
