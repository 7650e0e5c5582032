// The ghosts of a store in device memory: GhostTier (kvstore/tiers.h), written by kernels.
#pragma once

#include "device/cuda.h"
#include "kvstore/device_view.h"
#include "kvstore/kvstore.h"
#include "kvstore/pages_cuda.h"
#include "kvstore/step_cuda.h"

namespace thaw {

struct GhostJob;

// Groups have the bits that GhostTier gives them of the same keys and values. A layer has a centre,
// and ghosts, while it has at least centre_tokens tokens; nothing but lengths says so, and a carry
// says which token it is for, and so a rewind needs nothing here.
class CudaGhostTier {
 public:
  // head_dim: a multiple of 8, at most GhostQuery::kMaxDim.
  CudaGhostTier(PageSource& source, const KvShape& shape, const GhostFormat& format,
                int centre_tokens, const Stream& stream);

  bool present() const { return format_.present(); }
  void reserve(int n_tokens);  // throws Error when memory is refused
  // Queues the ghosts of the n tokens at *place, and of all before them if they make centre_tokens
  // full. cold: every token of the layer.
  void write(int layer, const DeviceRows& cold, const StepPlace* place, int n);
  // The same of the only token of a step of decode, in every layer by one kernel. It is the last of
  // the hot rows, and read from there, not over the bus. cold, hot: of layer 0; cold_layer: bytes
  // of a cold page from a layer to the next.
  void write_newest(const DeviceRows& cold, std::size_t cold_layer, const DeviceHot& hot,
                    const StepPlace* place);
  DeviceGhosts view(int layer) const;
  std::int64_t bytes() const { return present() ? pages_.bytes() : 0; }
  std::int64_t bookkeeping_bytes() const;

 private:
  void send_tables(const GhostRope& rope, int capacity);
  GhostJob job_of(int layer, const DeviceRows& cold, const StepPlace* place, int n) const;
  void launch_write(const GhostJob& job, int n_blocks, int n_layers);

  KvShape shape_;
  GhostFormat format_;
  int centre_tokens_;
  const Stream& stream_;
  PageTable pages_;
  DeviceBuffer<float> means_;     // layer x head x {key, value} x head_dim
  DeviceBuffer<float> units_;     // layer x head x {key, value}
  DeviceBuffer<float> carries_;   // layer x head x head_dim: see write_ghost()
  DeviceBuffer<int> carried_to_;  // layer x head: the token that a carry is for
  DeviceBuffer<DeviceRope::Pair> pairs_;
  DeviceBuffer<float> tables_;  // middle, within, cubic
  DeviceBuffer<std::uint16_t> rows_;
  DeviceRope rope_;
};

}  // namespace thaw
