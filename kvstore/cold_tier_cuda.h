// The cold tier where kernels write and read it: ColdTier (kvstore/tiers.h) in pinned host memory,
// with its table of pages in device memory.
#pragma once

#include <memory>

#include "device/cuda.h"
#include "kvstore/device_rows.h"
#include "kvstore/pages_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {

class CudaColdTier {
 public:
  CudaColdTier(const KvShape& shape, bool hashed, const Stream& stream);

  void reserve(int n_tokens);  // throws Error, with nothing lost, when memory is refused
  DeviceRows rows(int layer) const;
  std::size_t layer_bytes() const;  // of a page: from a layer's rows to the next layer's
  // What kernels wrote can be read here, and checked, when the stream has been waited for.
  const ColdTier& host() const { return host_; }
  void wrote(int layer, int token) { host_.wrote(layer, token); }
  std::int64_t table_bytes() const { return static_cast<std::int64_t>(table_.bytes()); }

 private:
  const Stream& stream_;
  std::unique_ptr<PageSource> source_;
  ColdTier host_;
  DeviceBuffer<const std::byte*> table_;
  PinnedBuffer<const std::byte*> host_table_;  // the same; an entry is written once
  std::size_t n_sent_ = 0;
};

}  // namespace thaw
