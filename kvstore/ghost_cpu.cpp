// What attention computes from ghosts, on the CPU: sums of 8-bit integer products over a group of
// 32 tokens. Codes are unpacked once for all queries of a KV head; integers are exact, so AVX2 and
// portable code give the same bits.
#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "device/codes_cpu.h"
#include "device/tile_cpu.h"
#include "kvstore/ghost.h"

namespace thaw {
namespace {

constexpr int kQueries = 4;  // queries that share an unpacking

#ifdef __AVX2__

using Codes = __m256i;  // 32 bytes, or 16 sums of 16 bits

Codes load(const std::byte* p) { return _mm256_loadu_si256(reinterpret_cast<const Codes*>(p)); }
Codes spread(std::uint32_t pair) { return _mm256_set1_epi32(static_cast<int>(pair)); }

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
Codes add_products(Codes sum, Codes a, Codes b) {
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
  keep(sum);
  return sum;
}

void widen_add(i32x8* out, Codes sum) {  // 16 sums
  out[0] += reinterpret_cast<i32x8>(_mm256_cvtepi16_epi32(_mm256_castsi256_si128(sum)));
  out[1] += reinterpret_cast<i32x8>(_mm256_cvtepi16_epi32(_mm256_extracti128_si256(sum, 1)));
}

Codes zero() { return _mm256_setzero_si256(); }

// pairs[i] = bytes 2 i and 2 i + 1 of 32, twice; the bytes are given as integers.
void pack_pairs(std::uint32_t* pairs, const i32x8 (&bytes)[4]) {
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

Codes zero() { return {}; }

Codes spread(std::uint32_t pair) {
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

Codes add_products(Codes sum, const Codes& a, const Codes& b) {
  for (int i = 0; i < 16; ++i) {
    const int products = a.bytes[2 * i] * static_cast<std::int8_t>(b.bytes[2 * i]) +
                         a.bytes[2 * i + 1] * static_cast<std::int8_t>(b.bytes[2 * i + 1]);
    sum.sums[i] = static_cast<std::int16_t>(sum.sums[i] + products);
  }
  return sum;
}

void widen_add(i32x8* out, const Codes& sum) {
  for (int i = 0; i < 16; ++i) out[i / 8][i % 8] += sum.sums[i];
}

void pack_pairs(std::uint32_t* pairs, const i32x8 (&bytes)[4]) {
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

// A group's weights, times the values' scales, rounded to 8 bits.
struct Weights {
  std::uint32_t pairs[kGhostGroup / 2];  // two of them in the low half, and again in the high one
  float unit, sum;                       // what 1 is worth; sum of all in units
};

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

template <int kBits, int kN>
void score_queries(float* scores, std::size_t stride, const GhostQuery* q, const std::byte* group,
                   const GhostFormat& f, float unit) {
  i32x8 dots[kN][kGhostGroup / 8] = {};
  key_dots<kBits, kN>(dots, q, group, f.padded_dim() / 8);
  float scales[kGhostGroup];
  widen_scales(scales, group + f.key_bytes() + f.value_bytes());
  for (int h = 0; h < kN; ++h) {
    const float scale = q[h].scale * unit, offset = q[h].offset;
    for (int j = 0; j < kGhostGroup; j += 8) {
      float* to = scores + h * stride + j;
      store8(to, load8(to) + scale * load8(scales + j) * (to_float(dots[h][j / 8]) + offset));
    }
  }
}

void round_weights(Weights& out, const float* weights, const float* scales) {
  f32x8 w[kGhostGroup / 8], most = {};
  for (int i = 0; i < kGhostGroup / 8; ++i) {
    w[i] = load8(weights + 8 * i) * load8(scales + 8 * i);
    most = w[i] > most ? w[i] : most;
  }
  float largest = 0;
  for (int i = 0; i < 8; ++i) largest = most[i] > largest ? most[i] : largest;
  const float inverse = largest > 0 ? 255.0f / largest : 0.0f;
  i32x8 rounded[kGhostGroup / 8], sum = {};
  for (int i = 0; i < kGhostGroup / 8; ++i) {
    rounded[i] = __builtin_convertvector(w[i] * inverse + 0.5f, i32x8);
    sum += rounded[i];
  }
  pack_pairs(out.pairs, rounded);
  out.unit = largest / 255.0f;
  out.sum = sum8(to_float(sum));
}

template <int kBits, int kN>
void sum_queries(float* out, std::size_t stride, const float* weights, std::size_t weight_stride,
                 const std::byte* group, const GhostFormat& f, float value_unit) {
  const std::byte* values = group + f.key_bytes();
  float scales[kGhostGroup];
  widen_scales(scales, values + f.value_bytes() + f.scale_bytes());
  Weights w[kN];
  float unit[kN], offset[kN], any = 0;
  for (int h = 0; h < kN; ++h) {
    round_weights(w[h], weights + h * weight_stride, scales);
    unit[h] = value_unit * w[h].unit;
    offset[h] = -unit[h] * (0.5f * (1 << kBits) - 0.5f) * w[h].sum;
    any += unit[h];
  }
  if (any == 0) return;
  for (int dim = 0; dim < f.padded_dim(); dim += 16) {
    i32x8 sums[kN][2] = {};
    value_sums<kBits, kN>(sums, w, values + dim * 4 * kBits);
    for (int h = 0; h < kN; ++h)
      for (int half = 0; half < 2; ++half) {
        float* to = out + h * stride + dim + half * 8;
        store8(to, load8(to) + unit[h] * to_float(sums[h][half]) + offset[h]);
      }
  }
}

// Calls f.operator()<bits, n>() for 1 to 4 bits and n queries.
template <int kBits, class F>
void with_queries(int n, const F& f) {
  switch (n) {
    case 1:
      return f.template operator()<kBits, 1>();
    case 2:
      return f.template operator()<kBits, 2>();
    case 3:
      return f.template operator()<kBits, 3>();
    default:
      return f.template operator()<kBits, kQueries>();
  }
}

}  // namespace

void score_ghosts(float* scores, std::size_t stride, const GhostQuery* q, int n_queries,
                  const std::byte* group, const GhostFormat& f, float key_unit) {
  for (; n_queries > 0; n_queries -= kQueries, q += kQueries, scores += kQueries * stride) {
    const auto run = [&]<int kBits, int kN>() {
      score_queries<kBits, kN>(scores, stride, q, group, f, key_unit);
    };
    switch (f.key_bits) {
      case 1:
        with_queries<1>(n_queries, run);
        break;
      case 2:
        with_queries<2>(n_queries, run);
        break;
      case 3:
        with_queries<3>(n_queries, run);
        break;
      default:
        with_queries<4>(n_queries, run);
    }
  }
}

void sum_ghosts(float* out, std::size_t stride, const float* weights, std::size_t weight_stride,
                int n_queries, const std::byte* group, const GhostFormat& f, float value_unit) {
  for (; n_queries > 0;
       n_queries -= kQueries, out += kQueries * stride, weights += kQueries * weight_stride) {
    const auto run = [&]<int kBits, int kN>() {
      sum_queries<kBits, kN>(out, stride, weights, weight_stride, group, f, value_unit);
    };
    switch (f.value_bits) {
      case 0:
        return;
      case 1:
        with_queries<1>(n_queries, run);
        break;
      case 2:
        with_queries<2>(n_queries, run);
        break;
      default:
        with_queries<4>(n_queries, run);
    }
  }
}

}  // namespace thaw
