// What frozen tokens answer: who of them is recalled and attended exactly, and the sum of the
// values of all other ghosts, by products of 8-bit integers. Weights are rounded to 8 bits as on
// the CPU (kvstore/ghost.h).
#pragma once

#include "attention/score_cuda.cuh"

namespace thaw {

static_assert(kTiledQueries == kJudges);  // so a chunk of queries decides who is faint

// Where answer_frozen() has its weights and sums in shared memory; numbers of words. What is of a
// span is there twice: spans take turns.
struct AnswerLayout {
  int weights;  // four tokens x query: what four queries are multiplied by is read at once
  int units, offsets, speaks, recalled, span_size, totals, sums, states, total;

  __host__ __device__ AnswerLayout(const GhostFormat& format, int lane_queries)
      : weights(0),
        units(weights + kTiledQueries * GhostRope::kSpan / 4),
        offsets(units + kTiledQueries * kSpanGroups),
        speaks(offsets + kTiledQueries * kSpanGroups),
        recalled(speaks + kSpanGroups),
        span_size(recalled + kSpanGroups),
        totals(2 * span_size),
        sums(totals + 3 * lane_queries),
        states(sums + kTiledQueries * n_teams(format) * format.padded_dim()),
        total(states + 2 * kTiledWarps * kTiledQueries) {}
  // Teams of threads, one of two dimensions each, take groups in turns.
  __host__ __device__ static int n_teams(const GhostFormat& format) {
    return kTiledThreads / (format.padded_dim() / 2);
  }
};

// Of each query head of the lane: m and l of the softmax that recalls are decided by, and what its
// weights are to be multiplied by to be shares of the lane's mean, with caution.
__device__ inline void estimate_totals(float* totals, const TieredProblem& p, int lane, int kv_len,
                                       float recall) {
  const int n_hot = p.hot_splits(lane), first = lane * p.lane_queries();
  sum_heads(
      p.lane_queries(), n_hot, n_hot + p.ghost_splits(kv_len),
      [&](int i, int part) {
        return part < n_hot ? p.hot.state(first + i, part)
                            : p.scored.state(first + i, part - n_hot);
      },
      [&](int i, const HeadSum& sum) {
        totals[3 * i] = sum.all.m, totals[3 * i + 1] = sum.all.l;
        totals[3 * i + 2] = p.kv.caution.factor(p.ghost_noise[first + i], recall) /
                            (sum.all.l * static_cast<float>(p.lane_queries()));
      });
}

// Whether the ghost of a token is probable enough, in the mean over the lane, to be recalled.
// own: the weights that it has with the chunk's queries.
__device__ inline bool is_recalled(const TieredProblem& p, const float* totals,
                                   const QueryChunk& chunk, int token, float recall,
                                   const float (&own)[kTiledQueries]) {
  float mean = 0;
  if (chunk.n == p.lane_queries()) {
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i)
      if (i < chunk.n) mean = fmaf(own[i], totals[3 * i + 2], mean);
  } else {
    const float* scores =
        p.ghost_scores + static_cast<std::int64_t>(chunk.lane) * p.lane_queries() * p.ghost_stride +
        token;
#pragma unroll 4
    for (int i = 0; i < p.lane_queries(); ++i) {
      const float s = scores[static_cast<std::int64_t>(i) * p.ghost_stride];
      mean = fmaf(power(s, totals[3 * i]), totals[3 * i + 2], mean);
    }
  }
  return mean >= recall && mean > 0;
}

// A group's weights times its values' scales, one a lane, rounded to 8 bits of the largest.
// of_span: its numbers in shared memory.
template <int kBits>
__device__ inline void round_weights(float* of_span, const AnswerLayout& at, int query,
                                     float weight, float unit) {
  // Not negative, and of such the bits have the order of the numbers.
  const float largest = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(weight)));
  const float inverse = largest > 0 ? 255.0f / largest : 0.0f;
  const int code = static_cast<int>(fmaf(weight, inverse, 0.5f)), group = warp_index();
  auto* codes = reinterpret_cast<std::uint8_t*>(of_span + at.weights);
  const int token = group * kGhostGroup + lane_index();
  codes[(token / 4 * kTiledQueries + query) * 4 + token % 4] = static_cast<std::uint8_t>(code);
  const int sum = __reduce_add_sync(kAllLanes, code);
  if (lane_index() == 0) {
    const float one = unit * (largest / 255.0f);
    of_span[at.units + query * kSpanGroups + group] = one;
    of_span[at.offsets + query * kSpanGroups + group] =
        -one * (0.5f * (1 << kBits) - 0.5f) * static_cast<float>(sum);
  }
}

