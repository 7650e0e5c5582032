// Attention of a few queries: what decoding spends its time on when the context is long. Tokens are
// split between blocks, and the last block of a head to finish joins their states in order
// (FlashAttention, 2205.14135; Flash-Decoding splits the tokens).
#pragma once

#include <algorithm>

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

// Joins the teams of a block: queries' sums and states into their part, or o where nothing is
// split.
template <int kLanes, int kQ>
__device__ void join_teams(const DecodeProblem& p, DecodeState<kQ>& state, int kv_head, int first,
                           int n_splits) {
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

// A thread's units of the keys and values of kBatch tokens in a row, batch after batch. 16-bit
// numbers come through a ring in shared memory, some batches ahead; what is packed tighter stands
// at no multiple of 16 bytes and is loaded when it is asked for.
template <KvType kType, int kBatch>
class TokenRing {
 public:
  static constexpr int kStages = RowUnit<kType>::kWide ? 4 : 1;
  static constexpr std::size_t kBytes =
      RowUnit<kType>::kWide ? std::size_t{kStages} * 2 * kBatch * kDecodeThreads * 16 : 0;

  __device__ TokenRing(const DeviceRows& rows, int kv_head, int unit, int end)
      : rows_(rows), kv_head_(kv_head), unit_(unit), end_(end) {}

  // Begins to copy the batch from `token` on, if it is before the end. A batch stands in one page.
  __device__ void fetch(int token) {
    if constexpr (RowUnit<kType>::kWide) {
      if (token < end_) {
        const std::byte* key = rows_.key(kv_head_, token) + unit_ * 16;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          const bool exists = token + b < end_;
          cp_async_16(at(to_, 2 * b), key + b * rows_.row_bytes, exists);
          cp_async_16(at(to_, 2 * b + 1), key + b * rows_.row_bytes + rows_.value_offset, exists);
        }
      }
      cp_async_commit();
      to_ = to_ + 1 == kStages ? 0 : to_ + 1;
    }
  }

  // The batch from `token` on, which was fetched kStages - 1 batches ago.
  __device__ void take(RowUnit<kType> (&k)[kBatch], RowUnit<kType> (&v)[kBatch], int token) {
    if constexpr (RowUnit<kType>::kWide) {
      cp_async_wait<kStages - 2>();
      if (token < end_) {
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          k[b].set(*at(from_, 2 * b)), v[b].set(*at(from_, 2 * b + 1));
      }
      from_ = from_ + 1 == kStages ? 0 : from_ + 1;
    } else if (token < end_) {
      const std::byte* key = rows_.key(kv_head_, token);
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (token + b >= end_) continue;
        k[b].load(key + b * rows_.row_bytes, unit_);
        v[b].load(key + b * rows_.row_bytes + rows_.value_offset, unit_);
      }
    }
  }

 private:
  __device__ uint4* at(int stage, int i) const {
    return dynamic_shared<uint4>() + (stage * 2 * kBatch + i) * kDecodeThreads + threadIdx.x;
  }
  const DeviceRows& rows_;
  int kv_head_, unit_, end_, to_ = 0, from_ = 0;
};

// Tokens that a team takes at a time.
template <KvType kType, int kQ>
constexpr int kDecodeBatch = RowUnit<kType>::kWide || kType == KvType::kF32 || kQ == 8 ? 2 : 4;

template <KvType kType, int kLanes, int kQ>
constexpr std::size_t kDecodeShared =
    std::max(TokenRing<kType, kDecodeBatch<kType, kQ>>::kBytes,
             sizeof(float) * kQ * (kDecodeThreads * kRowUnit + kDecodeThreads / kLanes * 2));

// Computes  o = softmax(q K^T / sqrt(head_dim)) V of kQ queries of a k/v head, each over the tokens
//           that it sees
// Grid      splits of the tokens x k/v heads x chunks of kQ queries
// Block     kDecodeThreads; teams of kLanes lanes (8 kLanes >= head_dim) take kBatch tokens in turn
// Shared    kDecodeShared<kType, kLanes, kQ>: the ring of tokens, then what teams join
// Bytes     reads keys and values once a chunk, and q; writes o; writes and reads head_dim + 2
//           numbers a query and split
template <KvType kType, int kLanes, int kQ>
__global__ void __launch_bounds__(kDecodeThreads, kQ == 8 ? kDecodeBlocks : kDecodeBlocks + 1)
    decode_attention(DecodeProblem p) {
  constexpr int kTeams = kDecodeThreads / kLanes;
  constexpr int kBatch = kDecodeBatch<kType, kQ>;
  constexpr int kTurn = kTeams * kBatch;  // tokens of the block at a time
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, kv_head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(blockIdx.z) * kQ;
  const int max_splits = static_cast<int>(gridDim.x);
  const int least = max((kv_len + max_splits - 1) / max_splits, kMinSpan);
  const int span = (least + kTurn - 1) / kTurn * kTurn, n_splits = (kv_len + span - 1) / span;
  const int begin = static_cast<int>(blockIdx.x) * span, end = min(begin + span, kv_len);
  if (begin >= end) return;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int team = static_cast<int>(threadIdx.x) / kLanes;
  const int unit =
      min(lane, p.head_dim / kRowUnit - 1);  // lanes beyond the head: its last, times 0

  TokenRing<kType, kBatch> ring(p.kv.rows, kv_head, unit, end);
  for (int i = 0; i + 1 < ring.kStages; ++i) ring.fetch(begin + i * kTurn + team * kBatch);
  float q[kQ][kRowUnit];
  load_queries(q, p, kv_head, first_query, lane);
  DecodeState<kQ> state;
  state.reset();
  for (int turn = begin; turn < end; turn += kTurn) {  // all lanes of a warp stay together
    const int token = turn + team * kBatch;
    RowUnit<kType> k[kBatch] = {}, v[kBatch] = {};
    ring.take(k, v, token);
    ring.fetch(token + (ring.kStages - 1) * kTurn);
#pragma unroll
    for (int i = 0; i < kQ; ++i)
      absorb<kType, kLanes>(state, i, q[i], k, v,
                            min(end, p.visible(kv_len, first_query + i)) - token);
  }
  __syncthreads();  // nobody reads the ring any more
  join_teams<kLanes>(p, state, kv_head, first_query, n_splits);
  if (n_splits > 1) join_splits<kQ>(p, kv_head, first_query, n_splits);
}

}  // namespace thaw
