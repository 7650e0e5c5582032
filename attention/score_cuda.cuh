// The first kernel of a decode step over two tiers: scores of hot rows and of ghosts.
#pragma once

#include <cfloat>

#include "attention/ghosts_cuda.cuh"

namespace thaw {

__device__ inline int n_ghosts(const TieredProblem& p, int kv_len) {
  return kv_len >= p.kv.ghosts.centre_tokens ? kv_len : 0;
}

// m and l of the lanes' tokens, two queries a lane, into p.scored.
__device__ inline void join_scores(const TieredProblem& p, float* states, const QueryChunk& chunk,
                                   int split, const float (&m)[2], const float (&l)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float peak = warp_max<kWarp, kQueryLanes>(m[i]);
    const float sum = warp_sum<kWarp, kQueryLanes>(l[i] * power(m[i], peak));
    float* state = states + 2 * (warp_index() * kTiledQueries + query_of_lane() + i);
    if (lane_index() < kQueryLanes) state[0] = peak, state[1] = sum;
  }
  __syncthreads();  // all warps' states are there
  const int query = static_cast<int>(threadIdx.x);
  if (query >= chunk.n) return;
  PowerState all;
  for (int w = 0; w < kTiledWarps; ++w)
    all.m = fmaxf(all.m, states[2 * (w * kTiledQueries + query)]);
  for (int w = 0; w < kTiledWarps; ++w) {
    const float* state = states + 2 * (w * kTiledQueries + query);
    all.l += state[1] * power(state[0], all.m);
  }
  p.scored.set_state(chunk.head + query, split, all);
}

// Scores of the ghosts of a k/v head's spans, one after another: while one is scored, the next is
// on its way, and where the one behind that stands. What is on its way is kept as it is stored: to
// compute with it is to wait for it.
template <int kBits>
class GhostScorer {
 public:
  __device__ GhostScorer(const TieredProblem& p, float* shared, const GhostQueryLayout& at,
                         const QueryChunk& chunk)
      : p_(p), shared_(shared), at_(at), chunk_(chunk) {}
  // Of this lane's tokens and two queries; m is finite, so that it can be subtracted from kLowest.
  float m[2] = {-FLT_MAX, -FLT_MAX}, l[2] = {};

  __device__ void score(const Share& share, int kv_len) {
    const int end = (share.end + GhostRope::kSpan - 1) / GhostRope::kSpan;
    int span = share.begin / GhostRope::kSpan;
    find(span, kv_len);
    for (int query = warp_index(); query < chunk_.n; query += kTiledWarps) {
      if (query != warp_index()) load_query(query);
      prepare_ghost_query(shared_, at_, p_, query_, query);
    }
    load(span, end, kv_len);
    find(span + 1, kv_len);
    for (int buffer = 0; span < end; ++span, buffer ^= 1) {
      for (int query = warp_index(); query < chunk_.n; query += kTiledWarps)
        turn_ghost_query(shared_, at_, angle_, rope().n_fast, p_.head_dim / 2, query, buffer);
      __syncthreads();  // all queries are turned, and the span before last is read
      score_span(span, end, kv_len, buffer);
    }
  }
  __device__ void load_query(int query) {
    if (query < chunk_.n) query_.load(shared_, at_, p_, chunk_.kv_head, chunk_.first + query);
  }

 private:
  __device__ const DeviceRope& rope() const { return p_.kv.ghosts.rope; }

  __device__ void find(int span, int kv_len) {
    const int group = min(span * kSpanGroups + warp_index(), (kv_len - 1) / kGhostGroup);
    hot_ = p_.kv.hot.mask[static_cast<std::int64_t>(chunk_.lane) * p_.kv.hot.mask_words + group];
    page_ = p_.kv.ghosts.pages[group / p_.kv.ghosts.page_groups];
  }
  __device__ void load(int span, int end, int kv_len) {
    const int group = span * kSpanGroups + warp_index();
    ahead_.silent = span < end ? silent_tokens(hot_, group, kv_len) : ~0u;
    ahead_.at = p_.kv.ghosts.group_in(page_, chunk_.kv_head, group);
    ahead_.load(p_.kv.ghosts.format);
    if (span < end) angle_.load(rope(), p_.head_dim / 2, span);
  }

