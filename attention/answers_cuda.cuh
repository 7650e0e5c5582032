// What ghosts answer: who of them is recalled, and the sum of the values of all others, by products
// of 8-bit integers. Weights are rounded to 8 bits as on the CPU (kvstore/ghost.h).
#pragma once

#include "attention/ghosts_cuda.cuh"

namespace thaw {

// Groups whose weights are all less than this share of the softmax add nothing to its sums.
inline constexpr float kNegligible = 1e-8f;

// Where answer_ghosts() has its weights and sums in shared memory; numbers of words.
struct AnswerLayout {
  int weights, units, offsets, matters, totals, sums, states, total;

  __host__ __device__ AnswerLayout(const GhostFormat& format, int lane_queries)
      : weights(0),
        units(weights + kTiledQueries * GhostRope::kSpan / 4),
        offsets(units + kTiledQueries * kSpanGroups),
        matters(offsets + kTiledQueries * kSpanGroups),
        totals(matters + kSpanGroups),
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
    const int head = lane * p.lane_queries() + i, n_hot = p.hot.parts.n_splits;
    const LaneStates parts(n_hot + p.scored.n_splits, [&](int s) {
      return s < n_hot ? p.hot.parts.state(head, s) : p.scored.state(head, s - n_hot);
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

// Decides who is recalled; the weights of the other ghosts of a span, and what they add to l and ps
// of this thread's tokens.
template <int kBits>
__device__ inline void weigh_span(const TieredProblem& p, float* shared, const AnswerLayout& at,
                                  int kv_head, int first, int n_queries, int span, int kv_len,
                                  float (&l)[kTiledQueries], float (&ps)[kTiledQueries]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int lane = kv_head / p.kv.hot.lane_heads, of_lane = kv_head % p.kv.hot.lane_heads;
  const int group = span * kSpanGroups + warp_index(), token = group * kGhostGroup + lane_index();
  const bool recalled = is_recalled(p, shared + at.totals, lane, token);
  const unsigned word = __ballot_sync(kAllLanes, recalled);
  if (of_lane == 0 && first == 0 && lane_index() == 0)
    p.recalled_mask[static_cast<std::int64_t>(lane) * (p.ghost_stride / kGhostGroup) + group] =
        word;
  const float* totals = shared + at.totals + 3 * (of_lane * p.group + first);
  const float* scores = p.ghost_scores +
                        static_cast<std::int64_t>(kv_head * p.group + first) * p.ghost_stride +
                        token;
  float scale = 0;
  if (kBits > 0 && group * kGhostGroup < kv_len)
    scale = scale_at(p.kv.ghosts.group(kv_head, group) + f.group_bytes() - f.scale_bytes(),
                     lane_index());
  bool matters = false;
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= n_queries) break;
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

// The states and sums of the block's threads into p.answered.
__device__ inline void join_answers(const TieredProblem& p, float* shared, const AnswerLayout& at,
                                    int kv_head, int first, int n_queries,
                                    const float (&l)[kTiledQueries],
                                    const float (&ps)[kTiledQueries],
                                    const float (&sums)[kTiledQueries][2]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int thread = static_cast<int>(threadIdx.x), dim = f.padded_dim();
  const int column = thread % (dim / 2), team = thread / (dim / 2);
  const int n_teams = AnswerLayout::n_teams(f), split = static_cast<int>(blockIdx.x);
  const int head = kv_head * p.group + first;
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    float* state = shared + at.states + 2 * (warp_index() * kTiledQueries + i);
    const float warp_l = warp_sum(l[i]), warp_ps = warp_sum(ps[i]);
    if (lane_index() == 0) state[0] = warp_l, state[1] = warp_ps;
    if (team >= n_teams) continue;
    float* sum = shared + at.sums + (team * kTiledQueries + i) * dim + 2 * column;
    sum[0] = sums[i][0], sum[1] = sums[i][1];
  }
  __syncthreads();  // all warps' states and all teams' sums are there
  if (thread < n_queries) {
    const int of_lane = kv_head % p.kv.hot.lane_heads * p.group + first + thread;
    PowerState all = {shared[at.totals + 3 * of_lane], 0, 0};
    for (int w = 0; w < kTiledWarps; ++w) {
      const float* state = shared + at.states + 2 * (w * kTiledQueries + thread);
      all.l += state[0], all.ps += state[1];
    }
    p.answered.set_state(head + thread, split, all);
  }
  for (int i = thread; i < n_queries * p.answered.n_sums; i += kTiledThreads) {
    const int query = i / dim, d = i % dim;
    float sum = 0;
    for (int t = 0; t < n_teams; ++t)
      sum += shared[at.sums + (t * kTiledQueries + query) * dim + d];
    p.answered.of(head + query, split)[d] = sum;
  }
}

// The list of a lane's recalled tokens, ascending, from the marks of all blocks.
__device__ inline void list_recalled(const TieredProblem& p, int lane, int n_words) {
  __shared__ int of_warp[kTiledWarps];
  const DeviceStats& stats = p.kv.stats;
  const std::uint32_t* mask =
      p.recalled_mask + static_cast<std::int64_t>(lane) * (p.ghost_stride / kGhostGroup);
  const Share share = share_of(n_words, 1, static_cast<int>(threadIdx.x), kTiledThreads);
  int n = 0, all = 0;
  for (int w = share.begin; w < share.end; ++w) n += __popc(__ldcg(mask + w));
  int at = n;  // sum of n up to this lane's, which is taken off below
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, at, step);
    if (lane_index() >= step) at += before;
  }
  if (lane_index() == kWarp - 1) of_warp[warp_index()] = at;
  __syncthreads();  // the warps' sums are there
  at -= n;
  for (int w = 0; w < kTiledWarps; ++w) {
    if (w < warp_index()) at += of_warp[w];
    all += of_warp[w];
  }
  std::int32_t* list = stats.recalled + static_cast<std::int64_t>(lane) * stats.recalled_room;
  for (int w = share.begin; w < share.end; ++w)
    for (std::uint32_t bits = __ldcg(mask + w); bits != 0; bits &= bits - 1, ++at)
      if (at < stats.recalled_room) list[at] = w * kGhostGroup + __ffs(static_cast<int>(bits)) - 1;
  if (threadIdx.x == 0) stats.n_recalled[lane] = min(all, stats.recalled_room);
}

// Computes  who is recalled, ascending, a lane; of the other ghosts of up to kTiledQueries queries
//           of a k/v head, the sums of their values in rotated space, l and ps, relative to the
//           largest score of all
// Grid      splits of the spans x k/v heads x chunks of queries
// Block     kTiledThreads; a span at a time; for decisions a thread has a token, for sums two
//           dimensions of every n_teams-th group
// Shared    AnswerLayout
// Bytes     reads the scores of the lane's queries, and value codes and their scales once a chunk,
//           but not those of groups that add next to nothing; writes a part a query and split
template <int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) answer_ghosts(TieredProblem p) {
  const AnswerLayout at(p.kv.ghosts.format, p.lane_queries());
  float* shared = dynamic_shared<float>();
  const int kv_head = static_cast<int>(blockIdx.y), lane = kv_head / p.kv.hot.lane_heads;
  const int first = static_cast<int>(blockIdx.z) * kTiledQueries;
  const int n_queries = min(kTiledQueries, p.group - first);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, n = n_ghosts(p, kv_len);
  const Share share =
      share_of(n, GhostRope::kSpan, static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
  float l[kTiledQueries] = {}, ps[kTiledQueries] = {}, sums[kTiledQueries][2] = {};
  estimate_totals(shared + at.totals, p, lane);
  __syncthreads();  // the totals are there
  for (int token = share.begin; token < share.end; token += GhostRope::kSpan) {
    const int span = token / GhostRope::kSpan;
    weigh_span<kBits>(p, shared, at, kv_head, first, n_queries, span, kv_len, l, ps);
    __syncthreads();  // all weights are there
    if constexpr (kBits > 0) sum_span<kBits>(sums, p, shared, at, kv_head, n_queries, span);
    __syncthreads();  // and read: the next span overwrites them
  }
  join_answers(p, shared, at, kv_head, first, n_queries, l, ps, sums);
  if (kv_head % p.kv.hot.lane_heads == 0 && first == 0 &&
      last_to_arrive(p.n_gathered + lane, gridDim.x))
    list_recalled(p, lane, (n + kGhostGroup - 1) / kGhostGroup);
}

}  // namespace thaw
