#include "attention/tiered_cuda.h"

#include <algorithm>
#include <cmath>

#include "attention/answers_cuda.cuh"
#include "device/error.h"

namespace thaw {
namespace {

// All parts of a query head, numbered: those of hot rows, then of recalled ones, then of ghosts.
struct HeadParts {
  const TieredProblem& p;
  int head, n_hot, n_exact, n_all;

  __device__ HeadParts(const TieredProblem& of, int query_head)
      : p(of),
        head(query_head),
        n_hot(of.hot.parts.n_splits),
        n_exact(n_hot + (of.has_ghosts() ? of.recalled.parts.n_splits : 0)),
        n_all(n_exact + (of.has_ghosts() ? of.answered.n_splits : 0)) {}
  __device__ PowerState state(int i) const {
    return i < n_hot     ? p.hot.parts.state(head, i)
           : i < n_exact ? p.recalled.parts.state(head, i - n_hot)
                         : p.answered.state(head, i - n_exact);
  }
  __device__ const float* sums(int i) const {
    return i < n_hot     ? p.hot.parts.of(head, i)
           : i < n_exact ? p.recalled.parts.of(head, i - n_hot)
                         : p.answered.of(head, i - n_exact);
  }
};

// What the parts add up to; ghosts: l of ghosts that were not recalled.
struct JoinedHead {
  PowerState state;
  float ghosts, frozen;
};

// weights[i] = what part i is to be multiplied by. All threads call and get the same, and see all
// weights: the sums of the block wait for them.
__device__ JoinedHead join_states(float* weights, const HeadParts& parts) {
  float peak = kLowest;
  for (int i = static_cast<int>(threadIdx.x); i < parts.n_all; i += kTiledThreads) {
    const PowerState part = parts.state(i);
    if (part.l > 0) peak = fmaxf(peak, part.m);
  }
  peak = block_max(peak);
  float l = 0, ps = 0, ghosts = 0, frozen = 0;
  for (int i = static_cast<int>(threadIdx.x); i < parts.n_all; i += kTiledThreads) {
    const PowerState part = parts.state(i);
    const float weight = part.l > 0 ? power(part.m, peak) : 0.0f;
    weights[i] = weight;
    if (weight == 0) continue;
    l += weight * part.l, ps += weight * part.ps;
    if (i >= parts.n_hot) frozen += weight * part.l;
    if (i >= parts.n_exact) ghosts += weight * part.l;
  }
  return {{peak, block_sum(l), block_sum(ps)}, block_sum(ghosts), block_sum(frozen)};
}

// Probabilities, mean over the lane's query heads, of n rows with scores.
__device__ void write_probabilities(const TieredProblem& p, int first, const RowSet& set, int n,
                                    float* probability, float* relevance) {
  const float share = 1.0f / static_cast<float>(p.lane_queries());
  for (int row = static_cast<int>(threadIdx.x); row < n; row += kTiledThreads) {
    float sum = 0, magnitude = 0;
    for (int head = first; head < first + p.lane_queries(); ++head) {
      const float s = set.scores[static_cast<std::int64_t>(head) * set.stride + row];
      const float m = __ldcg(&p.totals[head].m), inverse = __ldcg(&p.totals[head].inverse);
      sum += power(s, m) * inverse;
      magnitude += fabsf(s);
    }
    probability[row] = share * sum;
    if (relevance != nullptr) relevance[row] = share * kLn2 * magnitude;
  }
}

__device__ void write_stats(const TieredProblem& p, int lane) {
  const DeviceStats& stats = p.kv.stats;
  const int first = lane * p.lane_queries();
  const std::int64_t at = static_cast<std::int64_t>(lane) * stats.stride;
  if (stats.probability != nullptr)
    write_probabilities(p, first, p.hot, p.kv.hot.n_rows[lane], stats.probability + at,
                        stats.relevance == nullptr ? nullptr : stats.relevance + at);
  if (p.has_ghosts())
    write_probabilities(
        p, first, p.recalled, stats.n_recalled[lane],
        stats.recalled_probability + static_cast<std::int64_t>(lane) * stats.recalled_room,
        nullptr);
  if (threadIdx.x != 0) return;
  float entropy = 0, ghost_mass = 0;
  for (int head = first; head < first + p.lane_queries(); ++head) {
    entropy += __ldcg(&p.totals[head].entropy);
    ghost_mass += __ldcg(&p.totals[head].ghost_mass);
  }
  const float share = 1.0f / static_cast<float>(p.lane_queries());
  stats.entropy[lane] = share * entropy;
  stats.ghost_mass[lane] = share * ghost_mass;
}

// x = R^T x + weight * mean, over head_dim numbers in shared memory; one warp calls.
__device__ void turn_sums_back(float* x, int head_dim, float weight, const float* mean) {
  float part[kGhostUnits];
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    part[j] = i < head_dim ? x[i] : 0.0f;
  }
  rotate_back_in_warp(part, head_dim);
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    if (i < head_dim) x[i] = fmaf(weight, mean[i], part[j]);
  }
}

