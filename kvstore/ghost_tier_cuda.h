// The ghosts of a store in device memory: GhostTier (kvstore/tiers.h), written by kernels.
#pragma once

#include "device/cuda.h"
#include "kvstore/device_view.h"
#include "kvstore/kvstore.h"
#include "kvstore/pages_cuda.h"
#include "kvstore/step_cuda.h"

namespace thaw {

// Groups have the bits that GhostTier gives them of the same keys and values. A layer has a centre,
// and ghosts, while it has at least centre_tokens tokens; nothing but lengths says so, and so a
// rewind needs nothing here.
class CudaGhostTier {
 public:
  // head_dim: a multiple of 8, at most GhostQuery::kMaxDim.
  CudaGhostTier(PageSource& source, const KvShape& shape, const GhostFormat& format,
                int centre_tokens, const Stream& stream);

  bool present() const { return format_.present(); }
  int centre_tokens() const { return centre_tokens_; }
  void reserve(int n_tokens);  // throws Error when memory is refused
  // Queues the ghosts of the n tokens at *place, and of all before them if they make centre_tokens
  // full. cold: every token of the layer. hot: null, or the hot rows, the last of which is the
  // step's only token; it is read from there, and not over the bus.
  void write(int layer, const DeviceRows& cold, const DeviceHot* hot, const StepPlace* place,
             int n);
  DeviceGhosts view(int layer) const;
  std::int64_t bytes() const { return present() ? pages_.bytes() : 0; }
  std::int64_t bookkeeping_bytes() const;

 private:
  void send_tables(const GhostRope& rope, int capacity);

  KvShape shape_;
  GhostFormat format_;
  int centre_tokens_;
  const Stream& stream_;
  PageTable pages_;
  DeviceBuffer<float> means_;  // layer x head x {key, value} x head_dim
  DeviceBuffer<float> units_;  // layer x head x {key, value}
  DeviceBuffer<DeviceRope::Pair> pairs_;
  DeviceBuffer<float> tables_;  // middle, within, cubic, rows
  DeviceRope rope_;
};

}  // namespace thaw
