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

// Eight rows' words of codes to pairs of codes in the order of codes: of the word's every part,
// `stride` codes from one to the next. Bytes have even elements and odd ones, nibbles four.
template <bool kNibbles>
void expand_words(std::int16_t* to, std::int64_t stride, f32x8 words) {
  if constexpr (kNibbles) {
    const auto word = reinterpret_cast<i32x8>(words);
    for (int part = 0; part < 4; ++part, to += stride) {  // nibbles of each half of the word
      const i32x8 pairs = word >> 4 * part & 0x000f000f;
      std::memcpy(to, &pairs, sizeof pairs);
    }
  } else {
    const auto bytes = reinterpret_cast<i16x16>(words);
    const i16x16 even = bytes << 8 >> 8, odd = bytes >> 8;
    std::memcpy(to, &even, sizeof even);
    std::memcpy(to + stride, &odd, sizeof odd);
  }
}

// Codes of 32 bytes of each of 8 weight rows, from column 32 b on of a half of the tile.
inline void put_bytes(CodeTile& tile, std::int64_t b, int half, f32x8 (&rows)[8]) {
  transpose_8x8(rows);
  std::int16_t* to = tile.pairs + b * kPartCols * kTileCols + half * 16;
  for (int j = 0; j < 8; ++j)
    expand_words<false>(to + j * 2 * kTileCols, 8 * 2 * kTileCols, rows[j]);
}

// Parts b to b + 7: a block of a K-quant of 8 weight rows.
template <DType kType>
void unpack_k_block(CodeTile& tile, std::int64_t b, int half, const std::byte* const (&rows)[8]) {
  using Stored = Blocks<kType>;
  f32x8 first[8], second[8];
  for (int r = 0; r < 8; ++r) k_block_scales<kType>(first[r], second[r], rows[r]);
  transpose_8x8(first), transpose_8x8(second);
#pragma GCC unroll 8
  for (int part = 0; part < Stored::kParts; ++part) {
    const std::int64_t at = (b + part) * Stored::kGroups;
    store8(tile.d[at] + half * 8, first[part]);
    if constexpr (Stored::kGroups == 2)
      store8(tile.d[at + 1] + half * 8, second[part]);
    else
      store8(tile.offset[b + part] + half * 8, second[part]);
    f32x8 codes[8];
    for (int r = 0; r < 8; ++r) {
      using Bytes = std::uint16_t __attribute__((vector_size(32)));
      const auto load = [&](int from) {
        Bytes bytes;
        std::memcpy(&bytes, rows[r] + from, sizeof bytes);
        return bytes;
      };
      codes[r] = reinterpret_cast<f32x8>(Stored::layout(part).template codes<Bytes>(load, 0));
    }
    put_bytes(tile, b + part, half, codes);
  }
}

// Block b of the tile, and where a block takes 16 bytes also b + 1 if there are n_blocks = 2:
// codes, scales and offsets of 8 weight rows, the tile's first or second half. rows: where block b
// begins.
template <DType kType>
void unpack_blocks(CodeTile& tile, std::int64_t b, std::int64_t n_blocks, int half,
                   const std::byte* const (&rows)[8]) {
  using Stored = Blocks<kType>;
  constexpr bool kNibbles = kType != DType::kQ8_0;
  const std::int64_t next = n_blocks > 1 ? Stored::kBytes : 0;
  f32x8 words[8];  // 32 bits of codes an element: of a weight row, then of all eight
  for (int r = 0; r < 8; ++r) {
    const std::byte* codes = rows[r] + Stored::kCodesAt;
    words[r] = reinterpret_cast<f32x8>(load_two(codes, codes + (kNibbles ? next : 16)));
  }
  if constexpr (kNibbles) {
    transpose_8x8(words);
    for (int j = 0; j < 8 && j / 4 < n_blocks; ++j) {
      std::int16_t* to = tile.pairs + (b + j / 4) * kPartCols * kTileCols + half * 16;
      expand_words<true>(to + j % 4 * 2 * kTileCols, 4 * 2 * kTileCols, words[j]);
    }
  } else {
    put_bytes(tile, b, half, words);
  }
  const std::byte* const lower[] = {rows[0], rows[1], rows[4], rows[5]};
  const std::byte* const upper[] = {rows[2], rows[3], rows[6], rows[7]};
  for (std::int64_t i = 0; i < n_blocks; ++i) {
    const f32x8 l = load_halves(lower, i * next), u = load_halves(upper, i * next);
    const f32x8 d = __builtin_shufflevector(l, u, 0, 2, 8, 10, 4, 6, 12, 14);
    const f32x8 m = __builtin_shufflevector(l, u, 1, 3, 9, 11, 5, 7, 13, 15);
    store8(tile.d[b + i] + half * 8, d);
    store8(tile.offset[b + i] + half * 8,
           Stored::kHasMin ? m : static_cast<float>(Stored::kOffset) * d);
  }
}

// Of rows beyond the matrix, the last one's codes: nobody reads their products.
template <DType kType>
void unpack_codes(CodeTile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  using Stored = Blocks<kType>;
  constexpr int kBlocks = kType == DType::kQ4_0 || kType == DType::kQ4_1 ? 2 : 1;  // at a time
  const std::int64_t n_blocks = n / dtype_info(kType).block;
  for (int half = 0; half < 2; ++half) {
    const std::byte* rows[8];
    for (int r = 0; r < 8; ++r)
      rows[r] = w.row(std::min(first_row + half * 8 + r, w.rows - 1)) + row_bytes(kType, first_col);
    for (std::int64_t b = 0; b < n_blocks; b += kBlocks) {
      for (int r = 0; r < 8; ++r)  // the next tile's
        for (std::int64_t at = 0; at < kBlocks * Stored::kBytes; at += 64)
          __builtin_prefetch(rows[r] + kTileCols * row_bytes(kType, w.cols) + at);
      if constexpr (Stored::kIsK)
        unpack_k_block<kType>(tile, b * kKParts, half, rows);
      else
        unpack_blocks<kType>(tile, b, std::min<std::int64_t>(kBlocks, n_blocks - b), half, rows);
      for (const std::byte*& row : rows) row += kBlocks * Stored::kBytes;
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
