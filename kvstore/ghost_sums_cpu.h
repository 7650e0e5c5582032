// Integer sums over a group of ghosts: codes, unpacked once for a few queries, times bytes. AVX-512
// VNNI takes two packets and four products at a time, AVX2 and portable code one and two; integers
// are exact, so all give the same bits.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "device/codes_cpu.h"
#include "kvstore/ghost.h"

namespace thaw::ghost_sums {

inline constexpr int kQueries = 4;  // queries that share an unpacking

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

// A group's weights, times the values' scales, rounded to 8 bits.
struct Weights {
  std::uint8_t bytes[kGhostGroup];
  float unit, sum;  // what 1 is worth; sum of all in units

  void pack(const i32x8 (&w)[kGhostGroup / 8]) {
    for (int i = 0; i < kGhostGroup / 16; ++i) {
      const __m512i all = _mm512_maskz_inserti64x4(
          0xff, _mm512_castsi256_si512(reinterpret_cast<__m256i>(w[2 * i])),
          reinterpret_cast<__m256i>(w[2 * i + 1]), 1);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(bytes) + i,
                       _mm512_maskz_cvtepi32_epi8(0xffff, all));
    }
  }
};

using Codes = __m512i;  // vector i of two packets

template <int kBits>
Codes load_codes(const std::byte* packet) {
  const auto load = [](const std::byte* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  };
  return _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(load(packet)),
                                  load(packet + 32 * kBits), 1);
}

// Vector i (0 .. 7) of two packets: unsigned codes.
template <int kBits>
Codes unpack(const std::byte* packet, int i) {
  if constexpr (kBits == 3) {
    const Codes low = _mm512_srli_epi16(load_codes<3>(packet + i / 4 * 32), i % 4 * 2);
    const Codes top = load_codes<3>(packet + 64);
    const Codes high = i >= 2 ? _mm512_srli_epi16(top, i - 2) : _mm512_slli_epi16(top, 2 - i);
    return _mm512_or_si512(_mm512_and_si512(low, _mm512_set1_epi8(3)),
                           _mm512_and_si512(high, _mm512_set1_epi8(4)));
  } else {
    constexpr int kPer = 8 / kBits;
    return _mm512_and_si512(
        _mm512_srli_epi16(load_codes<kBits>(packet + i / kPer * 32), i % kPer * kBits),
        _mm512_set1_epi8((1 << kBits) - 1));
  }
}

// Word `first` of v eight times, then the one kApart words later eight times.
template <int kApart>
Codes spread_words(Codes v, int first) {
  const __m512i from = _mm512_setr_epi64(0, 0, 0, 0, kApart * 0x100000001, kApart * 0x100000001,
                                         kApart * 0x100000001, kApart * 0x100000001);
  return _mm512_maskz_permutexvar_epi32(0xffff, _mm512_add_epi32(from, _mm512_set1_epi32(first)),
                                        v);
}

// 16 sums, of which `low` and `high` each hold two parts of eight in the order of unpacklo and
// unpackhi.
inline void fold_add(i32x8* out, Codes low, Codes high) {
  const auto fold = [](Codes v) {
    return _mm256_add_epi32(_mm512_maskz_extracti64x4_epi64(0xf, v, 0),
                            _mm512_maskz_extracti64x4_epi64(0xf, v, 1));
  };
  const __m256i a = fold(low), b = fold(high);
  out[0] += reinterpret_cast<i32x8>(_mm256_permute2x128_si256(a, b, 0x20));
  out[1] += reinterpret_cast<i32x8>(_mm256_permute2x128_si256(a, b, 0x31));
}

// dots[h][j] = sum over dimensions of q_h u_j, for 32 tokens.
template <int kBits, int kN>
void key_dots(i32x8 (*dots)[4], const GhostQuery* q, const std::byte* codes, int n_packets) {
  Codes sum[kN][2][2] = {};
  for (int first = 0; first < n_packets; first += 8) {
    Codes bytes[kN];  // of the queries, 64 dimensions
    for (int h = 0; h < kN; ++h) {
      const auto half = [&](int i) {
        return _mm512_maskz_cvtepi32_epi16(0xffff, _mm512_loadu_si512(q[h].pairs + first * 4 + i));
      };
      bytes[h] = _mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(half(0)), half(16), 1);
    }
    for (int packet = 0; packet < std::min(8, n_packets - first); packet += 2) {
      const std::byte* in = codes + (first + packet) * 32 * kBits;
#pragma GCC unroll 2
      for (int k = 0; k < 2; ++k) {  // dimensions 4 k .. 4 k + 3 of a packet
        Codes by[kN];
        for (int h = 0; h < kN; ++h) by[h] = spread_words<2>(bytes[h], packet * 2 + k);
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
          const Codes a = unpack<kBits>(in, 4 * k + half), b = unpack<kBits>(in, 4 * k + half + 2);
          const Codes low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
          for (int h = 0; h < kN; ++h) {
            sum[h][half][0] = _mm512_dpbusd_epi32(sum[h][half][0], low, by[h]);
            sum[h][half][1] = _mm512_dpbusd_epi32(sum[h][half][1], high, by[h]);
          }
        }
      }
    }
  }
  for (int h = 0; h < kN; ++h)
    for (int half = 0; half < 2; ++half)
      fold_add(dots[h] + 2 * half, sum[h][half][0], sum[h][half][1]);
}

