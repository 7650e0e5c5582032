// Attention of a few queries: what decoding spends its time on when the context is long. Tokens are
// split between blocks, and the last block of a head to finish joins their states in order
// (FlashAttention, 2205.14135; Flash-Decoding splits the tokens).
#pragma once

#include "attention/exact_cuda.cuh"
#include "kvstore/row_cuda.cuh"

namespace thaw {

inline constexpr int kDecodeThreads = 128;

struct DecodeProblem : ExactProblem {
  float* parts;         // k/v head x query x split: head_dim sums, then m and l
  unsigned* n_arrived;  // chunk x k/v head: blocks that are done; 0 before and after

  __device__ float* part(int kv_head, int query, int split) const {
    const std::int64_t i = static_cast<std::int64_t>(kv_head) * n_queries() + query;
    return parts + (i * static_cast<int>(gridDim.x) + split) * (head_dim + 2);
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

// Joins the teams of a block: queries' sums, m and l into part(), or o where nothing is split.
template <int kLanes, int kQ>
__device__ void join_teams(const DecodeProblem& p, DecodeState<kQ>& state, int kv_head, int first) {
  constexpr int kTeams = kDecodeThreads / kLanes, kDim = kLanes * kRowUnit;
  float* sums = dynamic_shared<float>();      // team x kQ x kDim
  float* states = sums + kTeams * kQ * kDim;  // team x kQ x {m, l}
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
  for (int i = 0; i < kQ; ++i) {
    if (lane == 0) states[(team * kQ + i) * 2] = state.m[i];
    if (lane == 0) states[(team * kQ + i) * 2 + 1] = state.l[i];
#pragma unroll
    for (int j = 0; j < kRowUnit; ++j)
      sums[(team * kQ + i) * kDim + lane * kRowUnit + j] = state.o[i][j];
  }
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
    if (gridDim.x == 1) {
      p.o[p.at(kv_head, query) + d] = sum / l;
      continue;
    }
    float* part = p.part(kv_head, query, static_cast<int>(blockIdx.x));
    part[d] = sum;
    if (d == 0) part[p.head_dim] = m, part[p.head_dim + 1] = l;
  }
}

// Joins the splits in order, once all have arrived.
template <int kQ>
__device__ void join_splits(const DecodeProblem& p, int kv_head, int first) {
  if (!last_to_arrive(p.n_arrived + blockIdx.z * gridDim.y + blockIdx.y, gridDim.x)) return;
  const int n_splits = static_cast<int>(gridDim.x);
  for (int n = static_cast<int>(threadIdx.x); n < kQ * p.head_dim; n += kDecodeThreads) {
    const int query = first + n / p.head_dim, d = n % p.head_dim;
    if (query >= p.n_queries()) break;
    float m = kLowest, l = 0, sum = 0;
    for (int s = 0; s < n_splits; ++s) m = fmaxf(m, __ldcg(p.part(kv_head, query, s) + p.head_dim));
    for (int s = 0; s < n_splits; ++s) {
      const float* part = p.part(kv_head, query, s);
      const float weight = power(__ldcg(part + p.head_dim), m);
      l += weight * __ldcg(part + p.head_dim + 1);
      sum += weight * __ldcg(part + d);
    }
    p.o[p.at(kv_head, query) + d] = sum / l;
  }
}

template <int kLanes, int kQ>
constexpr std::size_t kDecodeShared =
    sizeof(float) * kQ * (kDecodeThreads * kRowUnit + kDecodeThreads / kLanes * 2);

// Computes  o = softmax(q K^T / sqrt(head_dim)) V of kQ queries of a k/v head, each over the tokens
//           that it sees
// Grid      splits of the tokens x k/v heads x chunks of kQ queries
// Block     kDecodeThreads; teams of kLanes lanes (8 kLanes >= head_dim) take kBatch tokens in turn
// Shared    kDecodeShared<kLanes, kQ>
// Bytes     reads keys and values once a chunk, and q; writes o; writes and reads a part of
//           head_dim + 2 numbers a query and split
template <KvType kType, int kLanes, int kQ>
__global__ void __launch_bounds__(kDecodeThreads) decode_attention(DecodeProblem p) {
  constexpr int kTeams = kDecodeThreads / kLanes;
  constexpr int kBatch = kQ == 8 || kType == KvType::kF32 ? 2 : 4;
  constexpr int kTurn = kTeams * kBatch;  // tokens of the block at a time
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, kv_head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(blockIdx.z) * kQ;
  const int n_splits = static_cast<int>(gridDim.x);
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int unit =
      min(lane, p.head_dim / kRowUnit - 1);  // lanes beyond the head: its last, times 0

  float q[kQ][kRowUnit];
  load_queries(q, p, kv_head, first_query, lane);
  DecodeState<kQ> state;
  state.reset();
  const int span = ((kv_len + n_splits - 1) / n_splits + kTurn - 1) / kTurn * kTurn;
  const int begin = static_cast<int>(blockIdx.x) * span, end = min(begin + span, kv_len);
  for (int turn = begin; turn < end; turn += kTurn) {  // all lanes of a warp stay together
    const int token = turn + team * kBatch;
    const std::byte* key = p.kv.rows.key(kv_head, min(token, kv_len - 1));
    RowUnit<kType> k[kBatch] = {}, v[kBatch] = {};  // a batch stands in one page
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (token + b >= end) continue;
      k[b].load(key + b * p.kv.rows.row_bytes, unit);
      v[b].load(key + b * p.kv.rows.row_bytes + p.kv.rows.value_offset, unit);
    }
#pragma unroll
    for (int i = 0; i < kQ; ++i)
      absorb<kType, kLanes>(state, i, q[i], k, v,
                            min(end, p.visible(kv_len, first_query + i)) - token);
  }
  join_teams<kLanes>(p, state, kv_head, first_query);
  if (n_splits > 1) join_splits<kQ>(p, kv_head, first_query);
}

}  // namespace thaw
