// What frozen tokens answer: who of them is recalled and attended exactly, and the sum of the
// values of all other ghosts, by products of 8-bit integers. Weights are rounded to 8 bits as on
// the CPU (kvstore/ghost.h).
#pragma once

#include "attention/ghosts_cuda.cuh"

namespace thaw {

// Groups whose weights are all less than this share of the softmax add nothing to its sums.
inline constexpr float kNegligible = 1e-8f;

// Where answer_frozen() has its weights and sums in shared memory; numbers of words.
struct AnswerLayout {
  int weights, units, offsets, matters, recalled, totals, sums, states, total;

  __host__ __device__ AnswerLayout(const GhostFormat& format, int lane_queries)
      : weights(0),
        units(weights + kTiledQueries * GhostRope::kSpan / 4),
        offsets(units + kTiledQueries * kSpanGroups),
        matters(offsets + kTiledQueries * kSpanGroups),
        recalled(matters + kSpanGroups),
        totals(recalled + kSpanGroups),
        sums(totals + 3 * lane_queries),
        states(sums + kTiledQueries * n_teams(format) * format.padded_dim()),
        total(states + 2 * kTiledWarps * kTiledQueries) {}
  // Teams of threads, one of two dimensions each, take groups in turns.
  __host__ __device__ static int n_teams(const GhostFormat& format) {
    return kTiledThreads / (format.padded_dim() / 2);
  }
};

// Of each query head of the lane: m and l of the softmax that recalls are decided by, and what its
// weights are to be multiplied by to be shares of the lane's mean.
__device__ inline void estimate_totals(float* totals, const TieredProblem& p, int lane) {
  for (int i = warp_index(); i < p.lane_queries(); i += kTiledWarps) {
    const int head = lane * p.lane_queries() + i, n_hot = p.hot.n_splits;
    const LaneStates parts(n_hot + p.scored.n_splits, [&](int s) {
      return s < n_hot ? p.hot.state(head, s) : p.scored.state(head, s - n_hot);
    });
    const float m = parts.peak();
    float l = 0;
#pragma unroll
    for (const PowerState& part : parts.of) l += part.l * power(part.m, m);
    l = warp_sum(l);
    if (lane_index() != 0) continue;
    totals[3 * i] = m, totals[3 * i + 1] = l;
    totals[3 * i + 2] = 1.0f / (l * static_cast<float>(p.lane_queries()));
  }
}

// Whether the ghost of a token is probable enough, in the mean over the lane, to be recalled.
__device__ inline bool is_recalled(const TieredProblem& p, const float* totals, int lane,
                                   int token) {
  const float* scores =
      p.ghost_scores + static_cast<std::int64_t>(lane) * p.lane_queries() * p.ghost_stride + token;
  float mean = 0;
  for (int i = 0; i < p.lane_queries(); ++i) {
    const float s = scores[static_cast<std::int64_t>(i) * p.ghost_stride];
    mean = fmaf(power(s, totals[3 * i]), totals[3 * i + 2], mean);
  }
  return mean >= *p.kv.recall && mean > 0;
}

// A group's weights times its values' scales, one a lane, rounded to 8 bits of the largest. Returns
// whether any is above `negligible`.
template <int kBits>
__device__ inline bool round_weights(float* shared, const AnswerLayout& at, int query, float weight,
                                     float unit, float negligible) {
  const float largest = warp_max(weight);
  const float inverse = largest > 0 ? 255.0f / largest : 0.0f;
  const int code = static_cast<int>(fmaf(weight, inverse, 0.5f)), group = warp_index();
  auto* codes = reinterpret_cast<std::uint8_t*>(shared + at.weights);
  codes[query * GhostRope::kSpan + group * kGhostGroup + lane_index()] =
      static_cast<std::uint8_t>(code);
  const int sum = __reduce_add_sync(kAllLanes, code);
  if (lane_index() == 0) {
    const float one = unit * (largest / 255.0f);
    shared[at.units + query * kSpanGroups + group] = one;
    shared[at.offsets + query * kSpanGroups + group] =
        -one * (0.5f * (1 << kBits) - 0.5f) * static_cast<float>(sum);
  }
  return largest > negligible;
}

// The sums over a group of this thread's two dimensions, those of word `column` of block `dims`.
template <int kBits>
__device__ inline void sum_group(float (&sums)[kTiledQueries][2], const float* shared,
                                 const AnswerLayout& at, int n_queries, const std::byte* codes,
                                 int column, int group) {
  unsigned dots[kTiledQueries][2] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // 16 tokens
    CodeWords<kBits> words;
    words.load(codes + half * 32 * kBits, column);
#pragma unroll
    for (int four = 0; four < 4; ++four) {
      const int2 u = words.four_codes(2 * four, 1);
#pragma unroll
      for (int i = 0; i < kTiledQueries; ++i) {
        if (i >= n_queries) break;
        const auto w = reinterpret_cast<const unsigned*>(
            shared + at.weights)[i * GhostRope::kSpan / 4 + group * 8 + half * 4 + four];
        dots[i][0] = __dp4a(static_cast<unsigned>(u.x), w, dots[i][0]);
        dots[i][1] = __dp4a(static_cast<unsigned>(u.y), w, dots[i][1]);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= n_queries) break;
    const float unit = shared[at.units + i * kSpanGroups + group];
    const float offset = shared[at.offsets + i * kSpanGroups + group];
    sums[i][0] += fmaf(unit, static_cast<float>(dots[i][0]), offset);
    sums[i][1] += fmaf(unit, static_cast<float>(dots[i][1]), offset);
  }
}

// Decides who is recalled, a bit a token of shared[at.recalled]; the weights of the other ghosts of
// a span, and what they add to l and ps of this thread's tokens.
template <int kBits>
__device__ inline void weigh_span(const TieredProblem& p, float* shared, const AnswerLayout& at,
                                  const QueryChunk& chunk, int span, int kv_len,
                                  float (&l)[kTiledQueries], float (&ps)[kTiledQueries]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int of_lane = chunk.head - chunk.lane * p.lane_queries(), kv_head = chunk.kv_head;
  const int group = span * kSpanGroups + warp_index(), token = group * kGhostGroup + lane_index();
  const bool recalled = is_recalled(p, shared + at.totals, chunk.lane, token);
  const unsigned word = __ballot_sync(kAllLanes, recalled);
  if (lane_index() == 0) shared[at.recalled + warp_index()] = __uint_as_float(word);
  const float* totals = shared + at.totals + 3 * of_lane;
  const float* scores =
      p.ghost_scores + static_cast<std::int64_t>(chunk.head) * p.ghost_stride + token;
  float scale = 0;
  if (kBits > 0 && group * kGhostGroup < kv_len)
    scale = scale_at(p.kv.ghosts.group(kv_head, group) + f.group_bytes() - f.scale_bytes(),
                     lane_index());
  bool matters = false;
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= chunk.n) break;
    const float s = scores[static_cast<std::int64_t>(i) * p.ghost_stride];
    const float weight = recalled ? 0.0f : power(s, totals[3 * i]);
    l[i] += weight;
    ps[i] += weight > 0 ? weight * s : 0.0f;
    if constexpr (kBits > 0)
      matters |=
          round_weights<kBits>(shared, at, i, weight * scale, p.kv.ghosts.units[2 * kv_head + 1],
                               kNegligible * totals[3 * i + 1]);
  }
  if (lane_index() == 0) shared[at.matters + warp_index()] = matters ? 1.0f : 0.0f;
}

