// What both kernels of exact attention are given. A query is a row and a head; those of one k/v
// head are numbered row by row: query j is head j % group of row j / group.
#pragma once

#include <cmath>

#include "device/kernel.cuh"
#include "kvstore/device_view.h"

namespace thaw {

struct ExactProblem {
  float* o;        // n_rows x n_heads x head_dim
  const float* q;  // the same
  DeviceView kv;
  int n_rows, n_heads, group, head_dim;
  float scale;  // log2(e) / sqrt(head_dim): scores are powers of two

  __host__ __device__ int n_queries() const { return n_rows * group; }  // of a k/v head
  // Where a query's numbers stand in q and o.
  __device__ std::int64_t at(int kv_head, int query) const {
    return (static_cast<std::int64_t>(query / group) * n_heads + kv_head * group + query % group) *
           head_dim;
  }
  __device__ int visible(int kv_len, int query) const {  // tokens that it sees
    return query < n_queries() ? kv_len - n_rows + query / group + 1 : 0;
  }
};

inline float score_scale(int head_dim) {
  return static_cast<float>(1.4426950408889634 / std::sqrt(double{1} * head_dim));
}

inline constexpr float kLowest = -std::numeric_limits<float>::infinity();  // m of no tokens

// e^(x - m) in powers of two, where nothing was seen yet: 0.
__device__ inline float power(float x, float m) {
  return x == kLowest ? 0.0f : power_of_two(x - m);
}

}  // namespace thaw
