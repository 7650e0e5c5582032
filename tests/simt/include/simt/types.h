// CUDA's qualifiers and vector types.
#pragma once

#include <cstddef>
#include <cstdint>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// Shared memory is one copy a multiprocessor, and a multiprocessor is a thread of the system
// (tests/simt/block.h). Under AddressSanitizer there is only one, and static arrays have red zones.
#ifdef __SANITIZE_ADDRESS__
#define __shared__ static
#else
#define __shared__ static thread_local
#endif

template <class T, int kAlign>
struct alignas(kAlign) simt_vector2 {
  T x, y;
};
template <class T>
struct simt_vector3 {
  T x, y, z;
};
template <class T, int kAlign>
struct alignas(kAlign) simt_vector4 {
  T x, y, z, w;
};

using char4 = simt_vector4<signed char, 4>;
using uchar4 = simt_vector4<unsigned char, 4>;
using short2 = simt_vector2<short, 4>;
using ushort2 = simt_vector2<unsigned short, 4>;
using ushort4 = simt_vector4<unsigned short, 8>;
using int2 = simt_vector2<int, 8>;
using int3 = simt_vector3<int>;
using int4 = simt_vector4<int, 16>;
using uint2 = simt_vector2<unsigned, 8>;
using uint3 = simt_vector3<unsigned>;
using uint4 = simt_vector4<unsigned, 16>;
using float2 = simt_vector2<float, 8>;
using float3 = simt_vector3<float>;
using float4 = simt_vector4<float, 16>;

inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