template <int kBits>
__device__ inline void sum_span(float (&sums)[kTiledQueries][2], const TieredProblem& p,
                                const float* shared, const AnswerLayout& at, int kv_head,
                                int n_queries, int span) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int thread = static_cast<int>(threadIdx.x), n_columns = f.padded_dim() / 2;
  const int column = thread % n_columns, n_teams = AnswerLayout::n_teams(f);
  if (thread / n_columns >= n_teams) return;
  for (int group = thread / n_columns; group < kSpanGroups; group += n_teams) {
    if (shared[at.matters + group] == 0) continue;
    const std::byte* codes = p.kv.ghosts.group(kv_head, span * kSpanGroups + group) +
                             f.key_bytes() + column / 8 * 64 * kBits;
    sum_group<kBits>(sums, shared, at, n_queries, codes, column % 8, group);
  }
}

// The span's recalled tokens behind n others of the split's list, ascending; returns how many there
// are now. All threads call, and none sees what others wrote.
__device__ inline int list_recalled(std::int32_t* list, int n, int room, const float* words,
                                    int span) {
  unsigned mine = 0;
  int before = 0, all = 0;
#pragma unroll
  for (int w = 0; w < kSpanGroups; ++w) {
    const unsigned word = __float_as_uint(words[w]);
    if (w < warp_index()) before += __popc(word);
    if (w == warp_index()) mine = word;
    all += __popc(word);
  }
  const unsigned bit = 1u << lane_index();
  const int at = n + before + __popc(mine & (bit - 1));
  if ((mine & bit) != 0 && at < room)
    list[at] = span * GhostRope::kSpan + static_cast<int>(threadIdx.x);
  return min(n + all, room);
}

