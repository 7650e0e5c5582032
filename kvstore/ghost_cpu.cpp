// What attention computes from ghosts, on the CPU: sums of 8-bit integer products over a group of
// 32 tokens.
#include "device/codes_cpu.h"
#include "device/tile_cpu.h"
#include "kvstore/ghost.h"
#include "kvstore/ghost_sums_cpu.h"

namespace thaw {
namespace {

using namespace ghost_sums;

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
    most = larger(most, w[i]);
  }
  const float largest = max8(most);
  const float inverse = largest > 0 ? 255.0f / largest : 0.0f;
  i32x8 rounded[kGhostGroup / 8], sum = {};
  for (int i = 0; i < kGhostGroup / 8; ++i) {
    rounded[i] = __builtin_convertvector(w[i] * inverse + 0.5f, i32x8);
    sum += rounded[i];
  }
  out.pack(rounded);
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
