// rotate() and rotate_back() of kvstore/ghost.h by a warp: lane l has numbers l, l + 32, ... of a
// head, and zeros beyond it. The bits are the CPU's. All lanes call.
#pragma once

#include "device/kernel.cuh"
#include "kvstore/ghost.h"
#include "kvstore/ghost_code.h"

namespace thaw {

inline constexpr int kGhostUnits = GhostQuery::kMaxDim / kWarp;  // numbers of a head a lane has

// The size of the Hadamard transform that number i is in: transforms are of the powers of two that
// make up head_dim, the largest first, so it is the highest one that head_dim has and i has not.
__device__ inline int hadamard_block(int i, int head_dim) {
  return i < head_dim ? 1 << (31 - __clz(i ^ head_dim)) : 0;
}

__device__ inline void hadamard_in_warp(float (&x)[kGhostUnits], int head_dim) {
  const int lane = lane_index();
  int block[kGhostUnits];
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) block[j] = hadamard_block(lane + j * kWarp, head_dim);
#pragma unroll
  for (int width = 1; width < kWarp; width *= 2) {
#pragma unroll
    for (int j = 0; j < kGhostUnits; ++j) {
      const float other = __shfl_xor_sync(kAllLanes, x[j], width);
      if (width < block[j]) x[j] = (lane & width) != 0 ? other - x[j] : x[j] + other;
    }
  }
#pragma unroll
  for (int width = 1; width < kGhostUnits; width *= 2) {
#pragma unroll
    for (int j = 0; j < kGhostUnits; ++j) {
      if ((j & width) != 0 || width * kWarp >= block[j]) continue;
      const float a = x[j], b = x[j | width];
      x[j] = a + b, x[j | width] = a - b;
    }
  }
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j)
    if (block[j] > 0) x[j] *= 1.0f / sqrtf(static_cast<float>(block[j]));
}

__device__ inline void flip_signs(float (&x)[kGhostUnits]) {
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) x[j] *= rotation_sign(lane_index() + j * kWarp);
}

__device__ inline void rotate_in_warp(float (&x)[kGhostUnits], int head_dim) {
  flip_signs(x);
  hadamard_in_warp(x, head_dim);
}

__device__ inline void rotate_back_in_warp(float (&x)[kGhostUnits], int head_dim) {
  hadamard_in_warp(x, head_dim);
  flip_signs(x);
}

}  // namespace thaw
