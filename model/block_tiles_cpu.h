// Products of many rows of activations with tiles: 16 weight rows with codes, unpacked.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "model/blocks_cpu.h"
#include "model/matmul.h"

namespace thaw {

inline constexpr int kChunk = 512;  // columns unpacked at a time: a tile of them stays in L1 or L2
inline constexpr int kTileBlocks = kChunk / kPartCols;  // parts of 32 columns

// The unpacked form of up to kChunk columns of 16 weight rows.
struct CodeTile {
  alignas(64) std::int16_t pairs[kChunk * kTileCols];  // [column / 2][weight row][column % 2]
  alignas(64) float d[2 * kTileBlocks][kTileCols];     // of every part, or both its groups
  alignas(64) float offset[kTileBlocks][kTileCols];    // what the format adds to every element
};

// Codes of a part of 8 weight rows: columns 32 b to 32 b + 31 of a half of the tile. rows: where
// the part's block begins.
template <class Layout>
[[gnu::always_inline]] inline void put_codes(CodeTile& tile, std::int64_t b, int half,
                                             const std::byte* const (&rows)[8],
                                             const Layout& layout) {
  f32x8 codes[8];  // the 32 bytes of a row; then 4 of each row
  for (int r = 0; r < 8; r += 2) {
    i16x16 low, high;  // of two rows
    layout.bytes(low, high, [&](int at) { return load_two(rows[r] + at, rows[r + 1] + at); });
    const auto l = reinterpret_cast<f32x8>(low), h = reinterpret_cast<f32x8>(high);
    codes[r] = __builtin_shufflevector(l, h, 0, 1, 2, 3, 8, 9, 10, 11);
    codes[r + 1] = __builtin_shufflevector(l, h, 4, 5, 6, 7, 12, 13, 14, 15);
  }
  transpose_8x8(codes);
  std::int16_t* even = tile.pairs + b * kPartCols * kTileCols + half * 16;
  std::int16_t* odd = even + kPartCols / 2 * kTileCols;
  for (int j = 0; j < 8; ++j) {
    const auto bytes = reinterpret_cast<i16x16>(codes[j]);
    const i16x16 pairs[] = {bytes << 8 >> 8, bytes >> 8};
    std::memcpy(even + j * 2 * kTileCols, &pairs[0], sizeof pairs[0]);
    std::memcpy(odd + j * 2 * kTileCols, &pairs[1], sizeof pairs[1]);
  }
}

// The scales of a block of 8 weight rows, from column 32 b on of a half of the tile.
template <DType kType>
void put_scales(CodeTile& tile, std::int64_t b, int half, const std::byte* const (&rows)[8]) {
  using Stored = Blocks<kType>;
  f32x8 lower[Stored::kParts], upper[Stored::kParts];  // of four rows each
  load_headers<kType>(lower, {rows[0], rows[1], rows[4], rows[5]});
  load_headers<kType>(upper, {rows[2], rows[3], rows[6], rows[7]});
  for (int part = 0; part < Stored::kParts; ++part) {
    const f32x8 l = lower[part], u = upper[part];
    const f32x8 d = __builtin_shufflevector(l, u, 0, 2, 8, 10, 4, 6, 12, 14);
    const f32x8 m = __builtin_shufflevector(l, u, 1, 3, 9, 11, 5, 7, 13, 15);
    const std::int64_t at = (b + part) * Stored::kGroups;
    store8(tile.d[at] + half * 8, d);
    if constexpr (Stored::kGroups == 2)
      store8(tile.d[at + 1] + half * 8, m);  // the second group's d
    else
      store8(tile.offset[at] + half * 8, static_cast<float>(Stored::kOffset) * m);
  }
}

// Of rows beyond the matrix, the last one's codes: nobody reads their products.
template <DType kType>
void unpack_codes(CodeTile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  using Stored = Blocks<kType>;
  const std::byte* rows[8];
  for (int half = 0; half < 2; ++half) {
    for (int r = 0; r < 8; ++r)
      rows[r] = w.row(std::min(first_row + half * 8 + r, w.rows - 1)) + row_bytes(kType, first_col);
    for (std::int64_t b = 0; b < n / kPartCols; b += Stored::kParts) {
      for (int r = 0; r < 8; ++r)  // the next tile's
        for (std::int64_t at = 0; at < Stored::kBytes; at += 64)
          __builtin_prefetch(rows[r] + kTileCols * row_bytes(kType, w.cols) + at);
      put_scales<kType>(tile, b, half, rows);
      for (const std::byte*& row : rows) row += Stored::kCodesAt;
#pragma GCC unroll 8
      for (int part = 0; part < Stored::kParts; ++part)
        put_codes(tile, b + part, half, rows, Stored::layout(part));
      for (const std::byte*& row : rows) row += Stored::kBytes - Stored::kCodesAt;
    }
  }
}

// sum[r] = products of 32 columns of the tile, or of a group of 16, with kRows rows of activation
// codes. A group's are every other eight in the order of codes.
template <int kRows, int kGroups>
[[gnu::always_inline]] inline void multiply_block(CodeSums (&sum)[kRows][kTileParts],
                                                  const std::int16_t* codes,
                                                  std::int64_t code_stride,
                                                  const std::int16_t* pairs, int group) {
  for (int j = 0; j < kPartCols / kGroups; j += 2) {
    const int i = kGroups == 1 ? j : j / 8 * 16 + group * 8 + j % 8;
    CodePairs w[kTileParts];
#pragma GCC unroll 2
    for (int part = 0; part < kTileParts; ++part) {
      std::memcpy(&w[part], pairs + i * kTileCols + part * 2 * kTilePart, sizeof w[part]);
      keep(w[part]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const CodePairs x = broadcast_pair(codes + r * code_stride + i);
#pragma GCC unroll 2
      for (int part = 0; part < kTileParts; ++part) add_products(sum[r][part], w[part], x);
    }
  }
}

// out[r][c] += the tile's columns times kRows rows of activations, for 16 weight rows c.
template <int kGroups, int kRows>
void multiply_codes(float* out, const Activations& x, std::int64_t t, const CodeTile& tile,
                    std::int64_t first_col, std::int64_t n) {
  const std::int16_t* codes = x.codes(t) + first_col;
  const float* scales = x.scales(t) + first_col / kPartCols * 2;
  const std::int64_t scale_stride = x.cols() / kPartCols * 2;
  TilePart total[kRows][kTileParts];
  for (int r = 0; r < kRows; ++r)
    for (int part = 0; part < kTileParts; ++part)
      total[r][part] = load_part(out + r * kTileCols, part);
  for (std::int64_t b = 0; b < n / kPartCols; ++b, codes += kPartCols, scales += 2) {
    for (int group = 0; group < kGroups; ++group) {
      CodeSums sum[kRows][kTileParts] = {};
      multiply_block<kRows, kGroups>(sum, codes, x.cols(), tile.pairs + b * kPartCols * kTileCols,
                                     group);
#pragma GCC unroll 2
      for (int part = 0; part < kTileParts; ++part) {
        const TilePart d = load_part(tile.d[b * kGroups + group], part);
        const TilePart offset = kGroups == 1 ? load_part(tile.offset[b], part) : TilePart{};
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          const float* scale = scales + r * scale_stride;
          total[r][part] += __builtin_convertvector(sum[r][part], TilePart) * (d * scale[0]);
          if (kGroups == 1) total[r][part] += offset * scale[1];
        }
      }
    }
  }
  std::memcpy(out, total, sizeof total);
}

template <int kGroups, int... kLess>
void multiply_all_codes(float* out, const Activations& x, const CodeTile& tile,
                        std::int64_t first_col, std::int64_t n,
                        std::integer_sequence<int, kLess...>) {
  constexpr std::array kByRows = {&multiply_codes<kGroups, kLess + 1>...};
  for (std::int64_t t = 0; t < x.rows(); t += kCodeTileRows, out += kCodeTileRows * kTileCols) {
    const std::int64_t n_rows = std::min<std::int64_t>(kCodeTileRows, x.rows() - t);
    kByRows[static_cast<std::size_t>(n_rows - 1)](out, x, t, tile, first_col, n);
  }
}

// out (rows of x, 16) += columns first_col .. first_col + n of x times those of 16 rows of w.
template <DType kType>
void multiply_code_tile(float* out, CodeTile& tile, const Activations& x, const Tensor& w,
                        std::int64_t first_row, std::int64_t first_col, std::int64_t n) {
  unpack_codes<kType>(tile, w, first_row, first_col, n);
  multiply_all_codes<Blocks<kType>::kGroups>(out, x, tile, first_col, n,
                                             std::make_integer_sequence<int, kCodeTileRows>{});
}

}  // namespace thaw
