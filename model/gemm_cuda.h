// y = x W^T for many rows of activations, by cuBLASLt on tensor cores: what a prompt is read with.
//
// Products are of 16-bit numbers with f32 sums. Weights are multiplied as they are if they are F16
// or BF16; quantised ones are widened to f16 first, a tile of rows at a time, into a buffer that is
// read back at once. Activations are rounded to the format of the weights, by at most 2^-11 of each
// (f16, saturated at 65504) or 2^-8 (bf16). F32 weights are multiplied in f32.
#pragma once

#include <cublasLt.h>

#include <array>
#include <cstddef>
#include <map>
#include <memory>

#include "device/cuda.h"
#include "model/device_weights.h"

namespace thaw {

class Gemm {
 public:
  // Keeps the reference; all work is queued there. Quantised weights are widened so many bytes at
  // a time (at least a row).
  explicit Gemm(const Stream& stream, std::size_t tile_bytes = 64 << 20);
  ~Gemm();
  Gemm(const Gemm&) = delete;
  Gemm& operator=(const Gemm&) = delete;

  // What the next products are with: x (n_rows x cols, f32), or with a norm (cols), RMSNorm(x) *
  // norm. x must stay as it is until they are queued, and may be the output of the last one.
  void set_activations(const float* x, const float* norm, float eps, int n_rows, int cols);

  // The same with silu(gate) * up of what two products gave (n_rows x cols each, f32).
  void set_gated(const float* gate, const float* up, int n_rows, int cols);

  // y (n_rows x w.rows) = x W^T, or += with `add`. w.cols = cols.
  void multiply(const char* name, float* y, const DeviceMatrix& w, bool add);

 private:
  struct Plan;
  struct Destroy {
    void operator()(cublasLtHandle_t handle) const { cublasLtDestroy(handle); }
    void operator()(cublasLtMatmulDesc_t product) const { cublasLtMatmulDescDestroy(product); }
    void operator()(cublasLtMatrixLayout_t layout) const { cublasLtMatrixLayoutDestroy(layout); }
  };
  template <class T>
  using Owned = std::unique_ptr<std::remove_pointer_t<T>, Destroy>;
  using Shape =
      std::array<std::int64_t, 6>;  // type, n_rows, rows, inner, stride and alignment of y

  void pack(DType type);
  const void* widened(const DeviceMatrix& w, int first, int n);
  const Plan& plan(const Shape& shape);
  Plan make_plan(const Shape& shape) const;
  void* scratch(DeviceBuffer<std::byte>& buffer, std::size_t bytes);

  const Stream& stream_;
  const std::size_t tile_bytes_;
  Owned<cublasLtHandle_t> handle_;
  Owned<cublasLtMatmulDesc_t> transposed_;
  std::map<Shape, Plan> plans_;
  DeviceBuffer<std::byte> workspace_, packed_, tile_;

  const float* x_ = nullptr;
  const float* up_ = nullptr;  // not null: x_ is the gate
  const float* norm_ = nullptr;
  float eps_ = 0;
  int n_rows_ = 0, cols_ = 0;
  bool is_packed_ = false;
  DType packed_type_ = DType::kF32;
};

}  // namespace thaw
