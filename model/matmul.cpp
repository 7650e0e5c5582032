#include "model/matmul.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "device/codes_cpu.h"
#include "device/error.h"
#include "device/tile_cpu.h"

namespace thaw {
namespace {

constexpr int kBlock = 32;   // elements of a quantised block
constexpr int kChunk = 512;  // weight columns unpacked at a time: a tile of them stays in L1 or L2
constexpr int kDotRows = 3;  // up to so many activation rows, dot products are faster than tiles
constexpr int kCodeTileRows = 4;       // activation rows of an integer tile: 8 sums in registers
constexpr std::int64_t kDotTask = 32;  // weight rows of a task with dot products

// Codes of one block, round(x / scale) with |code| <= 32767, in code_position() order; its two
// scales.
void encode_block(std::int16_t* codes, float* scales, const float* x) {
  float peak = 0;
#pragma omp simd reduction(max : peak)
  for (int i = 0; i < kBlock; ++i) peak = std::max(peak, std::fabs(x[i]));
  const float inverse = peak > 0 ? 32767.0f / peak : 0.0f;
  std::int32_t total = 0;
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < kBlock / 2; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low 16 bits.
    const float even = x[2 * i] * inverse + 12582912.0f, odd = x[2 * i + 1] * inverse + 12582912.0f;
    codes[i] = static_cast<std::int16_t>(std::bit_cast<std::int32_t>(even));
    codes[i + 16] = static_cast<std::int16_t>(std::bit_cast<std::int32_t>(odd));
    total += codes[i] + codes[i + 16];
  }
  scales[0] = peak / 32767.0f;
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

// out[r] = row r of w . row t of x, for kRows rows that are `stride` bytes apart.
template <DType kType, int kRows>
void dot_blocks(float* out, const Activations& x, std::int64_t t, const std::byte* w,
                std::int64_t stride) {
  constexpr std::int64_t kAhead = 4096;  // bytes; the hardware's prefetcher stops at every page
  constexpr int kHeader = kType == DType::kQ4_1 ? 4 : 2;
  const std::int64_t n_blocks = x.cols() / kBlock;
  const std::int16_t* codes = x.codes(t);
  const float* scales = x.scales(t);
  f32x8 total[kRows] = {};
  f32x4 offset[kRows] = {};  // element 1 is used
  for (std::int64_t b = 0; b < n_blocks; ++b, codes += kBlock, scales += 2) {
    const f32x4 factors = load2(scales);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const std::byte* block = w + r * stride;
      __builtin_prefetch(block + kAhead);
      const f32x4 header = load_halves(block);  // d, and m where the format has it
      const f32x4 scaled = (kType == DType::kQ4_1 ? header : f32x4{} + header[0]) * factors;
      const BlockCodes unpacked =
          kType == DType::kQ8_0 ? unpack_bytes(block + kHeader) : unpack_nibbles(block + kHeader);
      total[r] += scaled[0] * to_float(dot_block(codes, unpacked));
      if (kType != DType::kQ8_0) offset[r] += scaled;
    }
    w += dtype_info(kType).block_bytes;
  }
  constexpr float kOffset = kType == DType::kQ4_0 ? -8 : 1;
  for (int r = 0; r < kRows; ++r) out[r] = sum8(total[r]) + kOffset * offset[r][1];
}

template <DType kType>
void dot_rows(float* out, const Activations& x, std::int64_t t, const Tensor& w,
              std::int64_t first_row, std::int64_t n_rows) {
  constexpr int kRows = 4;  // independent sums, to hide the latency of an addition
  const std::int64_t stride = row_bytes(kType, w.cols);
  std::int64_t r = 0;
  for (; r + kRows <= n_rows; r += kRows)
    dot_blocks<kType, kRows>(out + r, x, t, w.row(first_row + r), stride);
  for (; r < n_rows; ++r) dot_blocks<kType, 1>(out + r, x, t, w.row(first_row + r), stride);
}

// out[r] = row first_row + r of w . row t of x
void dot_rows(float* out, const Activations& x, std::int64_t t, const Tensor& w,
              std::int64_t first_row, std::int64_t n_rows) {
  switch (w.type) {
    case DType::kQ8_0:
      return dot_rows<DType::kQ8_0>(out, x, t, w, first_row, n_rows);
    case DType::kQ4_0:
      return dot_rows<DType::kQ4_0>(out, x, t, w, first_row, n_rows);
    case DType::kQ4_1:
      return dot_rows<DType::kQ4_1>(out, x, t, w, first_row, n_rows);
    default:
      for (std::int64_t r = 0; r < n_rows; ++r)
        out[r] = dot_floats(x.row(t), w.row(first_row + r), w.type, w.cols);
  }
}

// ---- tiles: 16 weight rows unpacked, all rows of activations ----

// The unpacked form of up to kChunk columns of 16 weight rows. Rows beyond the matrix are zeros.
struct Tile {
  alignas(32) float floats[kChunk * kTileCols];          // [column][weight row]
  alignas(32) std::int16_t pairs[kChunk * kTileCols];    // [column / 2][weight row][column % 2]
  alignas(32) float d[kChunk / kBlock][kTileCols];       // scale of a block and weight row
  alignas(32) float offset[kChunk / kBlock][kTileCols];  // what the format adds to every element
};

void unpack_floats(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                   std::int64_t n) {
  alignas(32) float rows[8][kChunk];
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

// One block of one weight row: its 32 codes as 16 pairs, its scale, its offset.
void unpack_block(std::int16_t* codes, float& d, float& offset, const std::byte* block,
                  DType type) {
  const f32x4 header = load_halves(block);
  d = header[0];
  offset = type == DType::kQ4_1 ? header[1] : type == DType::kQ4_0 ? -8 * d : 0;
  const BlockCodes unpacked = type == DType::kQ8_0
                                  ? unpack_bytes(block + 2)
                                  : unpack_nibbles(block + (type == DType::kQ4_1 ? 4 : 2));
  std::memcpy(codes, &unpacked, sizeof unpacked);
}

void unpack_codes(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  alignas(32) float pairs[8][kBlock / 2];  // a pair of codes travels as one 32-bit element
  const std::int64_t stride = row_bytes(w.type, w.cols);
  const int block_bytes = dtype_info(w.type).block_bytes;
  for (std::int64_t b = 0; b < n / kBlock; ++b) {
    const std::byte* block = w.row(first_row) + (first_col / kBlock + b) * block_bytes;
    for (int r = 0; r < kTileCols; ++r, block += stride) {
      std::int16_t* codes = reinterpret_cast<std::int16_t*>(pairs[r % 8]);
      if (first_row + r < w.rows) {
        unpack_block(codes, tile.d[b][r], tile.offset[b][r], block, w.type);
      } else {
        std::fill(codes, codes + kBlock, std::int16_t{0});
        tile.d[b][r] = tile.offset[b][r] = 0;
      }
      if (r % 8 < 7) continue;
      float* to = reinterpret_cast<float*>(tile.pairs) + b * (kBlock / 2) * kTileCols + r - 7;
      for (int i = 0; i < kBlock / 2; i += 8)
        transpose_8x8(to + i * kTileCols, kTileCols, pairs[0] + i, kBlock / 2);
    }
  }
}

// out[r][c] += the tile's columns times kRows rows of activations, for 16 weight rows c.
template <int kRows>
void multiply_codes(float* out, const Activations& x, std::int64_t t, const Tile& tile,
                    std::int64_t first_col, std::int64_t n) {
  const std::int16_t* codes = x.codes(t) + first_col;
  const float* scales = x.scales(t) + first_col / kBlock * 2;
  const std::int64_t code_stride = x.cols(), scale_stride = x.cols() / kBlock * 2;
  for (std::int64_t b = 0; b < n / kBlock; ++b, codes += kBlock, scales += 2) {
    i32x8 sum[kRows][2] = {};
    const std::int16_t* pairs = tile.pairs + b * kBlock * kTileCols;
    for (int i = 0; i < kBlock; i += 2) {
      i16x16 left, right;
      std::memcpy(&left, pairs + i * kTileCols, sizeof left);
      std::memcpy(&right, pairs + (i + 1) * kTileCols, sizeof right);
      keep(left), keep(right);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const i16x16 pair = broadcast_pair(codes + r * code_stride + i);
        sum[r][0] += multiply_pairs(pair, left);
        sum[r][1] += multiply_pairs(pair, right);
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const f32x8 d = load8(tile.d[b] + 8 * half), offset = load8(tile.offset[b] + 8 * half);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* to = out + r * kTileCols + 8 * half;
        const float* scale = scales + r * scale_stride;
        store8(to, load8(to) + to_float(sum[r][half]) * (d * scale[0]) + offset * scale[1]);
      }
    }
  }
}

void multiply_codes(float* out, const Activations& x, const Tile& tile, std::int64_t first_col,
                    std::int64_t n) {
  for (std::int64_t t = 0; t < x.rows(); t += kCodeTileRows, out += kCodeTileRows * kTileCols) {
    switch (x.rows() - t) {
      case 1:
        return multiply_codes<1>(out, x, t, tile, first_col, n);
      case 2:
        return multiply_codes<2>(out, x, t, tile, first_col, n);
      case 3:
        return multiply_codes<3>(out, x, t, tile, first_col, n);
      default:
        multiply_codes<4>(out, x, t, tile, first_col, n);
    }
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
      multiply_codes(s.sums.data(), x, s.tile, col, n);
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
  const std::int64_t n_rows = std::min(kDotTask, p.w->rows - first_row);
  float y[kDotTask];
  for (std::int64_t t = 0; t < x.rows(); ++t) {
    dot_rows(y, x, t, *p.w, first_row, n_rows);
    float* out = p.out + t * p.out_stride + first_row;
    for (std::int64_t r = 0; r < n_rows; ++r) out[r] = p.accumulate ? out[r] + y[r] : y[r];
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
  pool.run((total + kTask - 1) / kTask, [&](std::int64_t task, int) {
    const std::int64_t end = std::min(total, (task + 1) * kTask);
    for (std::int64_t i = task * kTask; i < end; ++i) {
      encode_block(codes_.data() + i * kBlock, scales_.data() + 2 * i, x + i * kBlock);
    }
  });
}

void matmul(std::span<const Product> products, const Activations& x, ThreadPool& pool) {
  const bool tiled = x.rows() > kDotRows;
  const std::int64_t step = tiled ? kTileCols : kDotTask;
  std::int64_t n_tasks = 0;
  for (const Product& p : products) {
    require(p.w->cols == x.cols(), p.w->name, ": cols: expected ", x.cols(), ", found ", p.w->cols);
    n_tasks += (p.w->rows + step - 1) / step;
  }
  pool.run(n_tasks, [&](std::int64_t task, int) {
    thread_local TileScratch scratch;
    std::int64_t i = task;
    const Product* p = products.data();
    for (; i >= (p->w->rows + step - 1) / step; ++p) i -= (p->w->rows + step - 1) / step;
    if (tiled) {
      multiply_tile(*p, x, i * step, scratch);
    } else {
      multiply_dots(*p, x, i * step);
    }
  });
}

}  // namespace thaw
