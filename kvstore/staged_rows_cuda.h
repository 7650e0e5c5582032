// Exact rows of a prompt's step in device memory, two layers at a time: what attention, statistics
// and ghosts of many new tokens read. From the cold tier they would read the whole context over the
// bus once per tile of queries; so each layer's earlier tokens cross it once a step, by copies on a
// stream of their own while the layer before computes, and the new ones are copied back the same
// way.
#pragma once

#include <vector>

#include "device/cuda.h"
#include "kvstore/cold_tier_cuda.h"
#include "kvstore/device_rows.h"
#include "kvstore/kvstore.h"

namespace thaw {

class CudaStagedRows {
 public:
  // Keeps references. Work that reads and writes staged rows is queued on `stream`.
  CudaStagedRows(const CudaColdTier& cold, const KvShape& shape, const Stream& stream)
      : cold_(cold), shape_(shape), stream_(stream) {}

  // Opens a step of tokens first .. kv_len, for which the cold tier has room. False, and no step is
  // open, where memory is refused, which stderr says once. The stream must have been waited for.
  bool begin(int first, int kv_len);
  // Before a layer's new tokens are written: its earlier ones are in rows(layer) for work that is
  // queued later. Layers come in ascending order.
  void fetch(int layer);
  // After that: they are on their way to the cold tier, and the next layer's to the other buffer.
  void save(int layer);
  // The cold tier has what was saved, for work that is queued later.
  void join() {
    if (is_saving_) stream_.wait(saved_);
    is_saving_ = false;
  }
  // Gives the memory back. The stream must have been waited for since the last join().
  void release() { memory_ = {}, n_pages_ = 0; }

  // Tokens stand as in the cold tier. Valid until save() of the layer after it.
  DeviceRows rows(int layer) const;
  std::int64_t bytes() const { return static_cast<std::int64_t>(memory_.bytes()); }

 private:
  void take_memory(int n_pages);
  std::byte* page(int layer, int index) const;
  std::size_t layer_bytes() const;  // of a page
  void copy_in(int layer);

  const CudaColdTier& cold_;
  const KvShape& shape_;
  const Stream& stream_;
  Stream side_;
  Event ready_;                     // what the side stream has to wait for
  Event fetched_[2], saved_;        // a buffer has its rows; the cold tier has the step's
  DeviceBuffer<std::byte> memory_;  // tables of both buffers, then their pages
  int n_pages_ = 0;                 // of a buffer
  int first_ = 0, kv_len_ = 0;      // the step's tokens
  int in_buffer_[2] = {-1, -1};     // the layer whose rows a buffer has
  bool is_saving_ = false;          // since the last join()
  bool has_warned_ = false;
};

}  // namespace thaw