// The sums over a group of a thread's two dimensions with four queries, also those that are not
// there. words: their codes, a half of the tokens each.
template <int kBits>
__device__ inline void sum_group(float (&sums)[kTiledQueries][2], const float* of_span,
                                 const AnswerLayout& at, int first,
                                 const CodeWords<kBits> (&words)[2], int group) {
  const auto* weights = reinterpret_cast<const uint4*>(of_span + at.weights) +
                        (group * kGhostGroup / 4 * kTiledQueries + first) / 4;
  unsigned dots[kQuad][2] = {};
#pragma unroll
  for (int four = 0; four < kGhostGroup / 4; ++four) {
    const int2 u = words[four / 4].four_codes(four % 4 * 2, 1);
    const uint4 w = weights[four * kTiledQueries / 4];
    const unsigned of[kQuad] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int j = 0; j < kQuad; ++j) {
      dots[j][0] = __dp4a(static_cast<unsigned>(u.x), of[j], dots[j][0]);
      dots[j][1] = __dp4a(static_cast<unsigned>(u.y), of[j], dots[j][1]);
    }
  }
#pragma unroll
  for (int j = 0; j < kQuad; ++j) {
    const float unit = of_span[at.units + (first + j) * kSpanGroups + group];
    const float offset = of_span[at.offsets + (first + j) * kSpanGroups + group];
    sums[first + j][0] += fmaf(unit, static_cast<float>(dots[j][0]), offset);
    sums[first + j][1] += fmaf(unit, static_cast<float>(dots[j][1]), offset);
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
  if (all == 0) return n;
  const unsigned bit = 1u << lane_index();
  const int at = n + before + __popc(mine & (bit - 1));
  if ((mine & bit) != 0 && at < room)
    list[at] = span * GhostRope::kSpan + static_cast<int>(threadIdx.x);
  return min(n + all, room);
}

// Answers of a k/v head's spans, one after another: while the codes of one are on their way, the
// next is weighed, and the scores of the one behind that are on theirs.
template <int kBits>
class GhostAnswerer {
 public:
  __device__ GhostAnswerer(const TieredProblem& p, float* shared, const AnswerLayout& at,
                           const QueryChunk& chunk, int kv_len)
      : p_(p),
        shared_(shared),
        at_(at),
        chunk_(chunk),
        kv_len_(kv_len),
        team_(static_cast<int>(threadIdx.x) / (p.kv.ghosts.format.padded_dim() / 2)),
        unit_(p.kv.ghosts.units[2 * chunk.kv_head + 1]),
        recall_(*p.kv.recall),
        faintest_(faintest(recall_, kv_len)) {}
  // Of this thread's tokens, and of its two dimensions of its team's groups.
  float l[kTiledQueries] = {}, ps[kTiledQueries] = {}, sums[kTiledQueries][2] = {};

  // Returns how many tokens are recalled: those in `list`, which all threads see.
  __device__ int answer(const Share& share, std::int32_t* list) {
    const int end = (share.end + GhostRope::kSpan - 1) / GhostRope::kSpan;
    int span = share.begin / GhostRope::kSpan, n_recalled = 0;
    find(span);
    load_scores(span);
    find(span + 1);
    estimate_totals(shared_ + at_.totals, p_, chunk_.lane, kv_len_, recall_);
    __syncthreads();  // the totals are there
    weigh(span, shared_);
    __syncthreads();  // so are all weights of the first span
    load_codes(span, shared_);
    if (span + 1 < end) load_scores(span + 1);
    find(span + 2);
    for (int buffer = 0; span < end; ++span, buffer ^= 1) {
      float *now = shared_ + buffer * at_.span_size, *next = shared_ + (buffer ^ 1) * at_.span_size;
      if (span + 1 < end) weigh(span + 1, next);
      n_recalled = list_recalled(list, n_recalled, p_.recalled_stride, now + at_.recalled, span);
      if constexpr (kBits > 0) sum(span, now);
      __syncthreads();  // weights of the next span are there, and this one's read; so is the list
      if (span + 1 < end) load_codes(span + 1, next);
      if (span + 2 < end) load_scores(span + 2);
      find(span + 3);
    }
    return n_recalled;
  }