  __device__ void score_span(int span, int end, int kv_len, int buffer) {
    const std::uint32_t silent = ahead_.silent;
    float s[2][4] = {};
    if (silent != ~0u) score_codes(s);
    load(span + 1, end, kv_len);
    find(span + 2, kv_len);
    if (silent != ~0u) multiply_centres(s, shared_, at_, buffer, warp_index());
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if ((silent >> token_of_lane(j) & 1u) != 0)
        s[j / 2][j % 2 * 2] = s[j / 2][j % 2 * 2 + 1] = kLowest;
    float* scores = p_.ghost_scores + static_cast<std::int64_t>(chunk_.head) * p_.ghost_stride +
                    span * GhostRope::kSpan + warp_index() * kGhostGroup;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = query_of_lane() + i;
      if (query >= chunk_.n) break;
      float* to = scores + static_cast<std::int64_t>(query) * p_.ghost_stride;
      const float a = s[0][i], b = s[0][i + 2], c = s[1][i], d = s[1][i + 2];
      *reinterpret_cast<float2*>(to + token_of_lane(0)) = make_float2(a, b);
      *reinterpret_cast<float2*>(to + token_of_lane(2)) = make_float2(c, d);
      const float peak = fmaxf(m[i], fmaxf(fmaxf(a, b), fmaxf(c, d)));
      l[i] = l[i] * exp2f(m[i] - peak) + exp2f(a - peak) + exp2f(b - peak) + exp2f(c - peak) +
             exp2f(d - peak);
      m[i] = peak;
    }
  }
  // What ghosts differ from their centre by.
  __device__ void score_codes(float (&s)[2][4]) const {
    int dots[2][4] = {};
    ahead_.multiply(dots, shared_ + at_.codes, p_.kv.ghosts.format.padded_dim());
    const float2 scale = *reinterpret_cast<const float2*>(shared_ + at_.scale + query_of_lane());
    const float2 offset = *reinterpret_cast<const float2*>(shared_ + at_.offset + query_of_lane());
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float own = scale_of_byte(ahead_.scales[j / 2] >> j % 2 * 8 & 0xff);
      const int* from = dots[j / 2] + j % 2 * 2;
      s[j / 2][j % 2 * 2] = scale.x * own * (static_cast<float>(from[0]) + offset.x);
      s[j / 2][j % 2 * 2 + 1] = scale.y * own * (static_cast<float>(from[1]) + offset.y);
    }
  }

  const TieredProblem& p_;
  float* shared_;
  const GhostQueryLayout& at_;
  const QueryChunk chunk_;
  std::uint32_t hot_;
  const std::byte* page_;
  GroupAhead<kBits> ahead_;
  SpanAngle angle_;
  QueryAhead query_;
};

// The ghosts of a split: scores, and m and l.
template <int kBits>
__device__ inline void score_ghosts(const TieredProblem& p, float* shared,
                                    const GhostQueryLayout& at, int split) {
  const QueryChunk chunk(p);
  const int kv_len = *p.kv.kv_len;
  GhostScorer<kBits> scorer(p, shared, at, chunk);
  if (p.kv.ghosts.rope.rows != nullptr)
    scorer.load_query(warp_index());  // kv_len is on its way, too
  const Share share = share_of(n_ghosts(p, kv_len), GhostRope::kSpan, split, p.scored.n_splits);
  if (share.begin < share.end) scorer.score(share, kv_len);
  join_scores(p, shared + at.states, chunk, split, scorer.m, scorer.l);
}

// Computes  of up to kTiledQueries queries of a k/v head: scores with its lane's hot rows, and a
//           state with sums a split; scores with the ghosts of its tokens, kLowest for hot ones,
//           and m and l of each split
// Grid      splits of the hot rows, then of the spans x k/v heads x chunks of queries
// Block     kTiledThreads; a tile of rows at a time, or a span, a warp for each of its groups
// Shared    RowTileLayout or GhostQueryLayout
// Bytes     reads the rows' keys and values once a chunk; the rope's tables, and key codes and
//           their scales once a chunk, but not those of groups that are all hot; writes a score a
//           query and row, and a query and token
template <KvType kType, int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) score_tiers(TieredProblem p) {
  const GhostQueryLayout at(p.kv.ghosts.format, p.kv.ghosts.rope.n_fast);
  float* shared = dynamic_shared<float>();
  const int split = static_cast<int>(blockIdx.x) - p.hot.n_splits;
  if (split >= 0) load_rope_tables(shared, at, p);
  wait_for_previous_kernel();
  let_next_kernel_start();
  __syncthreads();  // the rope's tables are there
  if (split < 0)
    attend_hot_rows<kType>(p, shared, static_cast<int>(blockIdx.x));
  else
    score_ghosts<kBits>(p, shared, at, split);
}

// Computes  what score_tiers() does of hot rows, where frozen tokens are mute
// Grid      splits of the hot rows x k/v heads x chunks of queries
// Block     kTiledThreads
// Shared    RowTileLayout
// Bytes     reads the rows' keys and values once a chunk; writes a score a query and row
template <KvType kType>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) attend_hot(TieredProblem p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  attend_hot_rows<kType>(p, dynamic_shared<float>(), static_cast<int>(blockIdx.x));
}

}  // namespace thaw
