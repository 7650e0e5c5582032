// Attention of one decode step over two tiers, in three kernels that meet through scratch in device
// memory:
//   score_tiers    hot rows: scores, and a state with sums a split; scores of ghosts, and a state a
//                  split; all states together are the softmax's normaliser
//   answer_frozen  who is recalled; those rows, in place; the sum of the values of the ghosts that
//                  are left
//   finish_decode  all states together: o and statistics
// Where frozen tokens are mute, attend_hot stands for the first two. The definition is TieredDecode
// (attention/tiered_cpu.h). Here is what they are given, and how rows are attended; the kernels are
// in attention/score_cuda.cuh, attention/answers_cuda.cuh and attention/finish_cuda.cuh.
#pragma once

#include "attention/tile_cuda.cuh"

namespace thaw {

inline constexpr int kMaxRowSplits = 16;  // hot rows are few
inline constexpr int kMaxGhostSplits = 128;
inline constexpr int kMaxParts = kMaxRowSplits + 2 * kMaxGhostSplits;  // of a query head

// What the parts of a query head add up to. frozen: of l, that of tokens that are not hot.
struct HeadSum {
  static constexpr int kAtATime = 4;  // parts that are on their way before one is looked at
  PowerState all;
  float frozen = 0;

  // All are scaled to a new m, of at least the old one.
  __device__ void rise(float m) {
    const float kept = power(all.m, m);
    all.m = m, all.l *= kept, all.ps *= kept, frozen *= kept;
  }
  __device__ void add(const PowerState& part, float part_frozen) {
    const float weight = power(part.m, all.m);
    all.l = fmaf(weight, part.l, all.l), all.ps = fmaf(weight, part.ps, all.ps);
    frozen = fmaf(weight, part_frozen, frozen);
  }
  // Every `step`-th part from `first` on, of which the first n_hot are of hot tokens.
  template <class StateOf>
  __device__ void add_parts(int first, int step, int n_hot, int n, const StateOf& state_of) {
    for (; first < n; first += kAtATime * step) {
      PowerState part[kAtATime];
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) part[j] = state_of(min(first + j * step, n - 1));
      float m = all.m;
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) {
        if (first + j * step >= n || part[j].l == 0) part[j] = {};  // of no tokens
        m = fmaxf(m, part[j].m);
      }
      rise(m);
#pragma unroll
      for (int j = 0; j < kAtATime; ++j) add(part[j], first + j * step < n_hot ? 0.0f : part[j].l);
    }
  }
  // Of `threads` neighbours, a power of two.
  __device__ void join(int threads) {
    for (int apart = threads / 2; apart > 0; apart /= 2) {
      const PowerState other = {__shfl_xor_sync(kAllLanes, all.m, apart),
                                __shfl_xor_sync(kAllLanes, all.l, apart),
                                __shfl_xor_sync(kAllLanes, all.ps, apart)};
      const float other_frozen = __shfl_xor_sync(kAllLanes, frozen, apart);
      rise(fmaxf(all.m, other.m));
      add(other, other_frozen);
    }
  }
};

// use(i, sum) once for each of n heads, all of which are summed at the same time: neighbours share
// a head. state_of(i, part): of n_parts, the first n_hot of hot tokens. All threads call.
template <class StateOf, class Use>
__device__ inline void sum_heads(int n, int n_hot, int n_parts, const StateOf& state_of,
                                 const Use& use) {
  int threads = kWarp;  // of a head
  while (threads > 1 && threads * n > kTiledThreads) threads /= 2;
  const int thread = static_cast<int>(threadIdx.x), of_head = thread % threads;
  for (int base = 0; base < n; base += kTiledThreads / threads) {
    const int head = base + thread / threads, i = min(head, n - 1);
    HeadSum sum;
    sum.add_parts(of_head, threads, n_hot, n_parts, [&](int part) { return state_of(i, part); });
    sum.join(threads);
    if (head < n && of_head == 0) use(head, sum);
  }
}

struct TieredProblem : ExactProblem {
  int n_kv_heads;
  float* hot_scores;       // query head x kv.hot.room, by row
  float* ghost_noise;      // query head: standard deviation of what follows
  float* ghost_scores;     // query head x ghost_stride, by token; kLowest where the token is hot
  int ghost_stride;        // a multiple of GhostRope::kSpan
  Parts hot, recalled;     // exact rows, by split of the hot rows, and of the ghosts
  Parts scored, answered;  // ghosts before the recall, without sums; and after it, in rotated space
  int n_teams;             // of answer_frozen, see AnswerLayout
  int recalled_stride;     // most tokens of a split that can be recalled
  float* recalled_scores;  // query head x split x recalled_stride
  std::int32_t *recalled_tokens, *n_recalled;  // k/v head x chunk x split (x recalled_stride)

