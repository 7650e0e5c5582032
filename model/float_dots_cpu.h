// Products of a few rows of activations with rows of F32, F16 and BF16, as stored.
#pragma once

#include <array>
#include <utility>

#include "device/half.h"
#include "device/tile_cpu.h"
#include "model/matmul.h"

namespace thaw {

// 8 elements of a row.
template <DType kType>
f32x8 widen8(const std::byte* p) {
  if constexpr (kType == DType::kF32) return load8(reinterpret_cast<const float*>(p));
  float x[8];
  (kType == DType::kF16 ? widen_f16 : widen_bf16)(x, reinterpret_cast<const std::uint16_t*>(p), 8);
  return load8(x);
}

// out[t * stride] = row t of x . the row at w, for all kRows rows of x: w is read once.
template <DType kType, int kRows>
void dot_floats(float* out, std::int64_t stride, const Activations& x, const std::byte* w) {
  constexpr int kBytes = dtype_info(kType).block_bytes, kStep = 32;
  constexpr int kSums = kRows <= 3 ? 4 : kRows <= 6 ? 2 : 1;  // that stay in registers
  constexpr std::int64_t kAhead = 8192;  // bytes; rows follow each other in memory
  const std::int64_t n = x.cols();
  const float* rows = x.row(0);
  f32x8 sums[kRows][kSums] = {};
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep, w += kStep * kBytes) {
    for (int at = 0; at < kStep * kBytes; at += 64) __builtin_prefetch(w + kAhead + at);
#pragma GCC unroll 4
    for (int j = 0; j < kStep / 8; ++j) {
      const f32x8 weights = widen8<kType>(w + 8 * j * kBytes);
#pragma GCC unroll 8
      for (int t = 0; t < kRows; ++t)
        sums[t][j % kSums] += weights * load8(rows + t * n + i + 8 * j);
    }
  }
  float rest[kStep];
  if (i < n) dequantize(rest, w, kType, n - i);
  for (int t = 0; t < kRows; ++t) {
    for (int j = 1; j < kSums; ++j) sums[t][0] += sums[t][j];
    float total = sum8(sums[t][0]);
    for (std::int64_t j = i; j < n; ++j) total += rest[j - i] * rows[t * n + j];
    out[t * stride] = total;
  }
}

inline constexpr int kFloatDotRows = 7;  // activation rows up to which this is faster than tiles

template <DType kType, int... kLess>
constexpr auto dot_floats_by_rows(std::integer_sequence<int, kLess...>) {
  return std::array{&dot_floats<kType, kLess + 1>...};
}
// For all of x, at most kFloatDotRows rows.
inline void dot_floats(float* out, std::int64_t stride, const Activations& x, const Tensor& w,
                       std::int64_t row) {
  constexpr auto kRows = std::make_integer_sequence<int, kFloatDotRows>{};
  static constexpr std::array kByType = {dot_floats_by_rows<DType::kF32>(kRows),
                                         dot_floats_by_rows<DType::kF16>(kRows),
                                         dot_floats_by_rows<DType::kBF16>(kRows)};
  kByType[static_cast<std::size_t>(w.type)][static_cast<std::size_t>(x.rows() - 1)](out, stride, x,
                                                                                    w.row(row));
}

}  // namespace thaw
