// Pages that kernels read: in device memory, and in pinned host memory.
#pragma once

#include <cstddef>
#include <memory>

#include "device/cuda.h"
#include "kvstore/pages.h"

namespace thaw {

// Pages are zeroed by work on `stream`, which must outlive the source.
std::unique_ptr<PageSource> make_device_pages(const Stream& stream);
// The host reads them, too, after work that writes them is done. Where the system refuses to pin
// more memory, and the device can do without, pages are plain memory; stderr says so, and the cost.
std::unique_ptr<PageSource> make_pinned_pages();

// Pages of one size with a table of them in device memory, which stays where it is.
class PageTable {
 public:
  PageTable(PageSource& source, std::size_t page_bytes, std::size_t max_pages, const char* what);

  // At least n pages are in the table, for work on `stream` that comes later. Throws Error when
  // memory is refused; pages that were taken until then stay for the next call.
  void reserve(std::size_t n, const Stream& stream);
  std::size_t page_bytes() const { return page_bytes_; }
  const std::byte* const* on_device() const { return table_.data(); }
  const std::byte* const* on_host() const { return host_table_.data(); }  // the same addresses
  std::int64_t bytes() const {                                            // of the pages
    return static_cast<std::int64_t>(n_pages_ * page_bytes_);
  }
  std::int64_t table_bytes() const { return static_cast<std::int64_t>(table_.bytes()); }

 private:
  PageSource& source_;
  std::size_t page_bytes_, n_pages_ = 0, n_sent_ = 0;
  const char* what_;
  DeviceBuffer<const std::byte*> table_;
  PinnedBuffer<const std::byte*> host_table_;
};

}  // namespace thaw