// Computes  o of a query head, from the states of all of its splits in order; then, in the last
//           block of a lane, the lane's statistics
// Grid      query heads
// Block     kTiledThreads, a thread for a dimension
// Shared    a weight a part, and 2 x head_dim sums
// Bytes     reads the parts, and the scores of hot and recalled rows; writes o and statistics
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) finish_decode(TieredProblem p) {
  const int head = static_cast<int>(blockIdx.x), kv_head = head / p.group;
  const int lane = kv_head / p.kv.hot.lane_heads;
  const HeadParts parts(p, head);
  float *exact = dynamic_shared<float>(), *rotated = exact + p.head_dim;
  float* weights = rotated + p.head_dim;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const JoinedHead joined = join_states(weights, parts);
  for (int d = static_cast<int>(threadIdx.x); d < p.head_dim; d += kTiledThreads) {
    float sum = 0, turned = 0;
    for (int i = 0; i < parts.n_exact; ++i)
      if (weights[i] > 0) sum = fmaf(weights[i], __ldcg(parts.sums(i) + d), sum);
    for (int i = parts.n_exact; i < parts.n_all && p.answered.n_sums > 0; ++i)
      if (weights[i] > 0) turned = fmaf(weights[i], __ldcg(parts.sums(i) + d), turned);
    exact[d] = sum, rotated[d] = turned;
  }
  __syncthreads();  // all sums are there
  const bool has_ghosts = joined.ghosts > 0;
  if (has_ghosts && warp_index() == 0)
    turn_sums_back(rotated, p.head_dim, joined.ghosts,
                   p.kv.ghosts.means + (2 * kv_head + 1) * p.head_dim);
  __syncthreads();  // ghosts' values have turned back
  const float inverse = 1.0f / joined.state.l;
  for (int d = static_cast<int>(threadIdx.x); d < p.head_dim; d += kTiledThreads)
    p.o[head * p.head_dim + d] = (exact[d] + (has_ghosts ? rotated[d] : 0.0f)) * inverse;
  if (threadIdx.x == 0)
    p.totals[head] = {joined.state.m, inverse, joined.state.entropy(), joined.frozen * inverse};
  if (last_to_arrive(p.n_finished + lane, static_cast<unsigned>(p.lane_queries())))
    write_stats(p, lane);
}

constexpr int kMaxRowSplits = 16;  // hot rows, and recalled ones, are few
constexpr int kMaxGhostSplits = 128;
constexpr int kBlocksPerMultiprocessor = 3;  // that ghosts aim at

int n_chunks(const TieredProblem& p) { return (p.group + kTiledQueries - 1) / kTiledQueries; }

dim3 grid_of(const TieredProblem& p, int n_splits) {
  return dim3(static_cast<unsigned>(n_splits), static_cast<unsigned>(p.n_kv_heads),
              static_cast<unsigned>(n_chunks(p)));
}

std::size_t words(int n) { return static_cast<std::size_t>(n) * 4; }

void check_tiers(const KvView& kv) {
  const DeviceHot& hot = kv.device->hot;
  const GhostFormat& f = kv.device->ghosts.format;
  require(hot.lane_heads >= 1 && hot.n_lanes * hot.lane_heads == kv.n_kv_heads,
          "attend: lanes: expected ", kv.n_kv_heads, " heads in all, found ", hot.n_lanes, " x ",
          hot.lane_heads);
  require(hot.mask_words * kGhostGroup >= kv.kv_len, "attend: hot mask: expected room for ",
          kv.kv_len, " tokens, found ", hot.mask_words * kGhostGroup);
  if (!f.present()) return;
  require(f.head_dim == kv.head_dim, "attend: ghosts: expected head_dim ", kv.head_dim, ", found ",
          f.head_dim);
  require(f.key_bits <= 4 && (f.value_bits <= 2 || f.value_bits == 4) && f.value_bits >= 0,
          "attend: ghosts: expected keys of 1 to 4 bits and values of 0, 1, 2 or 4, found ",
          f.key_bits, " and ", f.value_bits);
}

}  // namespace

