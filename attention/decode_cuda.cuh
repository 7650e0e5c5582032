// Attention of a few queries: what decoding spends its time on when the context is long. Tokens are
// split between blocks, and the last block of a head to finish joins their states in order
// (FlashAttention, 2205.14135; Flash-Decoding splits the tokens).
#pragma once

#include "attention/exact_cuda.cuh"
#include "kvstore/row_cuda.cuh"

namespace thaw {

inline constexpr int kDecodeThreads = 128;
inline constexpr int kMaxSplits = 128;
inline constexpr int kMinSpan = 64;  // tokens of a split: fewer take less time than joining them
// Blocks of a multiprocessor at the same time: they leave registers for the next kernel's, which
// then has its weights on the way.
inline constexpr int kDecodeBlocks = 2;

struct DecodeProblem : ExactProblem {
  float* sums;          // k/v head x query x split: head_dim numbers
  float2* states;       // the same: m and l
  unsigned* n_arrived;  // chunk x k/v head: blocks that are done; 0 before and after

  __device__ std::int64_t part(int kv_head, int query, int split) const {
    const std::int64_t i = static_cast<std::int64_t>(kv_head) * n_queries() + query;
    return i * static_cast<int>(gridDim.x) + split;
  }
};

// The state of kQ queries in kRowUnit numbers of their heads; a team of lanes has the whole heads.
template <int kQ>
struct DecodeState {
  float m[kQ], l[kQ], o[kQ][kRowUnit];

  __device__ void reset() {
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      m[i] = kLowest, l[i] = 0;
      for (float& x : o[i]) x = 0;
    }
  }

  // Where join_teams() expects them.
  template <int kLanes>
  __device__ void store() const {
    constexpr int kTeams = kDecodeThreads / kLanes, kDim = kLanes * kRowUnit;
    float* sums = dynamic_shared<float>();
    float* states = sums + kTeams * kQ * kDim;
    const int team = static_cast<int>(threadIdx.x) / kLanes;
    const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int i = 0; i < kQ; ++i) {
      if (lane == 0) states[(team * kQ + i) * 2] = m[i];
      if (lane == 0) states[(team * kQ + i) * 2 + 1] = l[i];
#pragma unroll
      for (int j = 0; j < kRowUnit; ++j)
        sums[(team * kQ + i) * kDim + lane * kRowUnit + j] = o[i][j];
    }
  }
};

// The tokens that a block takes, kTurn at a time: the first n_splits blocks have some.
struct DecodeSplit {
  int n_splits, begin, end;

  __device__ DecodeSplit(int kv_len, int turn) {
    const int max_splits = static_cast<int>(gridDim.x);
    const int least = max((kv_len + max_splits - 1) / max_splits, kMinSpan);
    const int span = (least + turn - 1) / turn * turn;
    n_splits = (kv_len + span - 1) / span;
    begin = static_cast<int>(blockIdx.x) * span, end = min(begin + span, kv_len);
  }
};

template <int kQ>
__device__ inline void load_queries(float (&q)[kQ][kRowUnit], const DecodeProblem& p, int kv_head,
                                    int first, int unit) {
#pragma unroll
  for (int i = 0; i < kQ; ++i) {
    const bool exists = first + i < p.n_queries() && unit * kRowUnit < p.head_dim;
    const float* from = exists ? p.q + p.at(kv_head, first + i) + unit * kRowUnit : p.q;
#pragma unroll
    for (int j = 0; j < kRowUnit; ++j) q[i][j] = exists ? from[j] * p.scale : 0.0f;
  }
}

