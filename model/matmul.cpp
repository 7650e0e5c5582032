#include "model/matmul.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "device/codes_cpu.h"
#include "device/dots_cpu.h"
#include "device/error.h"
#include "device/tile_cpu.h"

namespace thaw {
namespace {

constexpr int kBlock = 32;   // elements of a quantised block
constexpr int kChunk = 512;  // weight columns unpacked at a time: a tile of them stays in L1 or L2
constexpr int kFloatDotRows = 3;       // as kDotRows, for formats without codes
constexpr std::int64_t kDotTask = 32;  // weight rows of a task with dot products

// The largest code: split into two bytes with signs, 127 and 127.
constexpr float kPeakCode = 127 * 256 + 127;

// Codes of one block, round(x / scale), and its two scales. Even elements, then odd ones; as
// planes, the higher bytes c1 and then the lower c0 of c = 256 c1 + c0, in the order of x.
template <bool kPlanes>
void encode_block(std::int16_t* codes, float* scales, const float* x) {
  float peak = 0;
#pragma omp simd reduction(max : peak)
  for (int i = 0; i < kBlock; ++i) peak = std::max(peak, std::fabs(x[i]));
  const float inverse = peak > 0 ? kPeakCode / peak : 0.0f;
  std::int16_t in_planes[kBlock];
  std::int16_t* c = kPlanes ? in_planes : codes;
  std::int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < kBlock / 2; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low 16 bits.
    const float even = x[2 * i] * inverse + 12582912.0f, odd = x[2 * i + 1] * inverse + 12582912.0f;
    const int at_even = kPlanes ? 2 * i : i, at_odd = kPlanes ? 2 * i + 1 : i + 16;
    c[at_even] = static_cast<std::int16_t>(std::bit_cast<std::int32_t>(even));
    c[at_odd] = static_cast<std::int16_t>(std::bit_cast<std::int32_t>(odd));
    total += c[at_even] + c[at_odd];
  }
  auto* planes = reinterpret_cast<std::int8_t*>(codes);
  for (int i = 0; kPlanes && i < kBlock; ++i) {
    const auto low = static_cast<std::int8_t>(c[i]);
    planes[i] = static_cast<std::int8_t>((c[i] - low) >> 8), planes[kBlock + i] = low;
  }
  scales[0] = peak / kPeakCode;
  scales[1] = scales[0] * static_cast<float>(total);
}

// ---- dot products: one weight row as stored, one row of activations ----

float dot_floats(const float* x, const std::byte* w, DType type, std::int64_t n) {
  constexpr int kStep = 64;
  f32x8 sum[4] = {};
  float buffer[kStep];
  std::int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    dequantize(buffer, w + row_bytes(type, i), type, kStep);
    for (int j = 0; j < kStep / 8; ++j) sum[j % 4] += load8(buffer + 8 * j) * load8(x + i + 8 * j);
  }
  float total = sum8((sum[0] + sum[1]) + (sum[2] + sum[3]));
  if (i < n) {
    dequantize(buffer, w + row_bytes(type, i), type, n - i);
    for (std::int64_t j = i; j < n; ++j) total += buffer[j - i] * x[j];
  }
  return total;
}