void CudaTieredDecode::take_memory(TieredProblem& p, const KvView& kv) {
  const DeviceHot& hot = p.kv.hot;
  const GhostFormat& f = p.kv.ghosts.format;
  const int n_blocks = kBlocksPerMultiprocessor * n_multiprocessors_;
  const int n_splits = std::max(1, n_blocks / (p.n_kv_heads * n_chunks(p)));
  const int n_row_splits = std::min(n_splits, kMaxRowSplits);
  const int n_ghost_splits = std::min(n_splits, kMaxGhostSplits);
  const std::int64_t heads = p.n_heads;
  p.hot = {nullptr, hot.room, {nullptr, n_row_splits, kv.head_dim}};
  p.recalled = {nullptr, p.kv.stats.recalled_room, p.hot.parts};
  p.scored = {nullptr, n_ghost_splits, 0};
  p.answered = {nullptr, n_ghost_splits, f.value_bits > 0 ? f.padded_dim() : 0};
  constexpr int kSpanWords = GhostRope::kSpan / kGhostGroup;
  p.ghost_stride = (hot.mask_words + kSpanWords - 1) / kSpanWords * GhostRope::kSpan;

  const bool ghosts = f.present();
  const std::int64_t sizes[] = {
      heads * static_cast<std::int64_t>(sizeof(HeadTotal) / 4),
      heads * p.hot.stride,
      p.hot.parts.size(p.n_heads),
      ghosts ? heads * p.ghost_stride : 0,
      ghosts ? p.scored.size(p.n_heads) : 0,
      ghosts ? p.answered.size(p.n_heads) : 0,
      ghosts ? heads * p.recalled.stride : 0,
      ghosts ? p.recalled.parts.size(p.n_heads) : 0,
      ghosts ? std::int64_t{hot.n_lanes} * (p.ghost_stride / kGhostGroup) : 0,
  };
  float* at[std::size(sizes)];
  std::int64_t all = 0;
  for (const std::int64_t n : sizes) all += (n + 3) / 4 * 4;
  at[0] = numbers_.reserve(all);
  for (std::size_t i = 1; i < std::size(sizes); ++i) at[i] = at[i - 1] + (sizes[i - 1] + 3) / 4 * 4;
  p.totals = reinterpret_cast<HeadTotal*>(at[0]);
  p.hot.scores = at[1], p.hot.parts.all = at[2];
  p.ghost_scores = at[3], p.scored.all = at[4], p.answered.all = at[5];
  p.recalled.scores = at[6], p.recalled.parts.all = at[7];
  p.recalled_mask = reinterpret_cast<std::uint32_t*>(at[8]);
  p.n_gathered = counts_.reserve_zeros(2 * hot.n_lanes, stream_);
  p.n_finished = p.n_gathered + hot.n_lanes;
}

void CudaTieredDecode::attend_rows_of(const TieredProblem& p, KvType type, bool recalled) {
  const int n_splits = recalled ? p.recalled.parts.n_splits : p.hot.parts.n_splits;
  with_kv_type(type, [&](auto known) {
    launch_overlapping(recalled ? "attend_recalled" : "attend_hot",
                       attend_rows<decltype(known)::value>, grid_of(p, n_splits), kTiledThreads,
                       words(RowTileLayout(p.head_dim).total), stream_, p, recalled);
  });
}

void CudaTieredDecode::ask_ghosts(const TieredProblem& p, const GhostFormat& f) {
  const int n_splits = p.scored.n_splits;
  const auto score = [&](auto kernel) {
    launch_overlapping("score_ghosts", kernel, grid_of(p, n_splits), kTiledThreads,
                       words(GhostQueryLayout(f, p.kv.ghosts.rope.n_fast).total), stream_, p);
  };
  const auto answer = [&](auto kernel) {
    launch_overlapping("answer_ghosts", kernel, grid_of(p, n_splits), kTiledThreads,
                       words(AnswerLayout(f, p.kv.hot.lane_heads * p.group).total), stream_, p);
  };
  if (f.key_bits == 1) score(score_ghosts<1>);
  if (f.key_bits == 2) score(score_ghosts<2>);
  if (f.key_bits == 3) score(score_ghosts<3>);
  if (f.key_bits == 4) score(score_ghosts<4>);
  if (f.value_bits == 0) answer(answer_ghosts<0>);
  if (f.value_bits == 1) answer(answer_ghosts<1>);
  if (f.value_bits == 2) answer(answer_ghosts<2>);
  if (f.value_bits == 4) answer(answer_ghosts<4>);
}

void CudaTieredDecode::finish(const TieredProblem& p) {
  const int n_parts = p.hot.parts.n_splits + p.recalled.parts.n_splits + p.answered.n_splits;
  launch_overlapping("finish_decode", finish_decode, static_cast<unsigned>(p.n_heads),
                     kTiledThreads, words(2 * p.head_dim + n_parts), stream_, p);
}

void CudaTieredDecode::attend(float* o, const float* q, int n_heads, const KvView& kv) {
  check_tiers(kv);
  TieredProblem p = {};
  p.o = o, p.q = q, p.kv = *kv.device;
  p.n_rows = 1, p.n_heads = n_heads, p.group = n_heads / kv.n_kv_heads;
  p.head_dim = kv.head_dim, p.n_kv_heads = kv.n_kv_heads;
  p.scale = score_scale(kv.head_dim);
  take_memory(p, kv);
  attend_rows_of(p, kv.type, false);
  if (p.kv.ghosts.format.present()) {
    ask_ghosts(p, p.kv.ghosts.format);
    attend_rows_of(p, kv.type, true);
  }
  finish(p);
}

}  // namespace thaw
