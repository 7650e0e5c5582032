// One decode step's attention over two tiers on the CPU: hot tokens exactly, frozen ones through
// their ghosts, and those whose ghosts weigh enough exactly, in place, from the cold tier.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "attention/exact_cpu.h"
#include "attention/softmax_state.h"
#include "device/thread_pool.h"
#include "kvstore/kvstore.h"

namespace thaw {

// Three passes over each lane:
//   1. queries are prepared for ghosts, and hot rows are attended.
//   2. ghosts are scored. All states together are the softmax's normaliser.
//   3. ghosts of probability >= recall are replaced by exact tokens; the values of the rest are
//      summed in rotated space, but for groups that are faint (kvstore/policy.h).
// Then each head's partial states are merged in a fixed order. The passes of all lanes are one loop
// of tasks, in which a task waits for those before it that it needs, so that threads meet once a
// layer and not once a pass; what ends a pass of a lane is done by its last task. A thread takes
// the same heads and ranges in each layer, if it can, and answers for ranges that it has scored:
// their codes and scores are in its core's caches. What another reads is put together in memory of
// the thread's own first: a core that asks another for a line would be held up at each addition.
class TieredDecode {
 public:
  explicit TieredDecode(ThreadPool& pool)
      : pool_(pool), scratch_(pool.size()), heads_(pool.size()), scores_(pool.size()) {}

  // As Attention::attend() for a view with lanes.
  void attend(float* o, const float* q, int n_heads, const KvView& kv, AttentionStats& stats);

 private:
  static constexpr int kClaimed = -1;

  // A range of ghosts of one lane, after pass 3.
  struct Range {
    std::vector<std::int32_t> recalled;  // tokens, ascending
    std::vector<float> scores;           // query head x recalled: exact
  };

  // What tasks wait for, of a k/v head and of a lane. There are at most as many lanes as heads.
  struct alignas(64) Waits {
    Flag prepared;               // of the head
    Countdown scored, answered;  // of the lane
    Flag normalised;             // likewise
  };

  void prepare(const float* q, const KvView& kv, int n_heads);
  void prepare_head(const KvView& kv, int head);
  void attend_hot(const KvView& kv, int kv_head, ExactScratch& scratch);
  void score_range(const KvView& kv, int kv_head, int range);
  void normalise(const KvView& kv, int lane);
  int claim_range(int lane, int thread);
  void answer_range(const KvView& kv, int lane, int range, ExactScratch& scratch);
  void find_recalled(const KvView& kv, int lane, int range);
  void silence(const KvView& kv, int lane, int range);
  void recall(const KvView& kv, int lane, int range, ExactScratch& scratch);
  void sum_values(const KvView& kv, int lane, int range);
  void sum_values(const KvView& kv, int head, int n, int range);
  void finish_head(float* o, const KvView& kv, int head);
  void fill_stats(AttentionStats::Lane& out, const KvView& kv, int lane) const;
  void count_scored(const KvView& kv, int lane);
  void finish_lane(float* o, AttentionStats& stats, const KvView& kv, int lane);
  void fill_recalled(AttentionStats::Lane& out, const KvView& kv, int lane) const;

  std::size_t at(int of, int range) const {  // of a query head, or a lane
    return static_cast<std::size_t>(of) * n_ranges_ + range;
  }
  int queries_per_lane(const KvView& kv) const { return kv.lane_heads * group_; }
  float* ghost_row(int head) {
    return ghost_.data() + static_cast<std::size_t>(head) * ghost_stride_;
  }

  ThreadPool& pool_;
  std::vector<ExactScratch> scratch_;  // one a thread
  const float* q_ = nullptr;
  int group_ = 0, dim_ = 0, n_ranges_ = 0;
  std::size_t ghost_stride_ = 0, hot_stride_ = 0;
  std::vector<GhostQuery> queries_;           // per query head
  std::vector<float> doubt_;                  // per query head: Caution::factor()
  std::vector<float> hot_scores_;             // query head x hot row: raw scores
  std::vector<SoftmaxState> hot_;             // per query head
  std::vector<float> hot_o_;                  // query head x dim
  std::vector<float> ghost_;                  // query head x token: e^(s - m of its range)
  std::vector<SoftmaxState> ghost_state_;     // query head x range
  std::vector<float> ghost_o_;                // query head x range x dim, rotated
  std::vector<SoftmaxState> recalled_state_;  // query head x range
  std::vector<float> recalled_o_;             // query head x range x dim
  std::vector<SoftmaxState> total_;           // per query head: first estimated, then final
  std::vector<float> ghost_mass_;             // per query head
  std::vector<Range> ranges_;                 // lane x range
  std::vector<std::atomic<int>> scorers_;     // lane x range: a thread, or kClaimed
  std::vector<Waits> waits_;                  // per k/v head
  Claims heads_, scores_;                     // k/v heads; k/v head x range
};

}  // namespace thaw
