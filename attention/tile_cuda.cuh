// Exact scores of a tile of stored rows, unpacked into shared memory, for a few queries of their
// k/v head: what hot rows, recalled rows and the statistics of a prompt have in common. A row is
// read once for all of the queries, whatever their number, from wherever it stands.
#pragma once

#include "attention/exact_cuda.cuh"
#include "kvstore/row_cuda.cuh"

namespace thaw {

inline constexpr int kTiledThreads = 128;
inline constexpr int kTiledBlocks = 4;   // on a multiprocessor, or registers are spilled for more
inline constexpr int kTiledRows = 32;    // of a tile: a lane has a row
inline constexpr int kTiledQueries = 8;  // most queries of a block: a warp has two, 4 apart
inline constexpr int kTiledWarps = kTiledThreads / kWarp;
inline constexpr float kLn2 = 0.693147180559945309f;  // scores are powers of two, entropies nats

// Numbers from a row of a tile to the next: an odd multiple of 16 bytes, so that eight lanes that
// read 16 bytes of a row each meet different banks.
__host__ __device__ constexpr int tile_stride(int head_dim) { return head_dim + 4; }

// Queries first .. first + n of a k/v head, times p.scale, into shared memory: n x head_dim.
__device__ inline void load_query_tile(float* out, const ExactProblem& p, int kv_head, int first,
                                       int n) {
  for (int i = static_cast<int>(threadIdx.x); i < n * p.head_dim; i += kTiledThreads)
    out[i] = p.q[p.at(kv_head, first + i / p.head_dim) + i % p.head_dim] * p.scale;
}

// row_at(i), the stored bytes of row i, for i < n; zeros from there on.
template <KvType kType, class RowAt>
__device__ inline void load_row_tile(float* out, int head_dim, int n, const RowAt& row_at) {
  const int units = head_dim / kRowUnit;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < kTiledRows * units; i += kTiledThreads) {
    const int row = i / units, unit = i % units;
    float x[kRowUnit] = {};
    if (row < n) {
      RowUnit<kType> stored;
      stored.load(row_at(row), unit);
      stored.values(x);
    }
    auto* to = reinterpret_cast<float4*>(out + row * tile_stride(head_dim) + unit * kRowUnit);
    to[0] = make_float4(x[0], x[1], x[2], x[3]);
    to[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
}

__device__ inline float add_product(float4 a, float4 b, float sum) {
  return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

__device__ inline void add_scaled(float4& sum, float4 x, float weight) {
  sum.x = fmaf(weight, x.x, sum.x), sum.y = fmaf(weight, x.y, sum.y);
  sum.z = fmaf(weight, x.z, sum.z), sum.w = fmaf(weight, x.w, sum.w);
}

// s[i] = the score of query warp + 4 i, where there is one, with the row of this lane.
__device__ inline void score_row_tile(float (&s)[2], const float* keys, const float* q,
                                      int head_dim, int n_queries) {
  const int first = warp_index(), second = first + kTiledWarps;
  const auto* key = reinterpret_cast<const float4*>(keys + lane_index() * tile_stride(head_dim));
  const auto* a = reinterpret_cast<const float4*>(q + first * head_dim);
  const auto* b = reinterpret_cast<const float4*>(q + second * head_dim);
  s[0] = s[1] = 0;
  if (first >= n_queries) return;
  if (second >= n_queries) b = a;
#pragma unroll 4
  for (int i = 0; i < head_dim / 4; ++i) {
    const float4 k = key[i];
    s[0] = add_product(a[i], k, s[0]);
    s[1] = add_product(b[i], k, s[1]);
  }
}

// The state of a softmax in powers of two, as SoftmaxState (attention/softmax_state.h): m, l, and
// the sum of p s, which entropies are made of.
struct PowerState {
  float m = kLowest, l = 0, ps = 0;

  // One more score a lane, for which `s` is its weight 2^(s - m) afterwards. All lanes of the warp
  // have the same state. Returns what older sums are to be multiplied by.
  __device__ float absorb(float& s) {
    const float peak = fmaxf(m, warp_max(s)), kept = power(m, peak), score = s;
    s = power(s, peak);
    m = peak;
    l = l * kept + warp_sum(s);
    ps = ps * kept + warp_sum(s > 0 ? s * score : 0.0f);
    return kept;
  }
  __device__ float entropy() const { return logf(l) + kLn2 * (m - ps / l); }
};

// States of splits with their sums, a split after another: query head x split x (n_sums sums, then
// m, l, ps and nothing). A split without tokens has no sums. n_sums is a multiple of 4.
struct Parts {
  float* all;  // at a multiple of 16
  int n_splits, n_sums;

  __host__ __device__ std::int64_t size(int n_heads) const {
    return std::int64_t{n_heads} * n_splits * (n_sums + 4);
  }
  __device__ float* of(int head, int split) const {
    return all + (static_cast<std::int64_t>(head) * n_splits + split) * (n_sums + 4);
  }
  __device__ PowerState state(int head, int split) const {
    const float4 x = __ldcg(reinterpret_cast<const float4*>(of(head, split) + n_sums));
    return {x.x, x.y, x.z};
  }
  __device__ void set_state(int head, int split, const PowerState& state) const {
    *reinterpret_cast<float4*>(of(head, split) + n_sums) =
        make_float4(state.m, state.l, state.ps, 0);
  }
};

// Where a split's share of n things, taken `step` at a time, begins and ends.
struct Share {
  int begin, end;
};
__device__ inline Share share_of(int n, int step, int split, int n_splits) {
  const int n_steps = (n + step - 1) / step;
  const int size = (n_steps + n_splits - 1) / n_splits * step;
  return {min(split * size, n), min(split * size + size, n)};
}
// Splits that have any of them; all others stand behind these.
__device__ inline int n_shares(int n, int step, int n_splits) {
  const int n_steps = (n + step - 1) / step, size = max(1, (n_steps + n_splits - 1) / n_splits);
  return (n_steps + size - 1) / size;
}

}  // namespace thaw
