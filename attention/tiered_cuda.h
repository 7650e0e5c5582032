// One decode step's attention over two tiers on the GPU: hot tokens exactly, frozen ones through
// their ghosts, and those whose ghosts weigh enough exactly, in place, from the cold tier.
#pragma once

#include <cstdint>

#include "attention/growing_buffer_cuda.h"
#include "kvstore/kvstore.h"

namespace thaw {

struct TieredProblem;

class CudaTieredDecode {
 public:
  CudaTieredDecode(const Stream& stream, int n_multiprocessors)
      : stream_(stream), n_multiprocessors_(n_multiprocessors) {}

  // As Attention::attend() for a view with lanes, all in device memory: statistics go to
  // kv.device->stats. Any number of query heads a k/v head; what else does not fit is an Error.
  void attend(float* o, const float* q, int n_heads, const KvView& kv);

 private:
  void take_memory(TieredProblem& p, const KvView& kv);
  void attend_tiers(const TieredProblem& p, KvType type, const GhostFormat& format);
  void finish(const TieredProblem& p);

  const Stream& stream_;
  const int n_multiprocessors_;
  GrowingBuffer<float> numbers_;
};

}  // namespace thaw
