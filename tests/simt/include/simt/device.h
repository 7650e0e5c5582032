// What a CUDA thread can ask of its warp and block. Implemented in tests/simt/block.cpp.
#pragma once

#include <cstring>

#include "simt/sites.h"
#include "simt/types.h"

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace simt {

// Each lane of `mask` brings a value and gets one: for kShuffle that of lane `argument`, for the
// others the reduction over all lanes of `mask`. A value is the bits of a number of T, sign- or
// zero-extended for the reductions.
enum class Exchange { kSync, kShuffle, kBallot, kAdd, kMin, kMax, kAnd, kOr, kXor, kMultiply };
std::int64_t exchange(Exchange what, unsigned mask, std::int64_t value, int argument, Where where);

void barrier(Where where);                // __syncthreads
int barrier_sum(int value, Where where);  // __syncthreads_count and its kin
void pause();                             // lets other threads of the block run

void* dynamic_shared();
void count_bytes(std::int64_t bytes);  // adds to counts() of the running kernel
void begin_copy(void* shared, const void* global, bool valid);
// The copy may land at any time from here on: until it is waited for, `shared` holds NaN.
inline void cp_async_16(void* shared, const void* global, bool valid, bool is_traffic = true) {
  if (valid && is_traffic) count_bytes(16);
  if (valid) static_cast<void>(*static_cast<const volatile unsigned*>(global));
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
  begin_copy(shared, global, valid);
}
void cp_async_commit();
// An asynchronous copy that must land now, so that at most `pending` groups are on their way.
struct Landing {
  void* to;
  const void* from;  // null: zeros
  int group;
};
bool next_landing(int pending, Landing& landing);
template <int kPending>
void cp_async_wait(Where where = Where::current()) {
  if (skipped(where)) return;
  for (Landing landing; next_landing(kPending, landing);)
    *static_cast<uint4*>(landing.to) =
        landing.from == nullptr ? uint4{} : *static_cast<const uint4*>(landing.from);
}
void wait_for_previous_kernel(Where where = Where::current());
// mma_16x8x16 of device/kernel.cuh, of f16 or bf16.
void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16,
         Where where = Where::current());
// mma_16x8x32.
void mma(int* d, const std::uint32_t* a, const std::uint32_t* b, Where where = Where::current());

template <class T>
T shuffle(unsigned mask, T value, int source, Where where) {
  static_assert(sizeof(T) <= 8);
  std::int64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = exchange(Exchange::kShuffle, mask, bits, source, where);
  memcpy(&value, &bits, sizeof value);
  return value;
}

int lane();                            // of the running thread

// Lanes tell each other their rows, and each reads what it gets.
inline void load_matrices(std::uint32_t (&registers)[4], const void* row, bool transposed,
                          Where where = Where::current()) {
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const auto at = [&](int r, int c) {
      return shuffle(0xffffffffu, static_cast<const std::uint16_t*>(row), 8 * i + r, where) + c;
    };
    const std::uint16_t* low = transposed ? at(2 * t, g) : at(g, 2 * t);
    const std::uint16_t* high = transposed ? at(2 * t + 1, g) : low + 1;
    registers[i] = *low | static_cast<std::uint32_t>(*high) << 16;
  }
}

}  // namespace simt

inline void __syncthreads(simt::Where where = simt::Where::current()) { simt::barrier(where); }
inline int __syncthreads_count(int value, simt::Where where = simt::Where::current()) {
  return simt::barrier_sum(value != 0, where);
}
inline int __syncthreads_or(int value, simt::Where where = simt::Where::current()) {
  return simt::barrier_sum(value != 0, where) > 0;
}
inline int __syncthreads_and(int value, simt::Where where = simt::Where::current()) {
  return simt::barrier_sum(value == 0, where) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Where where = simt::Where::current()) {
  simt::exchange(simt::Exchange::kSync, mask, 0, 0, where);
}
inline void __nanosleep(unsigned) { simt::pause(); }

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize,
              simt::Where where = simt::Where::current()) {
  const int first = simt::lane() / width * width;
  return simt::shuffle(mask, value, first + source % width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = warpSize,
                  simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), end = (lane / width + 1) * width;
  const int source = lane ^ bits;
  return simt::shuffle(mask, value, source < end ? source : lane, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = warpSize,
                   simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), end = (lane / width + 1) * width;
  return simt::shuffle(mask, value, lane + by < end ? lane + by : lane, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = warpSize,
                 simt::Where where = simt::Where::current()) {
  const int lane = simt::lane(), first = lane / width * width;
  return simt::shuffle(mask, value, lane - by >= first ? lane - by : lane, where);
}

inline unsigned __ballot_sync(unsigned mask, int value,
                              simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(simt::exchange(simt::Exchange::kBallot, mask, value != 0, 0, where));
}
inline int __any_sync(unsigned mask, int value, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, value, where) != 0;
}
inline int __all_sync(unsigned mask, int value, simt::Where where = simt::Where::current()) {
  return __ballot_sync(mask, !value, where) == 0;
}

// T is int or unsigned.
template <class T>
T __reduce_add_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return static_cast<T>(simt::exchange(simt::Exchange::kAdd, mask, value, 0, where));
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return static_cast<T>(simt::exchange(simt::Exchange::kMin, mask, value, 0, where));
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, simt::Where where = simt::Where::current()) {
  return static_cast<T>(simt::exchange(simt::Exchange::kMax, mask, value, 0, where));
}
inline unsigned __reduce_and_sync(unsigned mask, unsigned value,
                                  simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(simt::exchange(simt::Exchange::kAnd, mask, value, 0, where));
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value,
                                 simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(simt::exchange(simt::Exchange::kOr, mask, value, 0, where));
}
inline unsigned __reduce_xor_sync(unsigned mask, unsigned value,
                                  simt::Where where = simt::Where::current()) {
  return static_cast<unsigned>(simt::exchange(simt::Exchange::kXor, mask, value, 0, where));
}
