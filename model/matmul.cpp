#include "model/matmul.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "device/error.h"
#include "model/block_dots_cpu.h"
#include "model/block_tiles_cpu.h"
#include "model/float_dots_cpu.h"

namespace thaw {
namespace {

constexpr int kBlock = 32;             // activations with one scale
constexpr std::int64_t kDotTask = 32;  // weight rows of a task with dot products

// The largest code: split into two bytes with signs, 127 and 127.
constexpr float kPeakCode = 127 * 256 + 127;

// Codes of one block, round(x / scale), and its two scales. Even elements, then odd ones; as
// planes, the higher bytes c1 and then the lower c0 of c = 256 c1 + c0, in the order of x.
template <bool kPlanes>
void encode_block(std::int16_t* codes, float* scales, const float* x) {
  std::int32_t peak_bits = 0;  // as integers, so that NaN is the largest: it becomes the scale
#pragma omp simd reduction(max : peak_bits)
  for (int i = 0; i < kBlock; ++i)
    peak_bits = std::max(peak_bits, std::bit_cast<std::int32_t>(x[i]) & 0x7fffffff);
  const auto peak = std::bit_cast<float>(peak_bits);
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

// body(type as a constant), for formats with codes.
template <class Body>
void with_codes(DType type, const Body& body) {
  const auto call = [&]<DType... kTypes>() {
    (void)((type == kTypes && (body(std::integral_constant<DType, kTypes>{}), true)) || ...);
  };
  call.template operator()<DType::kQ8_0, DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1,
                           DType::kQ4_K, DType::kQ5_K, DType::kQ6_K>();
}

// out[t * kDotCols + r] = row first_row + r of w . row t of x, for kDotCols weight rows, or for
// one.
void dot_rows(float* out, const Activations& x, const Tensor& w, std::int64_t first_row,
              std::int64_t n_rows) {
  if (needs_codes(w.type)) {
    return with_codes(w.type, [&](auto type) {
      dot_all_blocks<decltype(type)::value>(out, x, w.row(first_row),
                                            n_rows == kDotCols ? row_bytes(w.type, w.cols) : 0);
    });
  }
  for (std::int64_t r = 0; r < n_rows; ++r) dot_floats(out + r, kDotCols, x, w, first_row + r);
}

// ---- tiles: 16 weight rows unpacked, all rows of activations ----

// tile[column][weight row], of n columns.
void unpack_floats(float* tile, const Tensor& w, std::int64_t first_row, std::int64_t first_col,
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
      transpose_8x8(tile + i * kTileCols + half, kTileCols, rows[0] + i, kChunk);
  }
}

// What a thread needs for a tile; kept between calls.
struct TileScratch {
  CodeTile codes;
  alignas(64) float floats[kChunk * kTileCols];
  std::vector<float> sums;  // activation rows x 16
};

void multiply_tile(const Product& p, const Activations& x, std::int64_t first_row, TileScratch& s) {
  const Tensor& w = *p.w;
  s.sums.assign(static_cast<std::size_t>(x.rows()) * kTileCols, 0.0f);
  for (std::int64_t col = 0; col < w.cols; col += kChunk) {
    const std::int64_t n = std::min<std::int64_t>(kChunk, w.cols - col);
    if (needs_codes(w.type)) {
      with_codes(w.type, [&](auto type) {
        multiply_code_tile<decltype(type)::value>(s.sums.data(), s.codes, x, w, first_row, col, n);
      });
    } else {
      unpack_floats(s.floats, w, first_row, col, n);
      tile_multiply(s.sums.data(), kTileCols, x.row(0) + col, x.cols(), x.rows(), s.floats,
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
    float y[std::max(kDotRows, kFloatDotRows) * kDotCols];
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