// out[t * kDotCols + r] = row r of w . row t of x, for kDotCols weight rows `stride` bytes apart
// and all kRows rows of x: weights are read once. With stride 0 all weight rows are the first.
template <DType kType, int kRows>
void dot_blocks(float* out, const Activations& x, const std::byte* w, std::int64_t stride) {
  constexpr std::int64_t kBytes = dtype_info(kType).block_bytes;
  // Rows follow each other in memory, and are fetched in that order, so far ahead that those of the
  // next four are there when their first blocks are read; the hardware does not follow four rows.
  const std::int64_t ahead = 8192 + kDotCols * stride;
  constexpr bool kNibbles = kType != DType::kQ8_0;
  constexpr int kHeader = kType == DType::kQ4_1 ? 4 : 2;
  constexpr int kOffset = kType == DType::kQ4_1 ? 1 : kType == DType::kQ4_0 ? -8 : 0;
  const std::int64_t n_blocks = x.cols() / kBlock;
  const std::int16_t* codes = x.codes(0);
  const float* scales = x.scales(0);
  DotSums sums[kRows];
  f32x8 offset[kRows] = {};  // odd elements are used
  for (std::int64_t b = 0; b < n_blocks; ++b, codes += kBlock, scales += 2) {
    const std::byte* rows[] = {w, w + stride, w + 2 * stride, w + 3 * stride};
    for (std::int64_t i = 0; i < kDotCols * kBytes; i += 64)
      __builtin_prefetch(w + ahead + (kDotCols - 1) * kBytes * b + i);
    f32x8 header = load_halves(rows, 0);  // d and m of each row, where the format has an m
    if (kType != DType::kQ4_1)
      header = __builtin_shufflevector(header, header, 0, 0, 2, 2, 4, 4, 6, 6);
    f32x8 scaled[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      scaled[i] = header * broadcast2(scales + i * 2 * n_blocks);
      if (kOffset != 0) offset[i] += scaled[i];
    }
    add_dots<kNibbles>(sums, scaled, codes, x.cols(), w + kHeader, stride);
    w += kBytes;
  }
  for (int i = 0; i < kRows; ++i) {
    const f32x4 offsets = __builtin_shufflevector(offset[i], offset[i], 1, 3, 5, 7);
    const f32x4 y = sums[i].total() + static_cast<float>(kOffset) * offsets;
    std::memcpy(out + i * kDotCols, &y, sizeof y);  // at once: it is read so
  }
}

template <DType kType, int... kLess>
auto dot_blocks_by_rows(std::integer_sequence<int, kLess...>) {
  return std::array{&dot_blocks<kType, kLess + 1>...};
}

// out[t * kDotCols + r] = row first_row + r of w . row t of x, for kDotCols weight rows, or for
// one.
void dot_rows(float* out, const Activations& x, const Tensor& w, std::int64_t first_row,
              std::int64_t n_rows) {
  const std::byte* data = w.row(first_row);
  const std::int64_t stride = n_rows == kDotCols ? row_bytes(w.type, w.cols) : 0;
  constexpr auto kRows = std::make_integer_sequence<int, kDotRows>{};
  const auto at = static_cast<std::size_t>(x.rows() - 1);
  switch (w.type) {
    case DType::kQ8_0:
      return dot_blocks_by_rows<DType::kQ8_0>(kRows)[at](out, x, data, stride);
    case DType::kQ4_0:
      return dot_blocks_by_rows<DType::kQ4_0>(kRows)[at](out, x, data, stride);
    case DType::kQ4_1:
      return dot_blocks_by_rows<DType::kQ4_1>(kRows)[at](out, x, data, stride);
    default:
      for (std::int64_t t = 0; t < x.rows(); ++t)
        for (std::int64_t r = 0; r < n_rows; ++r)
          out[t * kDotCols + r] = dot_floats(x.row(t), w.row(first_row + r), w.type, w.cols);
  }
}

// ---- tiles: 16 weight rows unpacked, all rows of activations ----

// Eight rows' words of codes, as they stand in a block, to pairs of codes in the order of codes:
// of the word's every part, `stride` codes from one to the next.
template <DType kType>
void expand_words(std::int16_t* to, std::int64_t stride, f32x8 words) {
  if constexpr (kType == DType::kQ8_0) {
    const auto bytes = reinterpret_cast<i16x16>(words);
    const i16x16 even = bytes << 8 >> 8, odd = bytes >> 8;
    std::memcpy(to, &even, sizeof even);
    std::memcpy(to + stride, &odd, sizeof odd);
  } else {
    const auto word = reinterpret_cast<i32x8>(words);
    for (int part = 0; part < 4; ++part, to += stride) {  // nibbles of each half of the word
      const i32x8 pairs = word >> 4 * part & 0x000f000f;
      std::memcpy(to, &pairs, sizeof pairs);
    }
  }
}