// One query and kBatch tokens from `token`: scores, and the state after them.
template <KvType kType, int kLanes, int kQ, int kBatch>
__device__ inline void absorb(DecodeState<kQ>& state, int i, const float (&q)[kRowUnit],
                              const RowUnit<kType> (&k)[kBatch], const RowUnit<kType> (&v)[kBatch],
                              int n_seen) {
  float s[kBatch], m = state.m[i];
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    float x[kRowUnit], sum = 0;
    k[b].values(x);
#pragma unroll
    for (int j = 0; j < kRowUnit; ++j) sum = fmaf(q[j], x[j], sum);
    sum = warp_sum<kLanes>(sum);
    s[b] = b < n_seen ? sum : kLowest;
    m = fmaxf(m, s[b]);
  }
  const float kept = power(state.m[i], m);
  state.m[i] = m;
  state.l[i] *= kept;
#pragma unroll
  for (int j = 0; j < kRowUnit; ++j) state.o[i][j] *= kept;
#pragma unroll
  for (int b = 0; b < kBatch; ++b) {
    const float weight = power(s[b], m);
    float x[kRowUnit];
    v[b].values(x);
    state.l[i] += weight;
#pragma unroll
    for (int j = 0; j < kRowUnit; ++j) state.o[i][j] = fmaf(weight, x[j], state.o[i][j]);
  }
}

// Floats that join_teams() reads: team x kQ x kDim sums, then team x kQ x {m, l}.
template <int kTeams, int kQ, int kDim>
constexpr std::size_t kJoinShared = sizeof(float) * kTeams* kQ*(kDim + 2);

// Joins the teams of a block, whose sums and states stand in shared memory: queries' sums and
// states into their part, or o where nothing is split.
template <int kTeams, int kQ, int kDim>
__device__ void join_teams(const DecodeProblem& p, int kv_head, int first, int n_splits) {
  const float* sums = dynamic_shared<float>();
  const float* states = sums + kTeams * kQ * kDim;
  __syncthreads();  // all states and sums are there
  for (int n = static_cast<int>(threadIdx.x); n < kQ * p.head_dim; n += kDecodeThreads) {
    const int i = n / p.head_dim, d = n % p.head_dim, query = first + i;
    if (query >= p.n_queries()) break;
    float m = kLowest, l = 0, sum = 0;
    for (int t = 0; t < kTeams; ++t) m = fmaxf(m, states[(t * kQ + i) * 2]);
    for (int t = 0; t < kTeams; ++t) {
      const float weight = power(states[(t * kQ + i) * 2], m);
      l += weight * states[(t * kQ + i) * 2 + 1];
      sum += weight * sums[(t * kQ + i) * kDim + d];
    }
    if (n_splits == 1) {
      p.o[p.at(kv_head, query) + d] = sum / l;
      continue;
    }
    const std::int64_t part = p.part(kv_head, query, static_cast<int>(blockIdx.x));
    p.sums[part * p.head_dim + d] = sum;
    if (d == 0) p.states[part] = make_float2(m, l);
  }
}

// weights[split] = what a query's sums of each split are to be multiplied by; a warp calls.
__device__ inline void weigh_splits(float* weights, const float2* states, int n_splits) {
  float2 mine[kMaxSplits / kWarp];
  float m = kLowest, l = 0;
#pragma unroll
  for (int j = 0; j < kMaxSplits / kWarp; ++j) {
    const int split = j * kWarp + lane_index();
    mine[j] = split < n_splits ? __ldcg(states + split) : make_float2(kLowest, 0);
    m = fmaxf(m, mine[j].x);
  }
  m = warp_max(m);
#pragma unroll
  for (int j = 0; j < kMaxSplits / kWarp; ++j)
    mine[j].x = power(mine[j].x, m), l += mine[j].x * mine[j].y;
  const float inverse = 1 / warp_sum(l);
#pragma unroll
  for (int j = 0; j < kMaxSplits / kWarp; ++j) {
    const int split = j * kWarp + lane_index();
    if (split < n_splits) weights[split] = mine[j].x * inverse;
  }
}