// The states and sums of the block's threads into p.answered.
__device__ inline void join_answers(const TieredProblem& p, float* shared, const AnswerLayout& at,
                                    const QueryChunk& chunk, int split,
                                    const float (&l)[kTiledQueries],
                                    const float (&ps)[kTiledQueries],
                                    const float (&sums)[kTiledQueries][2]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int thread = static_cast<int>(threadIdx.x), dim = f.padded_dim();
  const int column = thread % (dim / 2), team = thread / (dim / 2);
  const int n_teams = AnswerLayout::n_teams(f);
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= chunk.n) break;
    float* state = shared + at.states + 2 * (warp_index() * kTiledQueries + i);
    const float warp_l = warp_sum(l[i]), warp_ps = warp_sum(ps[i]);
    if (lane_index() == 0) state[0] = warp_l, state[1] = warp_ps;
    if (team >= n_teams) continue;
    float* sum = shared + at.sums + (team * kTiledQueries + i) * dim + 2 * column;
    sum[0] = sums[i][0], sum[1] = sums[i][1];
  }
  __syncthreads();  // all warps' states and all teams' sums are there
  if (thread < chunk.n) {
    const int of_lane = chunk.head - chunk.lane * p.lane_queries() + thread;
    PowerState all = {shared[at.totals + 3 * of_lane], 0, 0};
    for (int w = 0; w < kTiledWarps; ++w) {
      const float* state = shared + at.states + 2 * (w * kTiledQueries + thread);
      all.l += state[0], all.ps += state[1];
    }
    p.answered.set_state(chunk.head + thread, split, all);
  }
  for (int i = thread; i < chunk.n * p.answered.n_sums; i += kTiledThreads) {
    const int query = i / dim, d = i % dim;
    float sum = 0;
    for (int t = 0; t < n_teams; ++t)
      sum += shared[at.sums + (t * kTiledQueries + query) * dim + d];
    p.answered.of(chunk.head + query, split)[d] = sum;
  }
}

// Computes  of up to kTiledQueries queries of a k/v head: who is recalled, ascending, a split, and
// a
//           part of those rows; of the other ghosts, the sums of their values in rotated space, l
//           and ps, relative to the largest score of all
// Grid      splits of the spans x k/v heads x chunks of queries
// Block     kTiledThreads; a span at a time; for decisions a thread has a token, for sums two
//           dimensions of every n_teams-th group; then recalled rows as attend_rows() has them
// Shared    AnswerLayout, then RowTileLayout
// Bytes     reads the scores of the lane's queries, and value codes and their scales once a chunk,
//           but not those of groups that add next to nothing, and recalled rows once a chunk, over
//           the bus; writes two parts a query and split
template <KvType kType, int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) answer_frozen(TieredProblem p) {
  const AnswerLayout at(p.kv.ghosts.format, p.lane_queries());
  float* shared = dynamic_shared<float>();
  const QueryChunk chunk(p);
  const int split = static_cast<int>(blockIdx.x);
  const int part = p.recalled_at(chunk.kv_head, static_cast<int>(blockIdx.z), split);
  std::int32_t* list = p.recalled_tokens + static_cast<std::int64_t>(part) * p.recalled_stride;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len;
  const Share share = share_of(n_ghosts(p, kv_len), GhostRope::kSpan, split, p.scored.n_splits);
  float l[kTiledQueries] = {}, ps[kTiledQueries] = {}, sums[kTiledQueries][2] = {};
  int n_recalled = 0;
  estimate_totals(shared + at.totals, p, chunk.lane);
  __syncthreads();  // the totals are there
  for (int token = share.begin; token < share.end; token += GhostRope::kSpan) {
    const int span = token / GhostRope::kSpan;
    weigh_span<kBits>(p, shared, at, chunk, span, kv_len, l, ps);
    __syncthreads();  // all weights are there
    n_recalled = list_recalled(list, n_recalled, p.recalled_stride, shared + at.recalled, span);
    if constexpr (kBits > 0) sum_span<kBits>(sums, p, shared, at, chunk.kv_head, chunk.n, span);
    __syncthreads();  // and read: the next span overwrites them; and the list is complete
  }
  join_answers(p, shared, at, chunk, split, l, ps, sums);
  if (threadIdx.x == 0) p.n_recalled[part] = n_recalled;
  __syncthreads();  // answers are read: rows overwrite them
  attend_rows<kType>(
      p, chunk, shared, {0, n_recalled}, p.kv.rows.value_offset,
      [&](int i) { return p.kv.rows.key(chunk.kv_head, list[i]); },
      p.recalled_scores +
          (static_cast<std::int64_t>(chunk.head) * p.scored.n_splits + split) * p.recalled_stride,
      p.scored.n_splits * p.recalled_stride, p.recalled, split);
}

}  // namespace thaw
