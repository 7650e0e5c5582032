// Attention of one decode step over two tiers, in five kernels; kernels that follow each other meet
// through scratch in device memory:
//   attend_rows    hot rows: scores, and a state a split
//   score_ghosts   the same of ghosts; all states together are the softmax's normaliser
//   answer_ghosts  who is recalled, and the sum of the values of the ghosts that are left
//   attend_rows    the recalled rows, in place
//   finish_decode  all states together: o and statistics
// Where frozen tokens are mute, there are the first and the last only. The definition is
// TieredDecode (attention/tiered_cpu.h). Here is what they are given, and attend_rows; the others
// are in attention/ghosts_cuda.cuh, attention/answers_cuda.cuh and attention/finish_cuda.cuh.
#pragma once

#include "attention/tile_cuda.cuh"

namespace thaw {

// Rows that are attended exactly: those of the hot tier, or recalled ones.
struct RowSet {
  float* scores;  // query head x stride, by row
  int stride;
  Parts parts;
};

inline constexpr int kMaxRowSplits = 16;  // hot rows, and recalled ones, are few
inline constexpr int kMaxGhostSplits = 128;

// The states of n parts of a head, a few a lane, all of which are on their way before one is looked
// at. Where a lane has fewer, the others are of no tokens.
struct LaneStates {
  static constexpr int kEach = (2 * kMaxRowSplits + kMaxGhostSplits + kWarp - 1) / kWarp;
  PowerState of[kEach];

  template <class StateOf>
  __device__ LaneStates(int n, const StateOf& state_of) {
#pragma unroll
    for (int j = 0; j < kEach; ++j) of[j] = state_of(min(lane_index() + j * kWarp, n - 1));
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (lane_index() + j * kWarp >= n) of[j] = {};
  }
  __device__ float peak() const {  // of the warp
    float m = kLowest;
#pragma unroll
    for (const PowerState& part : of)
      if (part.l > 0) m = fmaxf(m, part.m);
    return warp_max(m);
  }
};

struct TieredProblem : ExactProblem {
  int n_kv_heads;
  RowSet hot, recalled;
  float* ghost_scores;     // query head x ghost_stride, by token; kLowest where the token is hot
  int ghost_stride;        // a multiple of GhostRope::kSpan
  Parts scored, answered;  // ghosts before the recall, without sums; and after it, in rotated space
  std::uint32_t* recalled_mask;  // lane x ghost_stride / 32, as DeviceHot::mask
  unsigned* n_gathered;          // lane: blocks that have come

  __host__ __device__ int n_lanes() const { return kv.hot.n_lanes; }
  __host__ __device__ int lane_queries() const { return kv.hot.lane_heads * group; }
  __device__ bool has_ghosts() const { return kv.ghosts.format.present(); }
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

// Computes  scores of up to kTiledQueries queries of a k/v head with its lane's hot rows, or with
//           the tokens that were recalled for it; a softmax state with its sums a split
// Grid      splits of the rows x k/v heads x chunks of queries
// Block     kTiledThreads; a tile of rows at a time, a warp for two queries, a lane for a row
// Shared    RowTileLayout: the queries, a tile of keys and values, weights, sums
// Bytes     reads the rows' keys and values once a chunk, recalled ones over the bus; writes a
//           score a query and row
template <KvType kType>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks)
    attend_rows(TieredProblem p, bool recalled) {
  const RowTileLayout at(p.head_dim);
  float* shared = dynamic_shared<float>();
  const int kv_head = static_cast<int>(blockIdx.y), lane = kv_head / p.kv.hot.lane_heads;
  const int first = static_cast<int>(blockIdx.z) * kTiledQueries;
  const int n_queries = min(kTiledQueries, p.group - first), head = kv_head * p.group + first;
  const RowSet& set = recalled ? p.recalled : p.hot;
  const DeviceRows rows = recalled ? p.kv.rows : p.kv.hot.rows_of(lane);
  const std::int32_t* list =
      p.kv.stats.recalled + static_cast<std::int64_t>(lane) * p.kv.stats.recalled_room;
  const int row_head = recalled ? kv_head : kv_head % p.kv.hot.lane_heads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int n_rows = recalled ? p.kv.stats.n_recalled[lane] : p.kv.hot.n_rows[lane];
  const Share share =
      share_of(n_rows, kTiledRows, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));

  if (share.begin < share.end) load_query_tile(shared + at.q, p, kv_head, first, n_queries);
  for (int i = static_cast<int>(threadIdx.x); i < kTiledQueries * p.head_dim; i += kTiledThreads)
    shared[at.sums + i] = 0;
  PowerState state[2];
  for (int row = share.begin; row < share.end; row += kTiledRows) {
    const int n = min(kTiledRows, share.end - row);
    const auto key = [&](int i) { return rows.key(row_head, recalled ? list[row + i] : row + i); };
    load_row_tile<kType>(shared + at.keys, p.head_dim, n, key);
    load_row_tile<kType>(shared + at.values, p.head_dim, n,
                         [&](int i) { return key(i) + rows.value_offset; });
    __syncthreads();  // the tile, and at first the queries and zeros, are there
    weigh_row_tile(state, shared, at, p.head_dim, n, n_queries,
                   set.scores + static_cast<std::int64_t>(head) * set.stride + row, set.stride);
    __syncthreads();  // all weights are there
    add_row_values(shared, at, p.head_dim, n, n_queries);
    __syncthreads();  // the tile is read: the next overwrites it; and sums are complete
  }
  const int split = static_cast<int>(blockIdx.x);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int query = warp_index() + i * kTiledWarps;
    if (query < n_queries && lane_index() == 0) set.parts.set_state(head + query, split, state[i]);
  }
  if (share.begin >= share.end) return;
  for (int i = static_cast<int>(threadIdx.x); i < n_queries * p.head_dim; i += kTiledThreads)
    set.parts.of(head + i / p.head_dim, split)[i % p.head_dim] = shared[at.sums + i];
}

}  // namespace thaw