// The unpacked form of up to kChunk columns of 16 weight rows.
struct Tile {
  alignas(64) float floats[kChunk * kTileCols];          // [column][weight row]
  alignas(64) std::int16_t pairs[kChunk * kTileCols];    // [column / 2][weight row][column % 2]
  alignas(64) float d[kChunk / kBlock][kTileCols];       // scale of a block and weight row
  alignas(64) float offset[kChunk / kBlock][kTileCols];  // what the format adds to every element
};

void unpack_floats(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                   std::int64_t n) {
  alignas(64) float rows[8][kChunk];
  const std::int64_t n_padded = (n + 7) / 8 * 8;
  for (int half = 0; half < kTileCols; half += 8) {
    for (int r = 0; r < 8; ++r) {
      const std::int64_t row = first_row + half + r;
      const std::int64_t used = row < w.rows ? n : 0;
      if (used) dequantize(rows[r], w.row(row) + row_bytes(w.type, first_col), w.type, n);
      std::fill(rows[r] + used, rows[r] + n_padded, 0.0f);
    }
    for (std::int64_t i = 0; i < n_padded; i += 8)
      transpose_8x8(tile.floats + i * kTileCols + half, kTileCols, rows[0] + i, kChunk);
  }
}

// Block b of the tile, and where a block takes 16 bytes also b + 1 if there are n_blocks = 2:
// codes, scales and offsets of 8 weight rows, the tile's first or second half. rows: where block b
// begins.
template <DType kType>
void unpack_blocks(Tile& tile, std::int64_t b, std::int64_t n_blocks, int half,
                   const std::byte* const* rows) {
  constexpr int kHeader = kType == DType::kQ4_1 ? 4 : 2, kWords = kType == DType::kQ8_0 ? 8 : 4;
  constexpr float kOffset = kType == DType::kQ4_0 ? -8 : 0;
  const std::int64_t next = n_blocks > 1 ? dtype_info(kType).block_bytes : 0;
  f32x8 words[8];  // 32 bits of codes an element: of a weight row, then of all eight
  for (int r = 0; r < 8; ++r) {
    const std::byte* codes = rows[r] + kHeader;
    words[r] = reinterpret_cast<f32x8>(load_two(codes, codes + (kWords == 8 ? 16 : next)));
  }
  transpose_8x8(words);
  for (int j = 0; j < 8 && j / kWords < n_blocks; ++j) {
    std::int16_t* to = tile.pairs + (b + j / kWords) * kBlock * kTileCols + half * 16;
    expand_words<kType>(to + j % kWords * 2 * kTileCols, kWords * 2 * kTileCols, words[j]);
  }
  const std::byte* const lower[] = {rows[0], rows[1], rows[4], rows[5]};
  const std::byte* const upper[] = {rows[2], rows[3], rows[6], rows[7]};
  for (std::int64_t i = 0; i < std::min<std::int64_t>(n_blocks, 8 / kWords); ++i) {
    const f32x8 l = load_halves(lower, i * next), u = load_halves(upper, i * next);
    const f32x8 d = __builtin_shufflevector(l, u, 0, 2, 8, 10, 4, 6, 12, 14);
    const f32x8 m = __builtin_shufflevector(l, u, 1, 3, 9, 11, 5, 7, 13, 15);
    store8(tile.d[b + i] + half * 8, d);
    store8(tile.offset[b + i] + half * 8, kType == DType::kQ4_1 ? m : kOffset * d);
  }
}

