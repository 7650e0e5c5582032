// What a policy learns from a prompt: the attention of its last rows, over every token. Scores are
// computed twice, and none is kept: first for the softmax of each query, then for what a token gets
// of all of them.
#pragma once

#include "attention/tile_cuda.cuh"

namespace thaw {

// Queries of a k/v head are numbered from the first asked row on, row by row.
struct StatsProblem : ExactProblem {
  struct Total {
    float m, inverse, entropy;  // of a query's softmax; inverse: of l
  };
  int stats_rows, n_kv_heads, lane_heads;
  Parts parts;          // k/v head x query
  Total* totals;        // likewise
  unsigned* n_arrived;  // k/v head x chunk

  __host__ __device__ int n_asked() const { return stats_rows * group; }  // of a k/v head
  __device__ int first_asked() const { return (n_rows - stats_rows) * group; }
  __device__ int last_visible(int kv_len, int query) const {
    return visible(kv_len, first_asked() + query);
  }
};

// The splits' states in order.
__device__ inline void join_query_states(const StatsProblem& p, int query) {
  PowerState all;
  for (int s = 0; s < p.parts.n_splits; ++s) all.m = fmaxf(all.m, p.parts.state(query, s).m);
  for (int s = 0; s < p.parts.n_splits; ++s) {
    const PowerState part = p.parts.state(query, s);
    const float weight = power(part.m, all.m);
    all.l += weight * part.l, all.ps += weight * part.ps;
  }
  p.totals[query] = {all.m, 1.0f / all.l, all.entropy()};
}

// Floats of shared memory of both kernels: kTiledQueries queries, a tile of keys, a sum a thread.
inline int stats_shared(int head_dim) {
  return kTiledQueries * head_dim + kTiledRows * tile_stride(head_dim) + 2 * kTiledThreads;
}

// Computes  m, l and the entropy of up to kTiledQueries asked queries of a k/v head
// Grid      splits of the tokens x k/v heads x chunks of queries
// Block     kTiledThreads; a tile of keys at a time, a warp for two queries, a lane for a token
// Shared    stats_shared()
// Bytes     reads the keys that the queries see once a chunk; writes 3 numbers a query and split
template <KvType kType>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) attend_asked_rows(StatsProblem p) {
  float *q = dynamic_shared<float>(), *keys = q + kTiledQueries * p.head_dim;
  const int kv_head = static_cast<int>(blockIdx.y), split = static_cast<int>(blockIdx.x);
  const int first = static_cast<int>(blockIdx.z) * kTiledQueries;
  const int n_queries = min(kTiledQueries, p.n_asked() - first);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len;
  const Share share = share_of(p.last_visible(kv_len, first + n_queries - 1), kTiledRows, split,
                               static_cast<int>(gridDim.x));
  load_query_tile(q, p, kv_head, p.first_asked() + first, n_queries);
  PowerState state[2];
  for (int token = share.begin; token < share.end; token += kTiledRows) {
    load_row_tile<kType>(keys, p.head_dim, min(kTiledRows, share.end - token),
                         [&](int i) { return p.kv.rows.key(kv_head, token + i); });
    __syncthreads();  // the tile, and at first the queries, are there
    float s[2];
    score_row_tile(s, keys, q, p.head_dim, n_queries);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = warp_index() + i * kTiledWarps;
      const bool sees =
          query < n_queries && token + lane_index() < p.last_visible(kv_len, first + query);
      if (!sees) s[i] = kLowest;
      state[i].absorb(s[i]);
    }
    __syncthreads();  // the tile is read: the next overwrites it
  }
  const int base = kv_head * p.n_asked() + first;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = warp_index() + i * kTiledWarps;
    if (query < n_queries && lane_index() == 0) p.parts.set_state(base + query, split, state[i]);
  }
  if (last_to_arrive(p.n_arrived + blockIdx.y * gridDim.z + blockIdx.z, gridDim.x) &&
      static_cast<int>(threadIdx.x) < n_queries)
    join_query_states(p, base + static_cast<int>(threadIdx.x));
}

// What the token of this lane gets from this warp's queries of a k/v head; `tile` is its keys'.
struct TokenSums {
  float probability = 0, magnitude = 0;

  __device__ void add_head(const StatsProblem& p, float* q, const float* keys, int kv_head,
                           int kv_len, int token) {
    for (int first = 0; first < p.n_asked(); first += kTiledQueries) {
      const int n_queries = min(kTiledQueries, p.n_asked() - first);
      load_query_tile(q, p, kv_head, p.first_asked() + first, n_queries);
      __syncthreads();  // the queries, and at first the keys, are there
      float s[2];
      score_row_tile(s, keys, q, p.head_dim, n_queries);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int query = first + warp_index() + i * kTiledWarps;
        if (query >= p.n_asked() || token >= p.last_visible(kv_len, query)) continue;
        const StatsProblem::Total& total = p.totals[kv_head * p.n_asked() + query];
        probability += power(s[i], total.m) * total.inverse;
        magnitude += fabsf(s[i]);
      }
      __syncthreads();  // queries and keys are read: the next overwrite them
    }
  }
};

// Computes  the mean probability of each token over the asked rows and a lane's query heads,
//           likewise relevance where it is asked for, and the lane's mean entropy
// Grid      splits of the tokens x lanes
// Block     kTiledThreads; a tile of keys at a time, a warp for two queries, a lane for a token
// Shared    stats_shared()
// Bytes     reads all keys once, and the asked queries once a tile; writes statistics
template <KvType kType>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) sum_token_stats(StatsProblem p) {
  float *q = dynamic_shared<float>(), *keys = q + kTiledQueries * p.head_dim;
  float* sums = keys + kTiledRows * tile_stride(p.head_dim);  // {probability, |s|} x thread
  const int lane = static_cast<int>(blockIdx.y), thread = static_cast<int>(threadIdx.x);
  const int n_queries = p.lane_heads * p.n_asked();
  const float mean = 1.0f / static_cast<float>(n_queries);
  const DeviceStats& stats = p.kv.stats;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len;
  const Share share =
      share_of(kv_len, kTiledRows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  for (int first = share.begin; first < share.end; first += kTiledRows) {
    TokenSums token;
    for (int head = lane * p.lane_heads; head < (lane + 1) * p.lane_heads; ++head) {
      load_row_tile<kType>(keys, p.head_dim, min(kTiledRows, share.end - first),
                           [&](int i) { return p.kv.rows.key(head, first + i); });
      token.add_head(p, q, keys, head, kv_len, first + lane_index());
    }
    sums[thread] = token.probability, sums[kTiledThreads + thread] = token.magnitude;
    __syncthreads();  // all warps' sums are there
    if (warp_index() < 2 && first + thread % kWarp < share.end) {
      float sum = 0;
      for (int w = 0; w < kTiledWarps; ++w)
        sum += sums[warp_index() * kTiledThreads + w * kWarp + lane_index()];
      float* out = warp_index() == 0 ? stats.probability : stats.relevance;
      if (out != nullptr)
        out[static_cast<std::int64_t>(lane) * stats.stride + first + lane_index()] =
            mean * (warp_index() == 0 ? sum : kLn2 * sum);
    }
  }  // nobody writes the next tile's sums before add_head()'s barriers
  if (blockIdx.x != 0) return;
  float entropy = 0;
  for (int i = thread; i < n_queries; i += kTiledThreads)
    entropy += p.totals[lane * n_queries + i].entropy;
  entropy = block_sum(entropy);
  if (thread == 0) stats.entropy[lane] = mean * entropy;
}

}  // namespace thaw
