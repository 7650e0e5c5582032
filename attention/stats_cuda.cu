#include "attention/stats_cuda.h"

#include <algorithm>

#include "attention/stats_cuda.cuh"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kMaxSplits = 128;
constexpr int kBlocksPerMultiprocessor = 3;  // that both kernels aim at

}  // namespace

void CudaPromptStats::attend(const ExactProblem& exact, const KvView& kv, int stats_rows) {
  const DeviceStats& stats = exact.kv.stats;
  require(stats.probability != nullptr && stats.entropy != nullptr,
          "attend: statistics were asked for, and there is no room for them");
  require(kv.lane_heads >= 1 && kv.n_kv_heads % kv.lane_heads == 0,
          "attend: lane_heads: expected a divisor of ", kv.n_kv_heads, ", found ", kv.lane_heads);
  require(stats.stride >= kv.kv_len || kv.lane_heads == kv.n_kv_heads,
          "attend: statistics: expected room for ", kv.kv_len, " tokens a lane, found ",
          stats.stride);
  const int n_blocks = kBlocksPerMultiprocessor * n_multiprocessors_;
  const auto heads = static_cast<unsigned>(kv.n_kv_heads);
  const unsigned n_lanes = heads / static_cast<unsigned>(kv.lane_heads);
  StatsProblem p = {exact, stats_rows, kv.n_kv_heads, kv.lane_heads, {}, nullptr, nullptr};
  const auto n_chunks = static_cast<unsigned>((p.n_asked() + kTiledQueries - 1) / kTiledQueries);
  p.parts.n_splits = std::clamp(n_blocks / static_cast<int>(heads * n_chunks), 1, kMaxSplits);
  const int n_queries = kv.n_kv_heads * p.n_asked();
  constexpr std::int64_t kTotal = sizeof(StatsProblem::Total) / sizeof(float);
  p.parts.all = numbers_.reserve(p.parts.size(n_queries) + kTotal * n_queries);
  p.totals = reinterpret_cast<StatsProblem::Total*>(p.parts.all + p.parts.size(n_queries));
  p.n_arrived = counts_.reserve_zeros(std::int64_t{heads} * n_chunks, stream_);
  const std::size_t shared = sizeof(float) * static_cast<std::size_t>(stats_shared(p.head_dim));
  const auto n_splits = static_cast<unsigned>(n_blocks / static_cast<int>(n_lanes));
  with_kv_type(kv.type, [&](auto known) {
    constexpr KvType kType = decltype(known)::value;
    launch_overlapping("attend_asked_rows", attend_asked_rows<kType>,
                       dim3(static_cast<unsigned>(p.parts.n_splits), heads, n_chunks),
                       kTiledThreads, shared, stream_, p);
    launch_overlapping("sum_token_stats", sum_token_stats<kType>,
                       dim3(std::max(n_splits, 1u), n_lanes), kTiledThreads, shared, stream_, p);
  });
}

}  // namespace thaw