  __host__ __device__ int n_lanes() const { return kv.hot.n_lanes; }
  __host__ __device__ int lane_queries() const { return kv.hot.lane_heads * group; }
  __device__ bool has_ghosts() const { return kv.ghosts.format.present(); }
  __device__ int n_ghosts(int kv_len) const {
    return has_ghosts() && kv_len >= kv.ghosts.centre_tokens ? kv_len : 0;
  }
  // Splits that have any hot rows of a lane, or any ghosts: those behind them have none.
  __device__ int hot_splits(int lane) const {
    return n_shares(kv.hot.n_rows[lane], kTiledRows, hot.n_splits);
  }
  __device__ int ghost_splits(int kv_len) const {
    return n_shares(n_ghosts(kv_len), GhostRope::kSpan, scored.n_splits);
  }
  __host__ __device__ int n_chunks() const { return (group + kTiledQueries - 1) / kTiledQueries; }
  __device__ int recalled_at(int kv_head, int chunk, int split) const {
    return (kv_head * n_chunks() + chunk) * scored.n_splits + split;
  }
};

// Up to kTiledQueries queries of a k/v head, which a block works on.
struct QueryChunk {
  int kv_head, lane, first, n, head;  // head: query head of the first

  __device__ explicit QueryChunk(const TieredProblem& p)
      : kv_head(static_cast<int>(blockIdx.x)),
        lane(kv_head / p.kv.hot.lane_heads),
        first(static_cast<int>(blockIdx.z) * kTiledQueries),
        n(min(kTiledQueries, p.group - first)),
        head(kv_head * p.group + first) {}
};

// Where the parts of attend_rows() lie in shared memory; numbers of floats.
struct RowTileLayout {
  int q, keys, values, weights, kept, sums, total;

  __host__ __device__ explicit RowTileLayout(int head_dim)
      : q(0),
        keys(q + kTiledQueries * head_dim),
        values(keys + kTiledRows * tile_stride(head_dim)),
        weights(values + kTiledRows * tile_stride(head_dim)),
        kept(weights + kTiledRows * kTiledQueries),
        sums(kept + kTiledQueries),
        total(sums + kTiledQueries * head_dim) {}
};

