// What a pass over logits finds, slice by slice: the sums of their entropy, and the two best
// choices.
#pragma once

#include <limits>

#include "device/kernel.cuh"

namespace thaw {

using Weight = unsigned long long;

inline constexpr int kSampleThreads = 256, kPerThread = 4, kSlice = kSampleThreads * kPerThread;
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Of a slice of the logits: entropy's sums, relative to the largest, and the two best choices.
struct Slice {
  float m, l, lx;  // largest x, infinity where one is not finite; sums of e^(x-m), (x-m) e^(x-m)
  Weight first, second;
};

// A choice as a number: the larger logit is larger, and of two that are the same the lower id.
__device__ inline Weight key_of(float x, int id) {
  return in_order(x) << 32 | (0xffffffffu - static_cast<unsigned>(id));
}
__device__ inline int id_of(Weight key) {
  return static_cast<int>(0xffffffffu - static_cast<unsigned>(key & 0xffffffffu));
}

struct Best {
  Weight first, second;

  __device__ void see(Weight a, Weight b) {  // a > b
    const Weight lost = first < a ? first : a;
    first = first < a ? a : first;
    second = second < lost ? lost : second;
    second = second < b ? b : second;
  }
  __device__ void join_warp() {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const Weight a = __shfl_xor_sync(kAllLanes, first, step);
      const Weight b = __shfl_xor_sync(kAllLanes, second, step);
      see(a, b);
    }
  }
  // Every thread of the block calls, once in a kernel for each `of_warp`.
  __device__ void join_block(Best (&of_warp)[kSampleThreads / kWarp]) {
    join_warp();
    if (lane_index() == 0) of_warp[warp_index()] = *this;
    __syncthreads();  // of_warp is complete
    *this = {};
    for (const Best& other : of_warp) see(other.first, other.second);
  }
};

__device__ inline bool is_finite(float x) { return fabsf(x) < kInfinity; }

__device__ inline int index_of(int j) {
  return static_cast<int>(blockIdx.x) * kSlice + j * kSampleThreads + static_cast<int>(threadIdx.x);
}

// Of this block's slice of n logits, and of the first n_vocab of `choices`, which are the same with
// penalties.
__device__ inline Slice survey(const float* logits, const float* choices, int n, int n_vocab) {
  __shared__ Best of_warp[kSampleThreads / kWarp];
  float x[kPerThread], m = -kInfinity, l = 0, lx = 0;
  Best best = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const int i = index_of(j);
    x[j] = i < n ? logits[i] : -kInfinity;
    m = i >= n || is_finite(x[j]) ? fmaxf(m, x[j]) : kInfinity;
    if (i >= n_vocab) continue;
    if (!is_finite(choices[i])) m = kInfinity;
    best.see(key_of(choices[i], i), 0);
  }
  m = block_max(m);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if (index_of(j) >= n) continue;
    const float e = expf(x[j] - m);
    l += e, lx += e * (x[j] - m);
  }
  l = block_sum(l), lx = block_sum(lx);
  best.join_block(of_warp);
  return {m, l, lx, best.first, best.second};
}

// What all slices have in common, in a fixed order.
__device__ inline Slice join_slices(const Slice* slices, int n_slices) {
  __shared__ Best of_warp[kSampleThreads / kWarp];
  float m = -kInfinity, l = 0, lx = 0;
  Best best = {};
  for (int i = static_cast<int>(threadIdx.x); i < n_slices; i += kSampleThreads) {
    m = fmaxf(m, __ldcg(&slices[i].m));
    best.see(__ldcg(&slices[i].first), __ldcg(&slices[i].second));
  }
  m = block_max(m);
  for (int i = static_cast<int>(threadIdx.x); i < n_slices; i += kSampleThreads) {
    const float by = __ldcg(&slices[i].m) - m, old = __ldcg(&slices[i].l), share = expf(by);
    l += old * share, lx += (__ldcg(&slices[i].lx) + old * by) * share;
  }
  l = block_sum(l), lx = block_sum(lx);
  best.join_block(of_warp);
  return {m, l, lx, best.first, best.second};
}

}  // namespace thaw
