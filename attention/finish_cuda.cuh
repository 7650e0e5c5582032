// The last kernel of a decode step over two tiers: what all parts of a query head add up to, and
// what the policy learns of a lane.
#pragma once

#include "attention/tiered_cuda.cuh"
#include "kvstore/rotation_cuda.cuh"

namespace thaw {

inline constexpr int kStatsBlocks = 4;   // of a lane, for its rows in turns
inline constexpr int kPartsAtATime = 8;  // whose sums a thread loads before it adds one

// The states of n parts of a head, a few a lane, all of which are on their way before one is looked
// at. Where a lane has fewer, the others are of no tokens.
struct LaneStates {
  static constexpr int kEach = (kMaxParts + kWarp - 1) / kWarp;
  PowerState of[kEach];

  template <class StateOf>
  __device__ LaneStates(int n, const StateOf& state_of) {
#pragma unroll
    for (int j = 0; j < kEach; ++j)
      if (j * kWarp < n) of[j] = state_of(min(lane_index() + j * kWarp, n - 1));
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

// The parts of a query head, numbered: those of hot rows, then of recalled ones, then of ghosts.
struct HeadParts {
  const TieredProblem& p;
  int head, n_hot, n_exact, n_all;

  // n_frozen: splits of the ghosts.
  __device__ HeadParts(const TieredProblem& of, int query_head, int n_hot_splits, int n_frozen)
      : p(of),
        head(query_head),
        n_hot(n_hot_splits),
        n_exact(n_hot + n_frozen),
        n_all(n_exact + n_frozen) {}
  __device__ PowerState state(int i) const {
    return i < n_hot     ? p.hot.state(head, i)
           : i < n_exact ? p.recalled.state(head, i - n_hot)
                         : p.answered.state(head, i - n_exact);
  }
  __device__ const float* sums(int i) const {
    return i < n_hot     ? p.hot.of(head, i)
           : i < n_exact ? p.recalled.of(head, i - n_hot)
                         : p.answered.of(head, i - n_exact);
  }
};

// What the parts add up to; ghosts: l of ghosts that were not recalled.
struct JoinedHead {
  float l, ghosts;
  int n_exact, n_all;  // parts that are not empty, in their order
};

// What a part that is not empty is to be multiplied by.
struct PartWeight {
  int part;
  float weight;
};

// weights: null, or those of all parts that are not empty. All lanes of a warp call and get the
// same.
__device__ inline JoinedHead join_states(PartWeight* weights, const HeadParts& parts) {
  const LaneStates states(parts.n_all, [&](int i) { return parts.state(i); });
  const float peak = states.peak();
  float l = 0, ghosts = 0;
  int n_exact = 0, n_all = 0;
#pragma unroll
  for (int j = 0; j < LaneStates::kEach; ++j) {
    if (j * kWarp >= parts.n_all) break;
    const int i = lane_index() + j * kWarp;
    const PowerState& part = states.of[j];
    const float weight = part.l > 0 ? power(part.m, peak) : 0.0f;
    const unsigned present = __ballot_sync(kAllLanes, weight > 0);
    const unsigned exact = __ballot_sync(kAllLanes, weight > 0 && i < parts.n_exact);
    if (weights != nullptr && weight > 0)
      weights[n_all + __popc(present & ((1u << lane_index()) - 1))] = {i, weight};
    n_all += __popc(present), n_exact += __popc(exact);
    const float share = weight * part.l;
    l += share;
    if (i >= parts.n_exact) ghosts += share;
  }
  return {warp_sum(l), warp_sum(ghosts), n_exact, n_all};
}

// Where finish_decode() has its numbers in shared memory; numbers of floats. Blocks of a head have
// weights and sums, blocks of a lane a HeadTotal a query head, and where splits' tokens begin.
struct FinishLayout {
  int mean, sums, turned, weights, total;
  int dim, units,
      n_teams;  // threads of a team have four dimensions each, teams take parts in turns

  __host__ __device__ explicit FinishLayout(const TieredProblem& p)
      : dim((p.head_dim + 15) / 16 * 16), units(dim / 4), n_teams(kTiledThreads / units) {
    mean = 0;
    sums = mean + dim;
    turned = sums + n_teams * dim;
    weights = turned + n_teams * dim;
    const int of_head = weights + 2 * kMaxParts, of_lane = 4 * p.lane_queries() + kMaxGhostSplits;
    total = of_head > of_lane ? of_head : of_lane;
  }
};

// sums[team][d], turned[team][d] = the team's parts of exact rows, and of ghosts in rotated space.
__device__ inline void add_parts(float* shared, const FinishLayout& at, const HeadParts& parts,
                                 const JoinedHead& joined) {
  const int thread = static_cast<int>(threadIdx.x), team = thread / at.units;
  const int d = thread % at.units * 4, head_dim = parts.p.head_dim;
  if (team >= at.n_teams) return;
  const auto* weights = reinterpret_cast<const PartWeight*>(shared + at.weights);
  const int n = parts.p.answered.n_sums > 0 ? joined.n_all : joined.n_exact;
  float4 exact = make_float4(0, 0, 0, 0), turned = exact;
  for (int first = team; first < n; first += kPartsAtATime * at.n_teams) {
    float4 x[kPartsAtATime];
    float weight[kPartsAtATime];
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      const int i = first + j * at.n_teams;
      const PartWeight part = weights[min(i, n - 1)];
      const float* from = parts.sums(part.part) + d;  // a load may not stand behind a branch here
      weight[j] = i < n && (i >= joined.n_exact || d < head_dim) ? part.weight : 0.0f;
      x[j] = make_float4(0, 0, 0, 0);
      if (weight[j] > 0) x[j] = __ldcg(reinterpret_cast<const float4*>(from));
    }
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      const bool ghosts = first + j * at.n_teams >= joined.n_exact;
      add_scaled(exact, x[j], ghosts ? 0.0f : weight[j]);
      add_scaled(turned, x[j], ghosts ? weight[j] : 0.0f);
    }
  }
  *reinterpret_cast<float4*>(shared + at.sums + team * at.dim + d) = exact;
  *reinterpret_cast<float4*>(shared + at.turned + team * at.dim + d) = turned;
}

// turned[0] = R^T (the sum of all teams' sums) + weight * mean, by one warp.
__device__ inline void turn_sums_back(float* shared, const FinishLayout& at, int head_dim,
                                      float weight) {
  float part[kGhostUnits];
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    part[j] = 0;
    for (int team = 0; team < at.n_teams && i < head_dim; ++team)
      part[j] += shared[at.turned + team * at.dim + i];
  }
  rotate_back_in_warp(part, head_dim);
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    if (i < head_dim) shared[at.turned + i] = fmaf(weight, shared[at.mean + i], part[j]);
  }
}