// Joins the first n_splits splits, which are those that have tokens, once these have arrived.
template <int kQ>
__device__ void join_splits(const DecodeProblem& p, int kv_head, int first, int n_splits) {
  if (!last_to_arrive(p.n_arrived + blockIdx.z * gridDim.y + blockIdx.y,
                      static_cast<unsigned>(n_splits)))
    return;
  float* weights = dynamic_shared<float>();  // kQ x n_splits
  const int n_queries = min(kQ, p.n_queries() - first), quads = p.head_dim / 4;
  for (int i = warp_index(); i < n_queries; i += kDecodeThreads / kWarp)
    weigh_splits(weights + i * n_splits, p.states + p.part(kv_head, first + i, 0), n_splits);
  __syncthreads();  // all weights are there
  for (int n = static_cast<int>(threadIdx.x); n < n_queries * quads; n += kDecodeThreads) {
    const int i = n / quads, d = n % quads * 4;
    const float* sums = p.sums + p.part(kv_head, first + i, 0) * p.head_dim + d;
    float4 o = make_float4(0, 0, 0, 0);
#pragma unroll 16
    for (int split = 0; split < n_splits; ++split) {
      const float4 x = __ldcg(reinterpret_cast<const float4*>(sums + split * p.head_dim));
      const float weight = weights[i * n_splits + split];
      o.x = fmaf(weight, x.x, o.x), o.y = fmaf(weight, x.y, o.y);
      o.z = fmaf(weight, x.z, o.z), o.w = fmaf(weight, x.w, o.w);
    }
    *reinterpret_cast<float4*>(p.o + p.at(kv_head, first + i) + d) = o;
  }
}

template <int kLanes, int kQ>
constexpr std::size_t kDecodeShared = kJoinShared<kDecodeThreads / kLanes, kQ, kLanes * kRowUnit>;

// Computes  o = softmax(q K^T / sqrt(head_dim)) V of kQ queries of a k/v head, each over the tokens
//           that it sees
// Grid      splits of the tokens x k/v heads x chunks of kQ queries
// Block     kDecodeThreads; teams of kLanes lanes (8 kLanes >= head_dim) take kBatch tokens in turn
// Shared    kDecodeShared<kLanes, kQ>: what teams join
// Bytes     reads keys and values once a chunk, and q; writes o; writes and reads head_dim + 2
//           numbers a query and split
template <KvType kType, int kLanes, int kQ>
__global__ void __launch_bounds__(kDecodeThreads, kQ == 8 ? kDecodeBlocks : kDecodeBlocks + 1)
    decode_attention(DecodeProblem p) {
  constexpr int kTeams = kDecodeThreads / kLanes;
  constexpr int kBatch = kQ == 8 || kType == KvType::kF32 ? 2 : 4;
  constexpr int kTurn = kTeams * kBatch;  // tokens of the block at a time
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, kv_head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(blockIdx.z) * kQ;
  const DecodeSplit split(kv_len, kTurn);
  if (split.begin >= split.end) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int unit =
      min(lane, p.head_dim / kRowUnit - 1);  // lanes beyond the head: its last, times 0

  float q[kQ][kRowUnit];
  load_queries(q, p, kv_head, first_query, lane);
  DecodeState<kQ> state;
  state.reset();
  for (int turn = split.begin; turn < split.end; turn += kTurn) {  // warps stay together
    const int token = turn + team * kBatch;
    const std::byte* key = p.kv.rows.key(kv_head, min(token, kv_len - 1));
    RowUnit<kType> k[kBatch] = {}, v[kBatch] = {};  // a batch stands in one page
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b >= split.end) continue;
      k[b].load(key + b * p.kv.rows.row_bytes, unit);
      v[b].load(key + b * p.kv.rows.row_bytes + p.kv.rows.value_offset, unit);
    }
#pragma unroll
    for (int i = 0; i < kQ; ++i)
      absorb<kType, kLanes>(state, i, q[i], k, v,
                            min(split.end, p.visible(kv_len, first_query + i)) - token);
  }
  state.template store<kLanes>();
  join_teams<kTeams, kQ, kLanes * kRowUnit>(p, kv_head, first_query, split.n_splits);
  if (split.n_splits > 1) join_splits<kQ>(p, kv_head, first_query, split.n_splits);
}

}  // namespace thaw