// Of rows beyond the matrix, the last one's codes: nobody reads their products.
template <DType kType>
void unpack_codes(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  constexpr int kStep = kType == DType::kQ8_0 ? 1 : 2;
  const std::int64_t block_bytes = dtype_info(kType).block_bytes;
  for (int half = 0; half < 2; ++half) {
    const std::byte* rows[8];
    for (int r = 0; r < 8; ++r)
      rows[r] =
          w.row(std::min(first_row + half * 8 + r, w.rows - 1)) + first_col / kBlock * block_bytes;
    for (std::int64_t b = 0; b < n / kBlock; b += kStep) {
      for (int r = 0; r < 8; ++r)  // the next tile's
        __builtin_prefetch(rows[r] + kTileCols * row_bytes(kType, w.cols));
      unpack_blocks<kType>(tile, b, std::min<std::int64_t>(kStep, n / kBlock - b), half, rows);
      for (const std::byte*& row : rows) row += kStep * block_bytes;
    }
  }
}

void unpack_codes(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  if (w.type == DType::kQ8_0) return unpack_codes<DType::kQ8_0>(tile, w, first_row, first_col, n);
  if (w.type == DType::kQ4_0) return unpack_codes<DType::kQ4_0>(tile, w, first_row, first_col, n);
  unpack_codes<DType::kQ4_1>(tile, w, first_row, first_col, n);
}

// sum[r] = products of a block of the tile with kRows rows of activation codes.
template <int kRows>
[[gnu::always_inline]] inline void multiply_block(CodeSums (&sum)[kRows][kTileParts],
                                                  const std::int16_t* codes,
                                                  std::int64_t code_stride,
                                                  const std::int16_t* pairs) {
  for (int i = 0; i < kBlock; i += 2) {
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
template <int kRows>
void multiply_codes(float* out, const Activations& x, std::int64_t t, const Tile& tile,
                    std::int64_t first_col, std::int64_t n) {
  const std::int16_t* codes = x.codes(t) + first_col;
  const float* scales = x.scales(t) + first_col / kBlock * 2;
  const std::int64_t scale_stride = x.cols() / kBlock * 2;
  TilePart total[kRows][kTileParts];
  for (int r = 0; r < kRows; ++r)
    for (int part = 0; part < kTileParts; ++part)
      total[r][part] = load_part(out + r * kTileCols, part);
  for (std::int64_t b = 0; b < n / kBlock; ++b, codes += kBlock, scales += 2) {
    CodeSums sum[kRows][kTileParts] = {};
    multiply_block<kRows>(sum, codes, x.cols(), tile.pairs + b * kBlock * kTileCols);
#pragma GCC unroll 2
    for (int part = 0; part < kTileParts; ++part) {
      const TilePart d = load_part(tile.d[b], part), offset = load_part(tile.offset[b], part);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const float* scale = scales + r * scale_stride;
        total[r][part] += __builtin_convertvector(sum[r][part], TilePart) * (d * scale[0]);
        total[r][part] += offset * scale[1];
      }
    }
  }
  std::memcpy(out, total, sizeof total);
}

template <int... kLess>
void multiply_all_codes(float* out, const Activations& x, const Tile& tile, std::int64_t first_col,
                        std::int64_t n, std::integer_sequence<int, kLess...>) {
  constexpr decltype(&multiply_codes<1>) kByRows[] = {&multiply_codes<kLess + 1>...};
  for (std::int64_t t = 0; t < x.rows(); t += kCodeTileRows, out += kCodeTileRows * kTileCols) {
    const std::int64_t n_rows = std::min<std::int64_t>(kCodeTileRows, x.rows() - t);
    kByRows[n_rows - 1](out, x, t, tile, first_col, n);
  }
}

// What a thread needs for a tile; kept between calls.
struct TileScratch {
  Tile tile;
  std::vector<float> sums;  // activation rows x 16
};

void multiply_tile(const Product& p, const Activations& x, std::int64_t first_row, TileScratch& s) {
  const Tensor& w = *p.w;
  s.sums.assign(static_cast<std::size_t>(x.rows()) * kTileCols, 0.0f);
  for (std::int64_t col = 0; col < w.cols; col += kChunk) {
    const std::int64_t n = std::min<std::int64_t>(kChunk, w.cols - col);
    if (needs_codes(w.type)) {
      unpack_codes(s.tile, w, first_row, col, n);
      multiply_all_codes(s.sums.data(), x, s.tile, col, n,
                         std::make_integer_sequence<int, kCodeTileRows>{});
    } else {
      unpack_floats(s.tile, w, first_row, col, n);
      tile_multiply(s.sums.data(), kTileCols, x.row(0) + col, x.cols(), x.rows(), s.tile.floats,
                    kTileCols, n);
    }
  }
  const std::int64_t used = std::min<std::int64_t>(kTileCols, w.rows - first_row);
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    float* out = p.out + t * p.out_stride + first_row;
    const float* sums = s.sums.data() + t * kTileCols;
    for (std::int64_t r = 0; r < used; ++r) out[r] = p.accumulate ? out[r] + sums[r] : sums[r];
  }
}

