// Rows of keys and values as kernels see them; the layout is that of KvRows (kvstore/kvstore.h).
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace thaw {

// Row i of a head stands in page i >> page_shift. The table of pages is in device memory, the pages
// in device or pinned memory.
struct DeviceRows {
  const std::byte* const* pages;
  std::size_t offset;        // bytes from a page's start to its first key of head 0
  std::size_t value_offset;  // bytes from a key to its value
  std::size_t head_stride;   // bytes from a head to the next
  std::size_t row_bytes;     // bytes from a row to the next
  int page_shift;            // a page has 2^page_shift rows of each head

  __host__ __device__ int page_rows() const { return 1 << page_shift; }
  __device__ const std::byte* key(int head, int row) const {
    return pages[row >> page_shift] + offset + static_cast<std::size_t>(head) * head_stride +
           static_cast<std::size_t>(row & (page_rows() - 1)) * row_bytes;
  }
  __device__ const std::byte* value(int head, int row) const {
    return key(head, row) + value_offset;
  }
  bool operator==(const DeviceRows&) const = default;
};

}  // namespace thaw
