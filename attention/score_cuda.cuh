// The first kernel of a decode step over two tiers: scores of hot rows and of ghosts.
#pragma once

#include <cfloat>

#include "attention/ghosts_cuda.cuh"

namespace thaw {

// m and l of the lanes' tokens into p.scored.
__device__ inline void join_scores(const TieredProblem& p, float* states, const QueryChunk& chunk,
                                   int split, const float (&m)[kQuads][2],
                                   const float (&l)[kQuads][2]) {
#pragma unroll
  for (int i = 0; i < 2 * kQuads; ++i) {
    const float peak = warp_max<kWarp, kQueryLanes>(m[i / 2][i % 2]);
    const float sum = warp_sum<kWarp, kQueryLanes>(l[i / 2][i % 2] * power(m[i / 2][i % 2], peak));
    const int query = i / 2 * kQuad + query_of_lane() + i % 2;
    float* state = states + 2 * (warp_index() * kTiledQueries + query);
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
  // Of this lane's tokens and queries; m is finite, so that it can be subtracted from kLowest.
  float m[kQuads][2] = {{-FLT_MAX, -FLT_MAX}, {-FLT_MAX, -FLT_MAX}}, l[kQuads][2] = {};

  __device__ void score(const Share& share, int kv_len) {
    const int end = (share.end + GhostRope::kSpan - 1) / GhostRope::kSpan;
    int span = share.begin / GhostRope::kSpan;
    float* noise = span == 0 ? p_.ghost_noise + chunk_.head : nullptr;
    find(span, kv_len);
    for (int query = warp_index(); query < chunk_.n; query += kTiledWarps) {
      if (query != warp_index()) load_query(query);
      prepare_ghost_query(shared_, at_, p_, query_, query, noise);
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
    page_ = p_.kv.ghosts.pages[group / DeviceGhosts::kPageGroups];
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
    float s[kQuads][4] = {};
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad)
      if (silent != ~0u && quad * kQuad < chunk_.n) score_codes(s[quad], quad * kQuad);
    load(span + 1, end, kv_len);
    find(span + 2, kv_len);
    float* scores = p_.ghost_scores + static_cast<std::int64_t>(chunk_.head) * p_.ghost_stride +
                    span * GhostRope::kSpan + warp_index() * kGhostGroup;
#pragma unroll
    for (int quad = 0; quad < kQuads; ++quad) {
      if (quad * kQuad >= chunk_.n) break;
      if (silent != ~0u) multiply_centres(s[quad], shared_, at_, buffer, warp_index(), quad);
      keep_scores(s[quad], silent, scores, quad);
    }
  }
  // What ghosts differ from their centre by, of four queries.
  __device__ void score_codes(float (&s)[4], int first) const {
    int dots[4] = {};
    ahead_.multiply(dots, shared_ + at_.codes + first, p_.kv.ghosts.format.padded_dim());
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int query = first + query_of_lane() + i % 2;
      const float own = scale_of_byte(static_cast<std::uint32_t>(ahead_.scales[i / 2]));
      const float product = static_cast<float>(dots[i]) + shared_[at_.offset + query];
      s[i] = shared_[at_.scale + query] * own * product;
    }
  }
  // Of two tokens with two queries. scores: of the group and the chunk's first query.
  __device__ void keep_scores(const float (&s)[4], std::uint32_t silent, float* scores, int quad) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = quad * kQuad + query_of_lane() + i;
      if (query >= chunk_.n) break;
      const float a = (silent >> token_of_lane(0) & 1u) != 0 ? kLowest : s[i];
      const float b = (silent >> token_of_lane(1) & 1u) != 0 ? kLowest : s[i + 2];
      float* to = scores + static_cast<std::int64_t>(query) * p_.ghost_stride;
      to[token_of_lane(0)] = a, to[token_of_lane(1)] = b;
      const float last = m[quad][i], peak = fmaxf(last, fmaxf(a, b));
      l[quad][i] =
          l[quad][i] * power_of_two(last - peak) + power_of_two(a - peak) + power_of_two(b - peak);
      m[quad][i] = peak;
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
  const Share share = share_of(p.n_ghosts(kv_len), GhostRope::kSpan, split, p.scored.n_splits);
  if (share.begin >= share.end) return;  // nobody asks for its state
  scorer.score(share, kv_len);
  join_scores(p, shared + at.states, chunk, split, scorer.m, scorer.l);
}

// Computes  of up to kTiledQueries queries of a k/v head: scores with its lane's hot rows, and a
//           state with sums a split; scores with the ghosts of its tokens, kLowest for hot ones,
//           and m and l of each split that has any; and by how much these scores err
// Grid      k/v heads x splits of the hot rows, then of the spans x chunks of queries: blocks that
//           have work come first, all heads'
// Block     kTiledThreads; a tile of rows at a time, or a span, a warp for each of its groups
// Shared    RowTileLayout or GhostQueryLayout
// Bytes     reads the rows' keys and values once a chunk; the rope's tables, and key codes and
//           their scales once a chunk, but not those of groups that are all hot; writes a score a
//           query and row, and a query and token
template <KvType kType, int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) score_tiers(TieredProblem p) {
  const GhostQueryLayout at(p.kv.ghosts.format, p.kv.ghosts.rope.n_fast);
  float* shared = dynamic_shared<float>();
  const int split = static_cast<int>(blockIdx.y) - p.hot.n_splits;
  if (split >= 0) load_rope_tables(shared, at, p);
  wait_for_previous_kernel();
  let_next_kernel_start();
  cp_async_wait<0>();
  __syncthreads();  // all threads' parts of the rope's tables are there
  if (split < 0)
    attend_hot_rows<kType>(p, shared, static_cast<int>(blockIdx.y));
  else
    score_ghosts<kBits>(p, shared, at, split);
}

// Computes  what score_tiers() does of hot rows, where frozen tokens are mute
// Grid      k/v heads x splits of the hot rows x chunks of queries
// Block     kTiledThreads
// Shared    RowTileLayout
// Bytes     reads the rows' keys and values once a chunk; writes a score a query and row
template <KvType kType>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) attend_hot(TieredProblem p) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  attend_hot_rows<kType>(p, dynamic_shared<float>(), static_cast<int>(blockIdx.y));
}

}  // namespace thaw