// sums[h][i] = sum over 32 tokens of w_h u_i for 16 dimensions.
template <int kBits, int kN>
void value_sums(i32x8 (*sums)[2], const Weights* weights, const std::byte* codes) {
  Codes sum[kN][2] = {};
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {  // tokens 4 k .. 4 k + 3 of a packet
    const Codes a = unpack<kBits>(codes, 2 * k), b = unpack<kBits>(codes, 2 * k + 1);
    const Codes low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
    for (int h = 0; h < kN; ++h) {
      const Codes all = _mm512_castsi256_si512(
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights[h].bytes)));
      const Codes by = spread_words<4>(all, k);
      sum[h][0] = _mm512_dpbusd_epi32(sum[h][0], by, low);
      sum[h][1] = _mm512_dpbusd_epi32(sum[h][1], by, high);
    }
  }
  for (int h = 0; h < kN; ++h) fold_add(sums[h], sum[h][0], sum[h][1]);
}

#else

// A group's weights, times the values' scales, rounded to 8 bits.
struct Weights {
  std::uint32_t pairs[kGhostGroup / 2];  // two of them in the low half, and again in the high one
  float unit, sum;                       // what 1 is worth; sum of all in units

  inline void pack(const i32x8 (&w)[kGhostGroup / 8]);
};

#ifdef __AVX2__

using Codes = __m256i;  // 32 bytes, or 16 sums of 16 bits

inline Codes load(const std::byte* p) {
  return _mm256_loadu_si256(reinterpret_cast<const Codes*>(p));
}
inline Codes spread(std::uint32_t pair) { return _mm256_set1_epi32(static_cast<int>(pair)); }

// Vector i (0 .. 7) of a packet of eight: unsigned codes.
template <int kBits>
Codes unpack(const std::byte* packet, int i) {
  if constexpr (kBits == 3) {
    const Codes low = _mm256_srl_epi16(load(packet + i / 4 * 32), _mm_cvtsi32_si128(i % 4 * 2));
    const Codes top = load(packet + 64);
    const Codes high = i >= 2 ? _mm256_srl_epi16(top, _mm_cvtsi32_si128(i - 2))
                              : _mm256_sll_epi16(top, _mm_cvtsi32_si128(2 - i));
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)),
                           _mm256_and_si256(high, _mm256_set1_epi8(4)));
  } else {
    constexpr int kPer = 8 / kBits;
    const Codes in = load(packet + i / kPer * 32);
    return _mm256_and_si256(_mm256_srl_epi16(in, _mm_cvtsi32_si128(i % kPer * kBits)),
                            _mm256_set1_epi8((1 << kBits) - 1));
  }
}

// sum += a.b of neighbouring bytes; a unsigned, b signed. Sums are kept in this order: compilers
// would rather add products as a tree, and spill them.
inline Codes add_products(Codes sum, Codes a, Codes b) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
  keep(sum);
  return sum;
}

inline void widen_add(i32x8* out, Codes sum) {  // 16 sums
  out[0] += reinterpret_cast<i32x8>(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)));
  out[1] += reinterpret_cast<i32x8>(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1)));
}

inline Codes zero() { return _mm256_setzero_si256(); }

// pairs[i] = bytes 2 i and 2 i + 1 of 32, twice; the bytes are given as integers.
inline void pack_pairs(std::uint32_t* pairs, const i32x8 (&bytes)[4]) {
  const auto in = [&](int i) { return reinterpret_cast<Codes>(bytes[i]); };
  const Codes mixed =
      _mm256_packus_epi16(_mm256_packus_epi32(in(0), in(1)), _mm256_packus_epi32(in(2), in(3)));
  const Codes packed =
      _mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  const auto put = [&](int half, __m128i words) {
    const Codes wide = _mm256_cvtepu16_epi32(words);
    _mm256_storeu_si256(reinterpret_cast<Codes*>(pairs) + half,
                        _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16)));
  };
  put(0, _mm256_castsi256_si128(packed));
  put(1, _mm256_extracti128_si256(packed, 1));
}

#else

struct Codes {
  union {
    std::uint8_t bytes[32];
    std::int16_t sums[16];
  };
};

