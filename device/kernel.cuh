// What kernels are written with: lanes and warps, reductions, wide loads, number formats, tensor
// cores, asynchronous copies. The same source runs under the emulator in tests/simt.
//
// Blocks have one dimension, a multiple of 32 threads, unless a kernel says otherwise.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace thaw {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// The launch's shared_bytes, aligned to 128 bytes; one array a kernel, which it divides up.
template <class T>
__device__ inline T* dynamic_shared() {
#ifdef THAW_EMULATED
  return static_cast<T*>(simt::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
#endif
}

// ---- Reductions: every lane or thread gets the same bits, and the order is fixed.

struct Sum {
  static constexpr float kNeutral = 0;
  __device__ static float join(float a, float b) { return a + b; }
};
struct Max {
  static constexpr float kNeutral = -std::numeric_limits<float>::infinity();
  __device__ static float join(float a, float b) { return fmaxf(a, b); }
};
// Of numbers without signs; NaN is more than all others.
struct MaxOrNan {
  static constexpr float kNeutral = 0;
  __device__ static float join(float a, float b) {
    return __int_as_float(max(__float_as_int(a), __float_as_int(b)));
  }
};

// Of the lanes of a group of kLanes that are kApart apart, powers of two; all 32 lanes of the warp
// call.
template <class Op, int kLanes = kWarp, int kApart = 1>
__device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int step = kLanes / 2; step >= kApart; step /= 2)
    x = Op::join(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Of a whole block; every thread calls.
template <class Op>
__device__ inline float block_reduce(float x) {
  __shared__ float of_warp[kWarp];
  const int n_warps = static_cast<int>(blockDim.x) / kWarp;
  x = warp_reduce<Op>(x);
  if (n_warps == 1) return x;
  __syncthreads();  // of_warp may still be read by the call before
  if (lane_index() == 0) of_warp[warp_index()] = x;
  __syncthreads();  // of_warp is complete
  return warp_reduce<Op>(lane_index() < n_warps ? of_warp[lane_index()] : Op::kNeutral);
}

template <int kLanes = kWarp, int kApart = 1>
__device__ inline float warp_sum(float x) {
  return warp_reduce<Sum, kLanes, kApart>(x);
}
template <int kLanes = kWarp, int kApart = 1>
__device__ inline float warp_max(float x) {
  return warp_reduce<Max, kLanes, kApart>(x);
}
// Lanes 8 i to 8 i + 7 get the sum of x[i] over the warp.
__device__ inline float warp_sums(const float (&x)[4]) {
  const bool upper = lane_index() / 16 != 0, odd = lane_index() / 8 % 2 != 0;
  const float a = (upper ? x[2] : x[0]) + __shfl_xor_sync(kAllLanes, upper ? x[0] : x[2], 16);
  const float b = (upper ? x[3] : x[1]) + __shfl_xor_sync(kAllLanes, upper ? x[1] : x[3], 16);
  return warp_sum<8>((odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8));
}
__device__ inline float block_sum(float x) { return block_reduce<Sum>(x); }
__device__ inline float block_max(float x) { return block_reduce<Max>(x); }

// 2^x within 2^-22 of itself; 0 below 2^-126, as of -infinity. (PTX ISA, ex2.approx.ftz.)
__device__ inline float power_of_two(float x) {
#ifdef THAW_EMULATED
  return x < -126.0f ? 0.0f : exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// ---- Blocks of a launch that have to wait for nobody: the last one to come goes on.

// True, for every thread, in the last of n_blocks blocks that call it, which then sees what all of
// them wrote before. n_arrived: 0 before and after. All threads call. What other blocks wrote must
// be read with __ldcg().
__device__ inline bool last_to_arrive(unsigned* n_arrived, unsigned n_blocks) {
  __threadfence();  // what this thread wrote is seen by whoever sees the count below
  __syncthreads();  // so is what all threads wrote
  bool last = false;
  if (threadIdx.x == 0) {
    last = atomicAdd(n_arrived, 1u) == n_blocks - 1;  // the count that says who is the last
    __threadfence();  // what the others wrote before they counted is seen from here on
    if (last) atomicExch(n_arrived, 0u);  // for the next launch; all others have counted
  }
  return __syncthreads_or(last) != 0;  // the others learn whether theirs is the last block
}

// ---- Wide loads and stores; addresses are multiples of 16.

__device__ inline uint4 load_16(const void* from) { return *static_cast<const uint4*>(from); }
// What is read once, such as weights: it should push nothing out of the caches.
// The emulator counts these, load_4_once and asynchronous copies as the kernel's bytes.
__device__ inline uint4 load_16_once(const void* from) {
#ifdef THAW_EMULATED
  simt::count_bytes(16);
#endif
  return __ldcs(static_cast<const uint4*>(from));
}
__device__ inline std::uint32_t load_4_once(const void* from) {  // for what has rows of 32 bytes
#ifdef THAW_EMULATED
  simt::count_bytes(4);
#endif
  return __ldcs(static_cast<const std::uint32_t*>(from));
}
// Asks for the line of 128 bytes that holds it to come into the L2 cache, and does not wait.
__device__ inline void prefetch_line(const void* at) {
#ifndef THAW_EMULATED
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#else
  static_cast<void>(at);
#endif
}
__device__ inline void store_16(void* to, uint4 value) { *static_cast<uint4*>(to) = value; }

// ---- Number formats. T is float, __half or __nv_bfloat16.

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ inline T from_float(float x) {  // to nearest, ties to even
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, float>) return x;
}

// Floats in their order as unsigned numbers; both zeros are the same.
__device__ inline std::uint64_t in_order(float x) {
  const std::uint32_t bits = __float_as_uint(x + 0.0f);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Two 16-bit numbers in 32 bits, the first one low.
template <class T>
__device__ inline float2 unpack2(std::uint32_t bits) {
  T low, high;
  const auto low_bits = static_cast<std::uint16_t>(bits);
  const auto high_bits = static_cast<std::uint16_t>(bits >> 16);
  memcpy(&low, &low_bits, 2), memcpy(&high, &high_bits, 2);
  return make_float2(to_float(low), to_float(high));
}
template <class T>
__device__ inline std::uint32_t pack2(float low, float high) {
  const T both[2] = {from_float<T>(low), from_float<T>(high)};
  std::uint32_t bits;
  memcpy(&bits, both, 4);
  return bits;
}

// Two numbers as f16, and what is left of them.
struct SplitPair {
  std::uint32_t high, low;

  __device__ SplitPair(float x, float y) : high(pack2<__half>(x, y)) {
    const float2 rounded = unpack2<__half>(high);
    low = pack2<__half>(x - rounded.x, y - rounded.y);
  }
};

// ---- Tensor cores. All 32 lanes call.

// d += A B^T: A is 16 x 16, B is 8 x 16 (both row-major: k is the inner dimension), d is 16 x 8
// f32. T is __half or __nv_bfloat16. With g = lane / 4 and t = lane % 4, each register holding two
// numbers, lane holds of
//   A  a[0]: (g, 2t..)  a[1]: (g + 8, 2t..)  a[2]: (g, 2t + 8..)  a[3]: (g + 8, 2t + 8..)
//   B  b[0]: (g, 2t..)  b[1]: (g, 2t + 8..)
//   d  d[0], d[1]: (g, 2t), (g, 2t + 1)      d[2], d[3]: (g + 8, 2t), (g + 8, 2t + 1)
// (PTX ISA, mma.m16n8k16.) d of one product can be packed into a of the next: columns 2t.. match.
template <class T>
__device__ inline void mma_16x8x16(float (&d)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __half> || std::is_same_v<T, __nv_bfloat16>);
#ifdef THAW_EMULATED
  simt::mma(d, a, b, std::is_same_v<T, __nv_bfloat16>);
#else
  if constexpr (std::is_same_v<T, __half>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// The same of signed 8-bit integers: A is 16 x 32, B is 8 x 32, d is of 32-bit integers. A register
// holds four numbers:
//   A  a[0]: (g, 4t..)  a[1]: (g + 8, 4t..)  a[2]: (g, 4t + 16..)  a[3]: (g + 8, 4t + 16..)
//   B  b[0]: (g, 4t..)  b[1]: (g, 4t + 16..)
__device__ inline void mma_16x8x32(int (&d)[4], const std::uint32_t (&a)[4],
                                   const std::uint32_t (&b)[2]) {
#ifdef THAW_EMULATED
  simt::mma(d, a, b);
#else
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory: lane 8 i + r passes the address (a
// multiple of 16) of row r of matrix i, and gets in registers[i] the numbers (g, 2t), (g, 2t + 1)
// of matrix i, or with kTransposed (2t, g), (2t + 1, g). (PTX ISA, ldmatrix.)
template <bool kTransposed = false>
__device__ inline void load_matrices(std::uint32_t (&registers)[4], const void* row) {
#ifdef THAW_EMULATED
  simt::load_matrices(registers, row, kTransposed);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// ---- Asynchronous copies from global to shared memory, 16 bytes each.

// Begins a copy; zeros instead, and `global` is not read, where `valid` is false.
__device__ inline void cp_async_16(void* shared, const void* global, bool valid = true) {
#ifdef THAW_EMULATED
  simt::cp_async_16(shared, global, valid);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#endif
}
// The same of a small table that every block reads, so that caches have it: no traffic.
__device__ inline void cp_async_16_cached(void* shared, const void* global) {
#ifdef THAW_EMULATED
  simt::cp_async_16(shared, global, true, false);
#else
  cp_async_16(shared, global);
#endif
}
// The same of what is read once: see load_16_once().
__device__ inline void cp_async_16_once(void* shared, const void* global, bool valid) {
#ifdef THAW_EMULATED
  simt::cp_async_16(shared, global, valid);
#else
  const auto address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  std::uint64_t once;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(address),
               "l"(global), "r"(valid ? 16 : 0), "l"(once)
               : "memory");
#endif
}
// The copies that this thread has begun since its last commit form a group.
__device__ inline void cp_async_commit() {
#ifdef THAW_EMULATED
  simt::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's groups, the newest, are on their way. Other threads
// see what arrived after a __syncthreads() that follows.
#ifdef THAW_EMULATED
using simt::cp_async_wait;
#else
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}
#endif

// ---- Programmatic dependent launch; see launch_overlapping() in device/cuda.h.

// Returns when all earlier work on the stream is done and visible. Nothing where it is so anyway.
#ifdef THAW_EMULATED
using simt::wait_for_previous_kernel;
#else
__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif
// Once every block has called it or ended, the next kernel may start, if it was launched to
// overlap.
__device__ inline void let_next_kernel_start() {
#if !defined(THAW_EMULATED) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace thaw
