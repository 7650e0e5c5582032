// What a store in device memory shows to attention: the part of a KvView that only kernels read.
#pragma once

#include <cstdint>

#include "kvstore/device_rows.h"

namespace thaw {

// Every token of a layer, oldest first. The number of tokens is read by kernels when they run, so
// that a recorded graph serves every length.
struct DeviceView {
  DeviceRows rows;
  const std::int32_t* kv_len;  // in device memory, the running step's tokens included
};

// Whether what reads one reads the same of the other.
inline bool operator==(const DeviceView& a, const DeviceView& b) {
  return a.kv_len == b.kv_len && a.rows.pages == b.rows.pages && a.rows.offset == b.rows.offset &&
         a.rows.value_offset == b.rows.value_offset && a.rows.head_stride == b.rows.head_stride &&
         a.rows.row_bytes == b.rows.row_bytes && a.rows.page_rows == b.rows.page_rows;
}

}  // namespace thaw