__device__ inline void finish_head(const TieredProblem& p, float* shared, const FinishLayout& at,
                                   int head) {
  const int thread = static_cast<int>(threadIdx.x), kv_head = head / p.group;
  const HeadParts parts(p, head, p.hot.n_splits, p.has_ghosts() ? p.scored.n_splits : 0);
  if (p.has_ghosts())
    for (int d = thread; d < p.head_dim; d += kTiledThreads)
      shared[at.mean + d] = p.kv.ghosts.means[(2 * kv_head + 1) * p.head_dim + d];
  auto* weights = reinterpret_cast<PartWeight*>(shared + at.weights);
  const JoinedHead joined = join_states(warp_index() == 0 ? weights : nullptr, parts);
  __syncthreads();  // weights and the mean are there
  add_parts(shared, at, parts, joined);
  __syncthreads();  // all teams' sums are there
  const bool has_ghosts = joined.ghosts > 0;
  if (has_ghosts && warp_index() == 0) turn_sums_back(shared, at, p.head_dim, joined.ghosts);
  __syncthreads();  // ghosts' values have turned back
  const float inverse = 1.0f / joined.l;
  for (int d = thread; d < p.head_dim; d += kTiledThreads) {
    float sum = has_ghosts ? shared[at.turned + d] : 0.0f;
    for (int team = 0; team < at.n_teams; ++team) sum += shared[at.sums + team * at.dim + d];
    p.o[head * p.head_dim + d] = sum * inverse;
  }
}

// A query head's answer, once all of its parts are joined; inverse: of l.
struct HeadTotal {
  float m, inverse, entropy, ghost_mass;
};

// The probability of a row, mean over the lane's query heads, and of its scores' magnitudes the
// sum. scores: of the lane's first head.
struct LaneMean {
  float probability = 0, magnitude = 0;

  __device__ LaneMean(const TieredProblem& p, const HeadTotal* totals, const float* scores,
                      std::int64_t stride) {
#pragma unroll 4
    for (int i = 0; i < p.lane_queries(); ++i) {
      const float s = scores[i * stride];
      probability += power(s, totals[i].m) * totals[i].inverse;
      magnitude += fabsf(s);
    }
    probability *= 1.0f / static_cast<float>(p.lane_queries());
  }
};

__device__ inline void write_hot_stats(const TieredProblem& p, const HeadTotal* totals, int lane,
                                       int block) {
  const DeviceStats& stats = p.kv.stats;
  const std::int64_t at = static_cast<std::int64_t>(lane) * stats.stride, stride = p.kv.hot.room;
  const float share = 1.0f / static_cast<float>(p.lane_queries());
  const int n = p.kv.hot.n_rows[lane];
  for (int row = block * kTiledThreads + static_cast<int>(threadIdx.x); row < n;
       row += kStatsBlocks * kTiledThreads) {
    const LaneMean mean(p, totals, p.hot_scores + lane * p.lane_queries() * stride + row, stride);
    stats.probability[at + row] = mean.probability;
    if (stats.relevance != nullptr) stats.relevance[at + row] = share * kLn2 * mean.magnitude;
  }
}

