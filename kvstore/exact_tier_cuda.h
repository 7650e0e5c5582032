// Every token's exact key and value in device memory: all there is under --policy full, and what a
// store with two tiers reads while its context is too short to freeze.
#pragma once

#include <vector>

#include "device/cuda.h"
#include "kvstore/device_rows.h"
#include "kvstore/kvstore.h"

namespace thaw {

// Pages of kTierTokens tokens, laid out as those of ColdTier (kvstore/tiers.h).
class CudaExactTier {
 public:
  CudaExactTier(const KvShape& shape, const Stream& stream);

  // Room for that many tokens, for work that is queued later. Throws Error, with nothing changed,
  // that says how many would fit.
  void reserve(int n_tokens);
  // Gives the memory back, which waits for what reads it.
  void release() { pages_.clear(); }

  DeviceRows rows(int layer) const;
  std::byte* page(int index) const { return pages_[static_cast<std::size_t>(index)].data(); }
  std::size_t page_bytes() const;
  int room() const;  // tokens
  // KvStore::read(); waits for the stream.
  void read(int layer, int first, int n_tokens, std::byte* rows) const;

  std::int64_t bytes() const;
  std::int64_t table_bytes() const { return static_cast<std::int64_t>(table_.bytes()); }
  // Throws Error when the device's table is not that of the pages; waits for the stream.
  void check() const;

 private:
  KvShape shape_;
  const Stream& stream_;
  std::vector<DeviceBuffer<std::byte>> pages_;
  DeviceBuffer<const std::byte*> table_;       // of the pages; room for all
  PinnedBuffer<const std::byte*> host_table_;  // the same, which copies read
};

}  // namespace thaw