void multiply_dots(const Product& p, const Activations& x, std::int64_t first_row) {
  const std::int64_t end = std::min(first_row + kDotTask, p.w->rows);
  for (std::int64_t row = first_row, n = 0; row < end; row += n) {
    n = end - row >= kDotCols ? kDotCols : 1;
    float y[kDotRows * kDotCols];
    dot_rows(y, x, *p.w, row, n);
    for (std::int64_t t = 0; t < x.rows(); ++t) {
      float* out = p.out + t * p.out_stride + row;
      for (std::int64_t r = 0; r < n; ++r)
        out[r] = p.accumulate ? out[r] + y[t * kDotCols + r] : y[t * kDotCols + r];
    }
  }
}

}  // namespace

void Activations::assign(const float* x, std::int64_t rows, std::int64_t cols, bool with_codes,
                         ThreadPool& pool) {
  x_ = x, rows_ = rows, cols_ = cols;
  if (!with_codes) return;
  require(cols % kBlock == 0, "activations: cols: expected a multiple of 32, found ", cols);
  const std::int64_t n_blocks = cols / kBlock;
  const auto grow = [](auto& v, std::int64_t n) {
    if (static_cast<std::int64_t>(v.size()) < n) v.resize(static_cast<std::size_t>(n));
  };
  grow(codes_, rows * cols), grow(scales_, 2 * rows * n_blocks);
  constexpr std::int64_t kTask = 128;  // blocks: 4096 elements
  const std::int64_t total = rows * n_blocks;
  const auto encode = kDotPlanes && rows <= kDotRows ? encode_block<true> : encode_block<false>;
  pool.run((total + kTask - 1) / kTask, [&](std::int64_t task, int) {
    const std::int64_t end = std::min(total, (task + 1) * kTask);
    for (std::int64_t i = task * kTask; i < end; ++i) {
      encode(codes_.data() + i * kBlock, scales_.data() + 2 * i, x + i * kBlock);
    }
  });
}

void matmul(std::span<const Product> products, const Activations& x, ThreadPool& pool) {
  const auto tiled = [&](const Product& p) {
    return x.rows() > (needs_codes(p.w->type) ? kDotRows : kFloatDotRows);
  };
  const auto step = [&](const Product& p) { return tiled(p) ? kTileCols : kDotTask; };
  const auto tasks = [&](const Product& p) { return (p.w->rows + step(p) - 1) / step(p); };
  std::int64_t n_tasks = 0;
  for (const Product& p : products) {
    require(p.w->cols == x.cols(), p.w->name, ": cols: expected ", x.cols(), ", found ", p.w->cols);
    n_tasks += tasks(p);
  }
  pool.run_streams(n_tasks, [&](std::int64_t task, int) {
    thread_local TileScratch scratch;
    std::int64_t i = task;
    const Product* p = products.data();
    for (; i >= tasks(*p); ++p) i -= tasks(*p);
    if (tiled(*p)) {
      multiply_tile(*p, x, i * kTileCols, scratch);
    } else {
      multiply_dots(*p, x, i * kDotTask);
    }
  });
}

}  // namespace thaw
