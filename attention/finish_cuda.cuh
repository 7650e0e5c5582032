// The last kernel of a decode step over two tiers: what all parts of a query head add up to, and
// what the policy learns of a lane.
#pragma once

#include "attention/tiered_cuda.cuh"
#include "kvstore/rotation_cuda.cuh"

namespace thaw {

inline constexpr int kStatsBlocks = 4;   // of a lane, for its rows in turns
inline constexpr int kPartsAtATime = 8;  // whose sums a thread loads before it adds one

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

// weights[i] = what part i is to be multiplied by, where `weights` is not null. All lanes of a warp
// call and get the same.
__device__ inline JoinedHead join_states(float* weights, const HeadParts& parts) {
  const LaneStates states(parts.n_all, [&](int i) { return parts.state(i); });
  const float peak = states.peak();
  float l = 0, ps = 0, ghosts = 0, frozen = 0;
#pragma unroll
  for (int j = 0; j < LaneStates::kEach; ++j) {
    const int i = lane_index() + j * kWarp;
    const PowerState& part = states.of[j];
    const float weight = part.l > 0 ? power(part.m, peak) : 0.0f;
    if (weights != nullptr && i < parts.n_all) weights[i] = weight;
    const float share = weight * part.l;
    l += share, ps += weight * part.ps;
    if (i >= parts.n_hot) frozen += share;
    if (i >= parts.n_exact) ghosts += share;
  }
  return {{peak, warp_sum(l), warp_sum(ps)}, warp_sum(ghosts), warp_sum(frozen)};
}

// Where finish_decode() has its numbers in shared memory; numbers of floats. Blocks of a head have
// weights and sums, blocks of a lane a HeadTotal a query head.
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
    const int n_parts = 2 * kMaxRowSplits + kMaxGhostSplits, n_totals = 4 * p.lane_queries();
    total = weights + n_parts > n_totals ? weights + n_parts : n_totals;
  }
};

// sums[team][d], turned[team][d] = the team's parts of exact rows, and of ghosts in rotated space.
__device__ inline void add_parts(float* shared, const FinishLayout& at, const HeadParts& parts) {
  const int thread = static_cast<int>(threadIdx.x), team = thread / at.units;
  const int d = thread % at.units * 4, head_dim = parts.p.head_dim;
  if (team >= at.n_teams) return;
  const int n = parts.p.answered.n_sums > 0 ? parts.n_all : parts.n_exact;
  float4 exact = make_float4(0, 0, 0, 0), turned = exact;
  for (int first = team; first < n; first += kPartsAtATime * at.n_teams) {
    float4 x[kPartsAtATime];
    float weight[kPartsAtATime];
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      const int i = first + j * at.n_teams;
      weight[j] = i < n && (i >= parts.n_exact || d < head_dim) ? shared[at.weights + i] : 0.0f;
      const float* from = parts.sums(i) + d;  // a load may not stand behind a branch here
      x[j] = make_float4(0, 0, 0, 0);
      if (weight[j] > 0) x[j] = __ldcg(reinterpret_cast<const float4*>(from));
    }
#pragma unroll
    for (int j = 0; j < kPartsAtATime; ++j) {
      const bool ghosts = first + j * at.n_teams >= parts.n_exact;
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
  const HeadParts parts(p, head);
  if (p.has_ghosts())
    for (int d = thread; d < p.head_dim; d += kTiledThreads)
      shared[at.mean + d] = p.kv.ghosts.means[(2 * kv_head + 1) * p.head_dim + d];
  const JoinedHead joined = join_states(warp_index() == 0 ? shared + at.weights : nullptr, parts);
  __syncthreads();  // weights and the mean are there
  add_parts(shared, at, parts);
  __syncthreads();  // all teams' sums are there
  const bool has_ghosts = joined.ghosts > 0;
  if (has_ghosts && warp_index() == 0) turn_sums_back(shared, at, p.head_dim, joined.ghosts);
  __syncthreads();  // ghosts' values have turned back
  const float inverse = 1.0f / joined.state.l;
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

// Probabilities, mean over the lane's query heads, of this block's share of n rows with scores.
__device__ inline void write_probabilities(const TieredProblem& p, const HeadTotal* totals,
                                           int lane, int block, const RowSet& set, int n,
                                           float* probability, float* relevance) {
  const float share = 1.0f / static_cast<float>(p.lane_queries());
  const float* scores =
      set.scores + static_cast<std::int64_t>(lane) * p.lane_queries() * set.stride;
  for (int row = block * kTiledThreads + static_cast<int>(threadIdx.x); row < n;
       row += kStatsBlocks * kTiledThreads) {
    float sum = 0, magnitude = 0;
#pragma unroll 4
    for (int i = 0; i < p.lane_queries(); ++i) {
      const float s = scores[static_cast<std::int64_t>(i) * set.stride + row];
      sum += power(s, totals[i].m) * totals[i].inverse;
      magnitude += fabsf(s);
    }
    probability[row] = share * sum;
    if (relevance != nullptr) relevance[row] = share * kLn2 * magnitude;
  }
}

// block: of the lane's kStatsBlocks.
__device__ inline void write_stats(const TieredProblem& p, HeadTotal* totals, int lane, int block) {
  const DeviceStats& stats = p.kv.stats;
  for (int i = warp_index(); i < p.lane_queries(); i += kTiledWarps) {
    const JoinedHead joined = join_states(nullptr, HeadParts(p, lane * p.lane_queries() + i));
    const float inverse = 1.0f / joined.state.l;
    if (lane_index() == 0)
      totals[i] = {joined.state.m, inverse, joined.state.entropy(), joined.frozen * inverse};
  }
  const int n_hot = p.kv.hot.n_rows[lane], n_recalled = p.has_ghosts() ? stats.n_recalled[lane] : 0;
  __syncthreads();  // the totals of all heads are there
  const std::int64_t at = static_cast<std::int64_t>(lane) * stats.stride;
  if (stats.probability != nullptr)
    write_probabilities(p, totals, lane, block, p.hot, n_hot, stats.probability + at,
                        stats.relevance == nullptr ? nullptr : stats.relevance + at);
  if (n_recalled > 0)
    write_probabilities(
        p, totals, lane, block, p.recalled, n_recalled,
        stats.recalled_probability + static_cast<std::int64_t>(lane) * stats.recalled_room,
        nullptr);
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
    write_stats(p, reinterpret_cast<HeadTotal*>(shared), of_lane / kStatsBlocks,
                of_lane % kStatsBlocks);
}

}  // namespace thaw