inline Codes zero() { return {}; }

inline Codes spread(std::uint32_t pair) {
  Codes out;
  for (int i = 0; i < 32; ++i) out.bytes[i] = static_cast<std::uint8_t>(pair >> i % 2 * 8);
  return out;
}

template <int kBits>
Codes unpack(const std::byte* packet, int i) {
  Codes out;
  for (int lane = 0; lane < 32; ++lane) {
    if constexpr (kBits == 3) {
      const unsigned low = std::to_integer<unsigned>(packet[i / 4 * 32 + lane]) >> i % 4 * 2 & 3;
      const unsigned top = std::to_integer<unsigned>(packet[64 + lane]) >> i & 1;
      out.bytes[lane] = static_cast<std::uint8_t>(low | top << 2);
    } else {
      constexpr int kPer = 8 / kBits;
      const unsigned in = std::to_integer<unsigned>(packet[i / kPer * 32 + lane]);
      out.bytes[lane] = static_cast<std::uint8_t>(in >> i % kPer * kBits & ((1 << kBits) - 1));
    }
  }
  return out;
}

inline Codes add_products(Codes sum, const Codes& a, const Codes& b) {
  for (int i = 0; i < 16; ++i) {
    const int products = a.bytes[2 * i] * static_cast<std::int8_t>(b.bytes[2 * i]) +
                         a.bytes[2 * i + 1] * static_cast<std::int8_t>(b.bytes[2 * i + 1]);
    sum.sums[i] = static_cast<std::int16_t>(sum.sums[i] + products);
  }
  return sum;
}

inline void widen_add(i32x8* out, const Codes& sum) {
  for (int i = 0; i < 16; ++i) out[i / 8][i % 8] += sum.sums[i];
}

inline void pack_pairs(std::uint32_t* pairs, const i32x8 (&bytes)[4]) {
  for (int i = 0; i < 16; ++i) {
    const std::int32_t low = bytes[i / 4][i % 4 * 2], high = bytes[i / 4][i % 4 * 2 + 1];
    pairs[i] = static_cast<std::uint32_t>(low | high << 8) * 0x10001u;
  }
}

#endif

// dots[h][j] = sum over dimensions of q_h u_j, for 32 tokens. A 16-bit sum of n packets holds at
// most n * 8 * 127 * (2^b - 1): 4 packets of 3 bits, or 2 of 4 bits, are sure to fit.
template <int kBits, int kN>
void key_dots(i32x8 (*dots)[4], const GhostQuery* q, const std::byte* codes, int n_packets) {
  constexpr int kPackets = kBits == 4 ? 2 : 4;
  for (int first = 0; first < n_packets; first += kPackets) {
    Codes sum[kN][2];
    for (auto& s : sum) s[0] = s[1] = zero();
    const int last = std::min(first + kPackets, n_packets);
    for (int packet = first; packet < last; ++packet) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        const Codes u = unpack<kBits>(codes + packet * 32 * kBits, i);
#pragma GCC unroll 4
        for (int h = 0; h < kN; ++h)
          sum[h][i % 2] = add_products(sum[h][i % 2], u, spread(q[h].pairs[packet * 4 + i / 2]));
      }
    }
    for (int h = 0; h < kN; ++h) widen_add(dots[h], sum[h][0]), widen_add(dots[h] + 2, sum[h][1]);
  }
}

inline void Weights::pack(const i32x8 (&w)[kGhostGroup / 8]) { pack_pairs(pairs, w); }

// sums[h][i] = sum over 32 tokens of w_h u_i for 16 dimensions, w 8 bits: a 16-bit sum holds at
// most 2 * 255 * (2^b - 1) a pair of tokens, so all 16 pairs of 2 bits, or 4 of 4 bits.
template <int kBits, int kN>
void value_sums(i32x8 (*sums)[2], const Weights* weights, const std::byte* codes) {
  constexpr int kPairs = kBits == 4 ? 4 : 16, kStep = 8 / kBits;
  for (int first = 0; first < kGhostGroup / 2; first += kPairs) {
    Codes sum[kN];
    for (Codes& s : sum) s = zero();
#pragma GCC unroll 1  // or all weights are spread, and spilled, beforehand
    for (int at = first; at < first + kPairs; at += kStep) {
#pragma GCC unroll 8
      for (int i = 0; i < kStep; ++i) {
        const Codes u = unpack<kBits>(codes + at * 4 * kBits, i);
#pragma GCC unroll 4
        for (int h = 0; h < kN; ++h)
          sum[h] = add_products(sum[h], spread(weights[h].pairs[at + i]), u);
      }
    }
    for (int h = 0; h < kN; ++h) widen_add(sums[h], sum[h]);
  }
}

#endif

}  // namespace thaw::ghost_sums