// sums[query][d] = sums * kept + sum over rows of weights[row][query] values[row][d]; a thread has
// four queries of a dimension, always the same ones.
__device__ inline void add_row_values(float* shared, const RowTileLayout& at, int head_dim,
                                      int n_rows, int n_queries) {
  const int n_tasks = (n_queries + 3) / 4 * head_dim;
  for (int task = static_cast<int>(threadIdx.x); task < n_tasks; task += kTiledThreads) {
    const int d = task % head_dim, first = task / head_dim * 4;
    float* sum = shared + at.sums + first * head_dim + d;
    const float* kept = shared + at.kept + first;
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = sum[i * head_dim] * kept[i];
    for (int row = 0; row < n_rows; ++row) {
      const float value = shared[at.values + row * tile_stride(head_dim) + d];
      const auto w =
          *reinterpret_cast<const float4*>(shared + at.weights + row * kTiledQueries + first);
      x[0] = fmaf(w.x, value, x[0]), x[1] = fmaf(w.y, value, x[1]);
      x[2] = fmaf(w.z, value, x[2]), x[3] = fmaf(w.w, value, x[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i * head_dim] = x[i];
  }
}

// Scores a tile, keeps the scores, and turns them into weights. n_rows: rows of the tile; scores:
// of its first row and the chunk's first query.
__device__ inline void weigh_row_tile(PowerState (&state)[2], float* shared,
                                      const RowTileLayout& at, int head_dim, int n_rows,
                                      int n_queries, float* scores, int stride) {
  float s[2];
  score_row_tile(s, shared + at.keys, shared + at.q, head_dim, n_queries);
  const int row = lane_index();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = warp_index() + i * kTiledWarps;
    const bool exists = row < n_rows && query < n_queries;
    if (exists) scores[static_cast<std::int64_t>(query) * stride + row] = s[i];
    float weight = exists ? s[i] : kLowest;
    const float kept = state[i].absorb(weight);
    shared[at.weights + row * kTiledQueries + query] = weight;
    if (row == 0) shared[at.kept + query] = kept;
  }
}

template <KvType kType>
__device__ inline void store_tile_unit(float* to, const RowUnit<kType>& stored) {
  float x[kRowUnit];
  stored.values(x);
  reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
  reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
}

// Keys and values of n rows into two tiles, zeros behind them; key_at(i): the stored bytes of a
// key. A thread's loads are all on their way before one is waited for.
template <KvType kType, class KeyAt>
__device__ inline void load_tile_pair(float* keys, float* values, int head_dim, int n,
                                      std::size_t value_offset, const KeyAt& key_at) {
  constexpr int kAtATime = RowUnit<kType>::kWide ? 4 : 2;
  const int units = head_dim / kRowUnit;
  for (int base = static_cast<int>(threadIdx.x); base < kTiledRows * units;
       base += kAtATime * kTiledThreads) {
    RowUnit<kType> key[kAtATime] = {}, value[kAtATime] = {};  // 0 where there is no row
#pragma unroll
    for (int j = 0; j < kAtATime; ++j) {
      const int i = base + j * kTiledThreads;
      if (i / units >= n) continue;
      const std::byte* from = key_at(i / units);
      key[j].load(from, i % units), value[j].load(from + value_offset, i % units);
    }
#pragma unroll
    for (int j = 0; j < kAtATime; ++j) {
      const int i = base + j * kTiledThreads, row = i / units;
      if (row >= kTiledRows) continue;
      const int to = row * tile_stride(head_dim) + i % units * kRowUnit;
      store_tile_unit(keys + to, key[j]), store_tile_unit(values + to, value[j]);
    }
  }
}

// Attends rows [share.begin, share.end) exactly, a tile at a time, a warp for two queries, a lane
// for a row: their scores, and a part of `parts`, which is empty where there are none. key_at(i):
// the stored bytes of the key of row i. scores: of row 0 and the first query. All threads call.
template <KvType kType, class KeyAt>
__device__ inline void attend_rows(const TieredProblem& p, const QueryChunk& chunk, float* shared,
                                   const Share& share, std::size_t value_offset,
                                   const KeyAt& key_at, float* scores, int stride,
                                   const Parts& parts, int split) {
  const RowTileLayout at(p.head_dim);
  const bool any = share.begin < share.end;
  if (any) load_query_tile(shared + at.q, p, chunk.kv_head, chunk.first, chunk.n);
  for (int i = static_cast<int>(threadIdx.x); i < kTiledQueries * p.head_dim && any;
       i += kTiledThreads)
    shared[at.sums + i] = 0;
  PowerState state[2];
  for (int row = share.begin; row < share.end; row += kTiledRows) {
    const int n = min(kTiledRows, share.end - row);
    load_tile_pair<kType>(shared + at.keys, shared + at.values, p.head_dim, n, value_offset,
                          [&](int i) { return key_at(row + i); });
    __syncthreads();  // the tile, and at first the queries and zeros, are there
    weigh_row_tile(state, shared, at, p.head_dim, n, chunk.n, scores + row, stride);
    __syncthreads();  // all weights are there
    add_row_values(shared, at, p.head_dim, n, chunk.n);
    __syncthreads();  // the tile is read: the next overwrites it; and sums are complete
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = warp_index() + i * kTiledWarps;
    if (query < chunk.n && lane_index() == 0) parts.set_state(chunk.head + query, split, state[i]);
  }
  for (int i = static_cast<int>(threadIdx.x); i < chunk.n * p.head_dim && any; i += kTiledThreads)
    parts.of(chunk.head + i / p.head_dim, split)[i % p.head_dim] = shared[at.sums + i];
}

// The hot rows of a split.
template <KvType kType>
__device__ inline void attend_hot_rows(const TieredProblem& p, float* shared, int split) {
  const QueryChunk chunk(p);
  const DeviceRows rows = p.kv.hot.rows_of(chunk.lane);
  const int head = chunk.kv_head % p.kv.hot.lane_heads;
  const Share share = share_of(p.kv.hot.n_rows[chunk.lane], kTiledRows, split, p.hot.n_splits);
  attend_rows<kType>(
      p, chunk, shared, share, rows.value_offset, [&](int row) { return rows.key(head, row); },
      p.hot_scores + static_cast<std::int64_t>(chunk.head) * p.kv.hot.room, p.kv.hot.room, p.hot,
      split);
}

}  // namespace thaw
