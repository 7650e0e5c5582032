// A step's tokens: where they stand, and their keys and values rounded into their rows.
#pragma once

#include "kvstore/residency_cuda.h"
#include "kvstore/row_cuda.cuh"

namespace thaw {

inline constexpr int kAppendThreads = 128;

// Computes  *place = value
// Grid      1
// Block     kWarp
// Shared    none
// Bytes     writes a Place
template <class Place>
__global__ void set_place(Place* place, Place value) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (threadIdx.x == 0) *place = value;
}

// A key and a value of one head, into their rows, by a whole block.
template <KvType kType>
__device__ inline void append_row(std::byte* key, std::size_t value_offset, const float* k,
                                  const float* v, int head_dim) {
  const int n_blocks = (head_dim + kRowBlock - 1) / kRowBlock;
  for (int b = warp_index(); b < 2 * n_blocks; b += kAppendThreads / kWarp) {
    const bool is_value = b >= n_blocks;
    store_numbers<kType>(key + (is_value ? value_offset : 0), is_value ? v : k,
                         (is_value ? b - n_blocks : b) * kRowBlock, head_dim);
  }
}

// Computes  the stored rows of a step's tokens: k and v rounded to the store's type
// Grid      T x k/v heads
// Block     kAppendThreads; warps take 32 numbers of the key and the value in turns
// Shared    none
// Bytes     reads k and v, writes their rows
template <KvType kType>
__global__ void append_rows(DeviceRows rows, const float* k, const float* v, const StepPlace* place,
                            int head_dim) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int t = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y);
  const std::int64_t from = (static_cast<std::int64_t>(t) * gridDim.y + head) * head_dim;
  append_row<kType>(const_cast<std::byte*>(rows.key(head, place->first + t)), rows.value_offset,
                    k + from, v + from, head_dim);
}

// Computes  the stored rows of a step's only token, in the cold tier and in the row that is open
//           for it
// Grid      k/v heads
// Block     kAppendThreads
// Shared    none
// Bytes     reads k and v, writes their rows twice
template <KvType kType>
__global__ void append_hot_row(DeviceRows rows, DeviceHot hot, std::int32_t* filled, const float* k,
                               const float* v, const StepPlace* place, int head_dim) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int head = static_cast<int>(blockIdx.x), lane = head / hot.lane_heads;
  const int row = hot.n_rows[lane] - 1;
  const std::int64_t from = static_cast<std::int64_t>(head) * head_dim;
  append_row<kType>(const_cast<std::byte*>(rows.key(head, place->first)), rows.value_offset,
                    k + from, v + from, head_dim);
  const DeviceRows to = hot.rows_of(lane);
  append_row<kType>(const_cast<std::byte*>(to.key(head % hot.lane_heads, row)), to.value_offset,
                    k + from, v + from, head_dim);
  if (head % hot.lane_heads == 0 && threadIdx.x == 0)
    filled[static_cast<std::int64_t>(lane) * hot.room + row] = row;
}

}  // namespace thaw