// begins[s] = how many of the lane's recalled tokens splits before s have; a warp calls, all of its
// lanes get how many there are.
__device__ inline int count_recalled(std::int32_t* begins, const TieredProblem& p, int lane) {
  const std::int32_t* counts = p.n_recalled + p.recalled_at(lane * p.kv.hot.lane_heads, 0, 0);
  int n[kMaxGhostSplits / kWarp], all = 0;
#pragma unroll
  for (int j = 0; j < kMaxGhostSplits / kWarp; ++j) {
    const int split = lane_index() + j * kWarp;
    n[j] = split < p.scored.n_splits ? counts[split] : 0;
  }
#pragma unroll
  for (int j = 0; j < kMaxGhostSplits / kWarp; ++j) {
    int end = n[j];
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end, step);
      if (lane_index() >= step) end += other;
    }
    if (begins != nullptr) begins[lane_index() + j * kWarp] = all + end - n[j];
    all += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  return all;
}

// The lane's recalled tokens, ascending, and their probabilities; a warp has a split at a time.
__device__ inline void write_recalled(const TieredProblem& p, const HeadTotal* totals,
                                      const std::int32_t* begins, int n_all, int lane, int block) {
  const DeviceStats& stats = p.kv.stats;
  const int n_splits = p.scored.n_splits, head = lane * p.lane_queries();
  const std::int64_t to = static_cast<std::int64_t>(lane) * stats.recalled_room;
  const std::int64_t first = p.recalled_at(lane * p.kv.hot.lane_heads, 0, 0);
  for (int split = block * kTiledWarps + warp_index(); split < n_splits;
       split += kStatsBlocks * kTiledWarps) {
    const int begin = begins[split], end = split + 1 < n_splits ? begins[split + 1] : n_all;
    const std::int32_t* tokens = p.recalled_tokens + (first + split) * p.recalled_stride;
    const std::int64_t at = (std::int64_t{head} * n_splits + split) * p.recalled_stride;
    for (int i = lane_index(); i < end - begin && begin + i < stats.recalled_room; i += kWarp) {
      const LaneMean mean(p, totals, p.recalled_scores + at + i,
                          std::int64_t{n_splits} * p.recalled_stride);
      stats.recalled[to + begin + i] = tokens[i];
      stats.recalled_probability[to + begin + i] = mean.probability;
    }
  }
  if (block == 0 && threadIdx.x == 0) stats.n_recalled[lane] = min(n_all, stats.recalled_room);
}

// block: of the lane's kStatsBlocks.
__device__ inline void write_stats(const TieredProblem& p, float* shared, int lane, int block) {
  const DeviceStats& stats = p.kv.stats;
  auto* totals = reinterpret_cast<HeadTotal*>(shared);
  auto* begins = reinterpret_cast<std::int32_t*>(totals + p.lane_queries());
  int n_recalled = 0;
  if (p.has_ghosts()) n_recalled = count_recalled(warp_index() == 0 ? begins : nullptr, p, lane);
  const int n_hot = p.hot_splits(lane), n_frozen = p.ghost_splits(*p.kv.kv_len);
  sum_heads(
      p.lane_queries(), n_hot, n_hot + 2 * n_frozen,
      [&](int i, int part) {
        return HeadParts(p, lane * p.lane_queries() + i, n_hot, n_frozen).state(part);
      },
      [&](int i, const HeadSum& sum) {
        const float inverse = 1.0f / sum.all.l;
        totals[i] = {sum.all.m, inverse, sum.all.entropy(), sum.frozen * inverse};
      });
  __syncthreads();  // the totals of all heads, and where splits begin, are there
  if (stats.probability != nullptr) write_hot_stats(p, totals, lane, block);
  if (p.has_ghosts()) write_recalled(p, totals, begins, n_recalled, lane, block);
  if (block != 0 || threadIdx.x != 0) return;
  float entropy = 0, ghost_mass = 0;
  for (int i = 0; i < p.lane_queries(); ++i)
    entropy += totals[i].entropy, ghost_mass += totals[i].ghost_mass;
  const float share = 1.0f / static_cast<float>(p.lane_queries());
  stats.entropy[lane] = share * entropy;
  stats.ghost_mass[lane] = share * ghost_mass;
}

// Computes  o of a query head, from the states of all of its splits; or statistics of a lane
// Grid      query heads, then kStatsBlocks a lane: neither waits for the other
// Block     kTiledThreads, a thread for four dimensions of every n_teams-th part; or for a row
// Shared    FinishLayout
// Bytes     reads the parts, and the scores of hot and recalled rows; writes o and statistics
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) finish_decode(TieredProblem p) {
  const FinishLayout at(p);
  float* shared = dynamic_shared<float>();
  const int head = static_cast<int>(blockIdx.x), of_lane = head - p.n_heads;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (head < p.n_heads)
    finish_head(p, shared, at, head);
  else
    write_stats(p, shared, of_lane / kStatsBlocks, of_lane % kStatsBlocks);
}

}  // namespace thaw
