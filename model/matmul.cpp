#include "model/matmul.h"

#include <algorithm>
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

// Codes of one block: round(x / scale), |code| <= 32767.
void encode_block(std::int16_t* codes, float& scale, float& sum, const float* x) {
  float peak = 0;
  for (int i = 0; i < kBlock; ++i) peak = std::max(peak, std::fabs(x[i]));
  scale = peak / 32767.0f;
  const float inverse = peak > 0 ? 32767.0f / peak : 0.0f;
  std::int32_t total = 0;
  for (int i = 0; i < kBlock; ++i) {
    // Adding 1.5 * 2^23 rounds to nearest and leaves the integer in the low bits.
    const float shifted = x[i] * inverse + 12582912.0f;
    std::int32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    codes[i] = static_cast<std::int16_t>(bits);
    total += codes[i];
  }
  sum = scale * static_cast<float>(total);
}

std::uint16_t load_u16(const std::byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
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

template <DType kType>
float dot_blocks(const Activations& x, std::int64_t t, const std::byte* w) {
  const std::int64_t n_blocks = x.cols() / kBlock;
  const int block_bytes = dtype_info(kType).block_bytes;
  const std::int16_t* codes = x.codes(t);
  const float *scale = x.scale(t), *sum = x.sum(t);
  f32x8 total = {};
  float offset = 0;
  for (std::int64_t b = 0; b < n_blocks; ++b, codes += kBlock, w += block_bytes) {
    const float d = f16_to_f32(load_u16(w));
    if constexpr (kType == DType::kQ8_0) {
      total += d * scale[b] * to_float(dot_bytes(codes, w + 2));
    } else if constexpr (kType == DType::kQ4_0) {
      total += d * scale[b] * to_float(dot_nibbles(codes, w + 2));
      offset -= 8 * d * sum[b];
    } else {
      total += d * scale[b] * to_float(dot_nibbles(codes, w + 4));
      offset += f16_to_f32(load_u16(w + 2)) * sum[b];
    }
  }
  return sum8(total) + offset;
}

float dot(const Activations& x, std::int64_t t, const Tensor& w, std::int64_t r) {
  switch (w.type) {
    case DType::kQ8_0:
      return dot_blocks<DType::kQ8_0>(x, t, w.row(r));
    case DType::kQ4_0:
      return dot_blocks<DType::kQ4_0>(x, t, w.row(r));
    case DType::kQ4_1:
      return dot_blocks<DType::kQ4_1>(x, t, w.row(r));
    default:
      return dot_floats(x.row(t), w.row(r), w.type, w.cols);
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
void unpack_block(std::int32_t* pairs, float& d, float& offset, const std::byte* block,
                  DType type) {
  d = f16_to_f32(load_u16(block));
  std::int16_t codes[kBlock];
  if (type == DType::kQ8_0) {
    offset = 0;
    for (int i = 0; i < kBlock; ++i) codes[i] = static_cast<std::int8_t>(block[2 + i]);
  } else {
    offset = type == DType::kQ4_1 ? f16_to_f32(load_u16(block + 2)) : -8 * d;
    const std::byte* nibbles = block + (type == DType::kQ4_1 ? 4 : 2);
    for (int i = 0; i < 16; ++i) {
      const int byte = std::to_integer<int>(nibbles[i]);
      codes[i] = static_cast<std::int16_t>(byte & 15);
      codes[i + 16] = static_cast<std::int16_t>(byte >> 4);
    }
  }
  std::memcpy(pairs, codes, sizeof codes);
}

void unpack_codes(Tile& tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
                  std::int64_t n) {
  alignas(32) std::int32_t pairs[8][kBlock / 2];  // a pair of codes travels as one 32-bit element
  for (std::int64_t b = 0; b < n / kBlock; ++b) {
    for (int half = 0; half < kTileCols; half += 8) {
      for (int r = 0; r < 8; ++r) {
        const std::int64_t row = first_row + half + r;
        float &d = tile.d[b][half + r], &offset = tile.offset[b][half + r];
        if (row < w.rows) {
          unpack_block(pairs[r], d, offset, w.row(row) + row_bytes(w.type, first_col + b * kBlock),
                       w.type);
        } else {
          std::fill(pairs[r], pairs[r] + kBlock / 2, 0);
          d = offset = 0;
        }
      }
      float* to = reinterpret_cast<float*>(tile.pairs) + b * (kBlock / 2) * kTileCols + half;
      for (int i = 0; i < kBlock / 2; i += 8)
        transpose_8x8(to + i * kTileCols, kTileCols, reinterpret_cast<float*>(pairs[0]) + i,
                      kBlock / 2);
    }
  }
}

// out[r][c] += the tile's columns times kRows rows of activations, for 16 weight rows c.
template <int kRows>
void multiply_codes(float* out, const Activations& x, std::int64_t t, const Tile& tile,
                    std::int64_t first_col, std::int64_t n) {
  for (std::int64_t b = 0; b < n / kBlock; ++b) {
    i32x8 sum[kRows][2] = {};
    const std::int16_t* pairs = tile.pairs + b * kBlock * kTileCols;
    for (int i = 0; i < kBlock; i += 2) {
      i32x8 left, right;
      std::memcpy(&left, pairs + i * kTileCols, sizeof left);
      std::memcpy(&right, pairs + i * kTileCols + kTileCols, sizeof right);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const std::int16_t* codes = x.codes(t + r) + first_col + b * kBlock + i;
        sum[r][0] = add_pairs(sum[r][0], codes, left);
        sum[r][1] = add_pairs(sum[r][1], codes, right);
      }
    }
    const std::int64_t block = first_col / kBlock + b;
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float scale = x.scale(t + r)[block], code_sum = x.sum(t + r)[block];
      for (int half = 0; half < 2; ++half) {
        float* to = out + r * kTileCols + 8 * half;
        const f32x8 d = load8(tile.d[b] + 8 * half), offset = load8(tile.offset[b] + 8 * half);
        store8(to, load8(to) + to_float(sum[r][half]) * (d * scale) + offset * code_sum);
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
  const std::int64_t end = std::min(first_row + kDotTask, p.w->rows);
  for (std::int64_t r = first_row; r < end; ++r) {
    for (std::int64_t t = 0; t < x.rows(); ++t) {
      float& out = p.out[t * p.out_stride + r];
      const float y = dot(x, t, *p.w, r);
      out = p.accumulate ? out + y : y;
    }
  }
}

}  // namespace

void Activations::assign(const float* x, std::int64_t rows, std::int64_t cols, bool with_codes,
                         int n_threads) {
  x_ = x, rows_ = rows, cols_ = cols;
  if (!with_codes) return;
  require(cols % kBlock == 0, "activations: cols: expected a multiple of 32, found ", cols);
  const std::int64_t n_blocks = cols / kBlock;
  const auto grow = [](auto& v, std::int64_t n) {
    if (static_cast<std::int64_t>(v.size()) < n) v.resize(static_cast<std::size_t>(n));
  };
  grow(codes_, rows * cols), grow(scale_, rows * n_blocks), grow(sum_, rows * n_blocks);
#pragma omp parallel for num_threads(n_threads) if (rows >= 8)
  for (std::int64_t i = 0; i < rows * n_blocks; ++i)
    encode_block(codes_.data() + i * kBlock, scale_[i], sum_[i], x + i * kBlock);
}

void matmul(std::span<const Product> products, const Activations& x, int n_threads) {
  const bool tiled = x.rows() > kDotRows;
  const std::int64_t step = tiled ? kTileCols : kDotTask;
  std::int64_t n_tasks = 0;
  for (const Product& p : products) {
    require(p.w->cols == x.cols(), p.w->name, ": cols: expected ", x.cols(), ", found ", p.w->cols);
    n_tasks += (p.w->rows + step - 1) / step;
  }
#pragma omp parallel num_threads(n_threads)
  {
    thread_local TileScratch scratch;
#pragma omp for schedule(dynamic, 1)
    for (std::int64_t task = 0; task < n_tasks; ++task) {
      std::int64_t i = task;
      const Product* p = products.data();
      for (; i >= (p->w->rows + step - 1) / step; ++p) i -= (p->w->rows + step - 1) / step;
      if (tiled) {
        multiply_tile(*p, x, i * step, scratch);
      } else {
        multiply_dots(*p, x, i * step);
      }
    }
  }
}

}  // namespace thaw