 private:
  static constexpr int kAhead = 2;  // groups of a team of heads of 128; others are read when needed

  __device__ int column() const {
    return static_cast<int>(threadIdx.x) - team_ * (p_.kv.ghosts.format.padded_dim() / 2);
  }
  __device__ const std::byte* group(int index) const {
    return p_.kv.ghosts.group(chunk_.kv_head, index);
  }

  // The warp's group of a span; where there is none, the last one of all, whose ghosts weigh 0.
  __device__ int group_of_warp(int span) const {
    return min(span * kSpanGroups + warp_index(), (kv_len_ - 1) / kGhostGroup);
  }
  __device__ void find(int span) {
    if constexpr (kBits > 0)
      page_ = p_.kv.ghosts.pages[group_of_warp(span) / DeviceGhosts::kPageGroups];
  }
  // Of this thread's token.
  __device__ void load_scores(int span) {
    const GhostFormat& f = p_.kv.ghosts.format;
    const int token = span * GhostRope::kSpan + static_cast<int>(threadIdx.x);
    const float* scores =
        p_.ghost_scores + static_cast<std::int64_t>(chunk_.head) * p_.ghost_stride + token;
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i)
      if (i < chunk_.n) scores_[i] = scores[static_cast<std::int64_t>(i) * p_.ghost_stride];
    if constexpr (kBits > 0)
      scale_ = p_.kv.ghosts.group_in(
          page_, chunk_.kv_head,
          group_of_warp(span))[f.group_bytes() - f.scale_bytes() + lane_index()];
  }

  // Decides who is recalled, a bit a token of of_span[at.recalled]; the weights of the other
  // ghosts of a span, and what they add to l and ps.
  __device__ void weigh(int span, float* of_span) {
    const int token = span * GhostRope::kSpan + static_cast<int>(threadIdx.x);
    const float* totals =
        shared_ + at_.totals + 3 * (chunk_.head - chunk_.lane * p_.lane_queries());
    float weights[kTiledQueries];
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i)
      if (i < chunk_.n) weights[i] = power(scores_[i], totals[3 * i]);
    const bool recalled = is_recalled(p_, shared_ + at_.totals, chunk_, token, recall_, weights);
    const unsigned word = __ballot_sync(kAllLanes, recalled);
    const float scale = scale_of_byte(static_cast<std::uint32_t>(scale_));
    bool speaks = false;
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i) {
      if (i >= chunk_.n) break;
      const float weight = recalled ? 0.0f : weights[i];
      l[i] += weight;
      ps[i] += weight > 0 ? weight * scores_[i] : 0.0f;
      speaks |= weight > faintest_ * totals[3 * i + 1];
      if constexpr (kBits > 0) round_weights<kBits>(of_span, at_, i, weight * scale, unit_);
    }
    speaks = __any_sync(kAllLanes, speaks);
    if (lane_index() != 0) return;
    of_span[at_.recalled + warp_index()] = __uint_as_float(word);
    of_span[at_.speaks + warp_index()] = speaks ? 1.0f : 0.0f;
  }

  __device__ void load_group(CodeWords<kBits> (&words)[2], int index) const {
    const std::byte* codes =
        group(index) + p_.kv.ghosts.format.key_bytes() + column() / 8 * 64 * kBits;
    words[0].load(codes, column() % 8), words[1].load(codes + 32 * kBits, column() % 8);
  }
  __device__ bool adds(const float* of_span, int group) const {
    return team_ < p_.n_teams && group < kSpanGroups && of_span[at_.speaks + group] != 0;
  }
  __device__ void load_codes(int span, const float* of_span) {
    if constexpr (kBits > 0) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int of = team_ + k * p_.n_teams;
        if (adds(of_span, of)) load_group(codes_[k], span * kSpanGroups + of);
      }
    }
  }
  __device__ void sum_group(const float* of_span, const CodeWords<kBits> (&words)[2], int of) {
#pragma unroll
    for (int i = 0; i < kTiledQueries; i += kQuad)
      if (i < chunk_.n) thaw::sum_group<kBits>(sums, of_span, at_, i, words, of);
  }
  __device__ void sum(int span, const float* of_span) {
#pragma unroll
    for (int k = 0; k < kAhead; ++k) {
      const int of = team_ + k * p_.n_teams;
      if (adds(of_span, of)) sum_group(of_span, codes_[k], of);
    }
#pragma unroll 1
    for (int of = team_ + kAhead * p_.n_teams; of < kSpanGroups; of += p_.n_teams) {
      if (!adds(of_span, of)) continue;
      CodeWords<kBits> words[2];
      load_group(words, span * kSpanGroups + of);
      sum_group(of_span, words, of);
    }
  }

  const TieredProblem& p_;
  float* shared_;
  const AnswerLayout& at_;
  const QueryChunk& chunk_;
  const int kv_len_, team_;
  const float unit_, recall_, faintest_;
  float scores_[kTiledQueries];
  const std::byte* page_;
  std::byte scale_{};  // as it is stored: who computes with it waits for it
  CodeWords<kBits == 0 ? 1 : kBits> codes_[kAhead][2];
};

