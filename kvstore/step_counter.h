// What decode steps add up to: a store's counters, and the line of each step for its recorder.
#pragma once

#include <span>

#include "kvstore/kvstore.h"

namespace thaw {

// What a lane did in a step, in tokens.
struct LaneStep {
  int n_rows = 0;                     // hot when it was over
  int n_attended = 0;                 // hot rows that were read; where all are attended, any number
  int n_recalled = 0;                 // read in place; likewise
  int promoted = 0;                   // made hot after a recall
  int thawed = 0;                     // made hot by a timer or by recovery
  int frozen = 0;                     // these three since the step before, which includes resets
  float entropy = 0, ghost_mass = 0;  // of attention; where all are attended, the second is any
  float tau = 0;                      // asr
};

class StepCounter {
 public:
  // Keeps references.
  StepCounter(const KvShape& shape, const PolicyParams& params, int lane_heads);

  struct Layer {
    int index, kv_len, bound;
    bool exact;     // every token was attended
    float epsilon;  // thaw
  };

  void begin(int kv_len);  // a step of which nothing counts until the calls of count()
  void count(const Layer& layer, std::span<const LaneStep> lanes);  // no lanes: nothing freezes
  // The step is over. Returns its line.
  const KvStep& finish(std::int64_t hot_bytes, std::int64_t ghost_bytes);
  void clear() { counters_ = {}; }

  const KvCounters& counters() const { return counters_; }

 private:
  void count_lane(const Layer& layer, const LaneStep& lane);

  const KvShape& shape_;
  const PolicyParams& params_;
  int lane_heads_;
  KvCounters counters_;
  KvStep line_;
};

}  // namespace thaw
