// A store's pages, copied to the device: what kernels that read keys and values are tested with.
#pragma once

#include <vector>

#include "device/cuda.h"
#include "kvstore/device_view.h"
#include "kvstore/kvstore.h"
#include "kvstore/tiers.h"

namespace thaw::testing {

class DevicePages {
 public:
  // Of the exact tokens of one layer of a store in host memory.
  DevicePages(const KvStore& store, int layer, const Stream& stream) : view_(store.view(layer)) {
    const std::size_t bytes =
        kTierTokens * static_cast<std::size_t>(store.shape().bytes_per_token());
    std::vector<const std::byte*> table;
    for (const std::byte* page : view_.cold.pages) {
      pages_.emplace_back(bytes, "page");
      copy_to_device(pages_.back().data(), page, bytes, stream);
      table.push_back(pages_.back().data());
    }
    table_ = DeviceBuffer<const std::byte*>(table.size(), "table");
    copy_to_device(table_.data(), table.data(), table.size(), stream);
    kv_len_ = DeviceBuffer<std::int32_t>(1, "kv_len");
    copy_to_device(kv_len_.data(), &view_.kv_len, 1, stream);
    const KvRows& r = view_.cold;
    device_ = {{table_.data(), r.offset, r.value_offset, r.head_stride, r.row_bytes, r.page_shift},
               kv_len_.data()};
    view_.device = &device_;
    stream.synchronize();
  }
  DevicePages(const DevicePages&) = delete;
  DevicePages& operator=(const DevicePages&) = delete;

  const KvView& view() const { return view_; }

 private:
  KvView view_;
  DeviceView device_;
  std::vector<DeviceBuffer<std::byte>> pages_;
  DeviceBuffer<const std::byte*> table_;
  DeviceBuffer<std::int32_t> kv_len_;
};

}  // namespace thaw::testing
