// Activations in the format that a product takes: read once, rounded, written once.
#pragma once

#include "device/kernel.cuh"

namespace thaw {

inline constexpr int kPackThreads = 256;

__device__ inline float silu(float x) { return x / (1 + expf(-x)); }

// Columns 4 quad to 4 quad + 3 of a row, zeros from `cols` on. Rows of whole quads are aligned.
__device__ inline float4 load_quad(const float* row, int quad, int cols) {
  const int at = 4 * quad;
  if (cols % 4 == 0 && at < cols) return reinterpret_cast<const float4*>(row)[quad];
  const auto element = [&](int i) { return at + i < cols ? row[at + i] : 0.0f; };
  return make_float4(element(0), element(1), element(2), element(3));
}

template <class T>
__device__ inline void store_quad(T* row, int quad, float4 x) {
  if constexpr (std::is_same_v<T, float>) {
    reinterpret_cast<float4*>(row)[quad] = x;
  } else {
    const auto within = [](float v) {  // what f16 can hold, and NaN
      if (!std::is_same_v<T, __half>) return v;
      return v > 65504 ? 65504.0f : v < -65504 ? -65504.0f : v;
    };
    reinterpret_cast<uint2*>(row)[quad] =
        make_uint2(pack2<T>(within(x.x), within(x.y)), pack2<T>(within(x.z), within(x.w)));
  }
}

// What pack_rows packs: rows as they are, or silu(gate) * up.
struct PlainRows {
  const float* x;

  struct Quad {
    float4 x;
    __device__ float4 value() const { return x; }
  };
  __device__ Quad load(std::int64_t row, int quad, int cols) const {
    return {load_quad(x + row * cols, quad, cols)};
  }
};
struct GatedRows {
  const float *gate, *up;

  struct Quad {
    float4 gate, up;
    __device__ float4 value() const {
      return make_float4(silu(gate.x) * up.x, silu(gate.y) * up.y, silu(gate.z) * up.z,
                         silu(gate.w) * up.w);
    }
  };
  __device__ Quad load(std::int64_t row, int quad, int cols) const {
    return {load_quad(gate + row * cols, quad, cols), load_quad(up + row * cols, quad, cols)};
  }
};

// Computes  n (T x n_padded) = rows, rounded to T; zeros from `cols` on
// Grid      T
// Block     kPackThreads; threads take four columns in turns, with kLoads turns on their way
// Shared    none
// Bytes     reads the rows, writes n
template <class T, class Rows>
__global__ void __launch_bounds__(kPackThreads) pack_rows(T* n, Rows rows, int cols, int n_padded) {
  constexpr int kLoads = 4;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int n_quads = n_padded / 4, thread = static_cast<int>(threadIdx.x);
  n += static_cast<std::int64_t>(blockIdx.x) * n_padded;
  for (int first = thread; first < n_quads; first += kLoads * kPackThreads) {
    typename Rows::Quad quads[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      quads[j] = rows.load(blockIdx.x, first + j * kPackThreads, cols);
#pragma unroll
    for (int j = 0; j < kLoads; ++j)
      if (first + j * kPackThreads < n_quads)
        store_quad(n, first + j * kPackThreads, quads[j].value());
  }
}

// Computes  n (T x n_padded) = x / sqrt(mean(x^2) + eps) * norm, rounded to T; zeros from `cols` on
// Grid      T
// Block     kPackThreads; threads take four columns in turns, and keep the first kHeld
// Shared    that of block_sum
// Bytes     reads x, columns beyond those that are kept twice, and norm; writes n
template <class T>
__global__ void __launch_bounds__(kPackThreads)
    pack_normalized(T* n, const float* x, const float* norm, float eps, int cols, int n_padded) {
  constexpr int kHeld = 8;
  wait_for_previous_kernel();
  let_next_kernel_start();
  x += static_cast<std::int64_t>(blockIdx.x) * cols;
  n += static_cast<std::int64_t>(blockIdx.x) * n_padded;
  const int n_quads = n_padded / 4, thread = static_cast<int>(threadIdx.x);
  float squares = 0;
  const auto square = [&](float4 v) {
    squares += (v.x * v.x + v.y * v.y) + (v.z * v.z + v.w * v.w);
  };
  float4 held[kHeld];
#pragma unroll
  for (int j = 0; j < kHeld; ++j) held[j] = load_quad(x, thread + j * kPackThreads, cols);
#pragma unroll
  for (int j = 0; j < kHeld; ++j) square(held[j]);
  for (int quad = thread + kHeld * kPackThreads; quad < n_quads; quad += kPackThreads)
    square(load_quad(x, quad, cols));
  const float scale = 1 / sqrtf(block_sum(squares) / static_cast<float>(cols) + eps);
  const auto store = [&](int quad, float4 v) {
    const float4 gain = load_quad(norm, quad, cols);
    store_quad(n, quad,
               make_float4(v.x * (scale * gain.x), v.y * (scale * gain.y), v.z * (scale * gain.z),
                           v.w * (scale * gain.w)));
  };
#pragma unroll
  for (int j = 0; j < kHeld; ++j)
    if (thread + j * kPackThreads < n_quads) store(thread + j * kPackThreads, held[j]);
  for (int quad = thread + kHeld * kPackThreads; quad < n_quads; quad += kPackThreads)
    store(quad, load_quad(x, quad, cols));
}

}  // namespace thaw
