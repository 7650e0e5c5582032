// Products of a few rows of activations with weight blocks as stored.
#pragma once

#include <array>
#include <utility>

#include "model/blocks_cpu.h"
#include "model/matmul.h"

namespace thaw {

// out[t * kDotCols + r] = row r of w . row t of x, for kDotCols weight rows `stride` bytes apart
// and all kRows rows of x: weights are read once. With stride 0 all weight rows are the first.
template <DType kType, int kRows>
void dot_blocks(float* out, const Activations& x, const std::byte* w, std::int64_t stride) {
  using Stored = Blocks<kType>;
  // Rows follow each other in memory, and are fetched in that order, so far ahead that those of the
  // next four are there when their first blocks are read; the hardware does not follow four rows.
  const std::byte* ahead = w + 8192 + kDotCols * stride;
  const std::int64_t n_parts = x.cols() / kPartCols;
  const std::int16_t* codes = x.codes(0);
  const float* scales = x.scales(0);
  DotSums sums[kRows];
  f32x8 offset[kRows] = {};  // odd elements are used
  for (std::int64_t b = 0; b < n_parts; b += Stored::kParts, w += Stored::kBytes) {
    const std::byte* const rows[] = {w, w + stride, w + 2 * stride, w + 3 * stride};
    for (std::int64_t i = 0; i < kDotCols * Stored::kBytes; i += 64) __builtin_prefetch(ahead + i);
    ahead += kDotCols * Stored::kBytes;
    f32x8 headers[Stored::kParts];
    load_headers<kType>(headers, rows);
#pragma GCC unroll 8
    for (int part = 0; part < Stored::kParts; ++part, codes += kPartCols, scales += 2) {
      f32x8 scaled[kRows];
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const float* scale = scales + i * 2 * n_parts;
        scaled[i] = headers[part] * (Stored::kGroups == 2 ? f32x8{} + *scale : broadcast2(scale));
        if (Stored::kOffset != 0) offset[i] += scaled[i];
      }
      add_dots(sums, scaled, codes, x.cols(), w + Stored::kCodesAt, stride, Stored::layout(part));
    }
  }
  for (int i = 0; i < kRows; ++i) {
    const f32x4 offsets = __builtin_shufflevector(offset[i], offset[i], 1, 3, 5, 7);
    const f32x4 y = sums[i].total() + static_cast<float>(Stored::kOffset) * offsets;
    std::memcpy(out + i * kDotCols, &y, sizeof y);  // at once: it is read so
  }
}

template <DType kType, int... kLess>
constexpr auto dot_blocks_by_rows(std::integer_sequence<int, kLess...>) {
  return std::array{&dot_blocks<kType, kLess + 1>...};
}
// For all of x, at most kDotRows rows.
template <DType kType>
void dot_all_blocks(float* out, const Activations& x, const std::byte* w, std::int64_t stride) {
  constexpr auto kByRows = dot_blocks_by_rows<kType>(std::make_integer_sequence<int, kDotRows>{});
  kByRows[static_cast<std::size_t>(x.rows() - 1)](out, x, w, stride);
}

}  // namespace thaw
