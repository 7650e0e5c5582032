// The hot tier on the device, between steps: when lanes are seeded, opened, cut and woken, and what
// memory they have for it. Inside a step only kernels work on it (kvstore/residency_cuda.h).
#pragma once

#include <vector>

#include "kvstore/bounds.h"
#include "kvstore/lanes_cuda.h"
#include "kvstore/recovery.h"
#include "kvstore/step_counter.h"

namespace thaw {

class CudaHotTier {
 public:
  // cold: of layer 0. steps: of the store, for its number of decode steps. Keeps references.
  CudaHotTier(PageSource& source, const KvShape& shape, const KvOptions& options, KvBounds& bounds,
              const DeviceRows& cold, const StepCounter& steps, const Stream& stream);

  // A step at tokens [first, kv_len). What earlier steps reported must be here. Throws Error, with
  // no token lost, when memory is refused; waits for the stream where hot tokens are chosen.
  void reserve(int kv_len, int stats_of);  // stats_of: tokens of which exact statistics are asked
  void begin_exact(int first, int kv_len);
  // Two of decode. Hot tokens are chosen, if that is still to be done; returns whether it was. Then
  // every lane has a row for one more. Where recovery attends every token, lanes stay as they are.
  bool seed(int first);
  void begin_decode(int first);
  // Queues what a layer's exact attention, or the end of a step of decode, teaches.
  void learn(int layer, int n_rows) const;
  void settle();
  void end_exact() { seeded_ = false; }
  void end_decode() { relief_.step(); }

  void close(int first);  // gives up what begin_decode() opened, if it did
  // Without the tokens from `position` on; length: tokens so far. These two wait for the stream.
  void cut(int position, int length);
  double reset(Rung rung, int kv_len, int exact_steps);  // returns tokens woken

  bool attends_all() const { return relief_.exact_steps > 0; }  // in decode steps, for recovery
  bool is_seeded() const { return seeded_; }  // hot tokens were chosen since the last exact step
  float epsilon() const { return relief_.epsilon(options_.policy); }
  bool can_freeze(int kv_len) const;
  const DeviceMoment* moment() const { return moment_.data(); }
  const CudaLanes& lanes() const { return lanes_; }
  LaneStep take_step(int lane) const;  // of the last step, and since last asked
  std::int64_t bookkeeping_bytes() const;

 private:
  LaneWork work(bool next) const {
    return lanes_.work(moment_.data(), limits_.data() + (next ? shape_.n_layers : 0));
  }
  void send_moment(int first, int kv_len);
  void send_limits(int kv_len);
  void choose(int kv_len);
  void open(int kv_len);
  int most_rows(int n_rows, int bound, int kv_len) const;
  double wake(Rung rung, int kv_len);

  const KvShape& shape_;
  const KvOptions& options_;
  const StepCounter& steps_;
  const Stream& stream_;
  KvBounds& bounds_;
  CudaLanes lanes_;
  DeviceBuffer<DeviceMoment> moment_;
  DeviceBuffer<std::int32_t> limits_;       // a layer, before the step's token; likewise, with it
  PinnedBuffer<std::int32_t> host_limits_;  // the same
  Event limits_read_;                       // host_limits_ may be written again
  mutable std::vector<LaneTally> taken_;    // a lane: what take_step() told
  Relief relief_;
  bool seeded_ = false;
  bool is_open_ = false;  // a decode step has begun, and its end is not queued yet
};

}  // namespace thaw
