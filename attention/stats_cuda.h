// What a policy learns from a prompt on the GPU: AttentionStats of exact attention.
#pragma once

#include "attention/growing_buffer_cuda.h"
#include "kvstore/kvstore.h"

namespace thaw {

struct ExactProblem;

class CudaPromptStats {
 public:
  CudaPromptStats(const Stream& stream, int n_multiprocessors)
      : stream_(stream), n_multiprocessors_(n_multiprocessors) {}

  // Writes to p.kv.stats, of the last stats_rows rows. All is f32.
  void attend(const ExactProblem& p, const KvView& kv, int stats_rows);

 private:
  const Stream& stream_;
  const int n_multiprocessors_;
  GrowingBuffer<float> numbers_;
  GrowingBuffer<unsigned> counts_;
};

}  // namespace thaw