// The states and sums of the block's threads into p.answered.
__device__ inline void join_answers(const TieredProblem& p, float* shared, const AnswerLayout& at,
                                    const QueryChunk& chunk, int split,
                                    const float (&l)[kTiledQueries],
                                    const float (&ps)[kTiledQueries],
                                    const float (&sums)[kTiledQueries][2]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int thread = static_cast<int>(threadIdx.x), dim = f.padded_dim();
  const int column = thread % (dim / 2), team = thread / (dim / 2);
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= chunk.n) break;
    float* state = shared + at.states + 2 * (warp_index() * kTiledQueries + i);
    const float warp_l = warp_sum(l[i]), warp_ps = warp_sum(ps[i]);
    if (lane_index() == 0) state[0] = warp_l, state[1] = warp_ps;
    if (team >= p.n_teams) continue;
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
    for (int t = 0; t < p.n_teams; ++t)
      sum += shared[at.sums + (t * kTiledQueries + query) * dim + d];
    p.answered.of(chunk.head + query, split)[d] = sum;
  }
}

// Computes  of up to kTiledQueries queries of a k/v head: who is recalled, ascending, a split,
//           and a part of those rows; of the other ghosts, the sums of their values in rotated
//           space, l and ps, relative to the largest score of all
// Grid      k/v heads x splits of the spans x chunks of queries
// Block     kTiledThreads; a span at a time; for decisions a thread has a token, for sums two
//           dimensions of every n_teams-th group; then recalled rows as attend_rows() has them
// Shared    AnswerLayout, then RowTileLayout
// Bytes     reads the scores of the lane's queries, and value codes and their scales once a chunk,
//           but not those of groups that are faint (kvstore/policy.h), and recalled rows once a
//           chunk, over the bus; writes two parts a query and split
template <KvType kType, int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) answer_frozen(TieredProblem p) {
  const AnswerLayout at(p.kv.ghosts.format, p.lane_queries());
  float* shared = dynamic_shared<float>();
  const QueryChunk chunk(p);
  const int split = static_cast<int>(blockIdx.y);
  const int part = p.recalled_at(chunk.kv_head, static_cast<int>(blockIdx.z), split);
  std::int32_t* list = p.recalled_tokens + static_cast<std::int64_t>(part) * p.recalled_stride;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, thread = static_cast<int>(threadIdx.x);
  const Share share = share_of(p.n_ghosts(kv_len), GhostRope::kSpan, split, p.scored.n_splits);
  if (share.begin >= share.end) {
    if (thread < chunk.n) p.answered.set_state(chunk.head + thread, split, {});
    if (thread < chunk.n) p.recalled.set_state(chunk.head + thread, split, {});
    if (thread == 0) p.n_recalled[part] = 0;
    return;
  }
  GhostAnswerer<kBits> answerer(p, shared, at, chunk, kv_len);
  const int n_recalled = answerer.answer(share, list);
  join_answers(p, shared, at, chunk, split, answerer.l, answerer.ps, answerer.sums);
  if (thread == 0) p.n_recalled[part] = n_recalled;
  __syncthreads();  // answers are read: rows overwrite them
  attend_rows<kType>(
      p, chunk, shared, {0, n_recalled}, p.kv.rows.value_offset,
      [&](int i) { return p.kv.rows.key(chunk.kv_head, list[i]); },
      p.recalled_scores +
          (static_cast<std::int64_t>(chunk.head) * p.scored.n_splits + split) * p.recalled_stride,
      p.scored.n_splits * p.recalled_stride, p.recalled, split);
}

}  // namespace thaw
