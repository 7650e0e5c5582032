// GEMM-lite on the CPU: activations (T x K) times the transpose of stored weights (N x K).
//
// Float formats multiply f32 activations. Block formats multiply integers: each block of 32
// activations is rounded to 16-bit codes with one f32 scale, a relative error of 2^-16 of the
// block's largest element (8 bits, the usual choice, cost 100 times more KL), and the products of
// codes are summed exactly in 32-bit integers, so every instruction set gives the same sums.
//
// T <= kDotRows (device/dots_cpu.h): dot products with blocks as stored, of four weight rows and
// all of T; of float formats, T <= kFloatDotRows (model/float_dots_cpu.h), of one weight row. More
// rows: tiles of 16 weight rows are unpacked once and multiplied with all rows of activations from
// registers.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "device/thread_pool.h"
#include "model/tensor.h"

namespace thaw {

// Rows of activations, with their integer form when a block format needs it. Buffers are kept
// between calls.
class Activations {
 public:
  // Refers to x (rows x cols, f32), which must stay until the products are done. cols is a multiple
  // of 32 when with_codes.
  void assign(const float* x, std::int64_t rows, std::int64_t cols, bool with_codes,
              ThreadPool& pool);

  std::int64_t rows() const { return rows_; }
  std::int64_t cols() const { return cols_; }
  const float* row(std::int64_t t) const { return x_ + t * cols_; }
  // x[t][32 b + i] ~ scales(t)[2 b] * codes(t)[32 b + i / 2 + i % 2 * 16], where codes are not
  // planes of bytes (kDotPlanes and T <= kDotRows: 32 higher bytes, then 32 lower ones, each with a
  // sign); scales(t)[2 b + 1] is the scale times the sum of the block's codes: what a format's
  // offset is multiplied with.
  const std::int16_t* codes(std::int64_t t) const { return codes_.data() + t * cols_; }
  const float* scales(std::int64_t t) const { return scales_.data() + t * (cols_ / 16); }

 private:
  const float* x_ = nullptr;
  std::int64_t rows_ = 0, cols_ = 0;
  std::vector<std::int16_t> codes_;
  std::vector<float> scales_;
};

// out[t * out_stride + r] (+)= row r of w . row t of the activations, for all r and t.
struct Product {
  float* out;
  std::int64_t out_stride;
  const Tensor* w;
  bool accumulate;  // add to out instead of overwriting it
};

// Whether products with this format need Activations with codes.
inline bool needs_codes(DType type) { return dtype_info(type).block > 1; }

// All products of the same activations, in one loop of tasks. Every w has cols = x.cols().
// Results do not depend on the pool's size.
void matmul(std::span<const Product> products, const Activations& x, ThreadPool& pool);

}  // namespace thaw
