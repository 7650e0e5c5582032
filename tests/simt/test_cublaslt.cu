// The stand-in for cuBLASLt: y = x w^T of row-major matrices, as thaw asks for it.
#include <cublasLt.h>
#include <doctest/doctest.h>

#include <vector>

#include "device/cuda.h"
#include "device/kernel.cuh"

using namespace thaw;

// y (rows x outs) = 2 x (rows x inner) w^T (outs x inner) + y. Row-major is column-major
// transposed: y^T = w x^T.
template <class T>
static void check_matmul(cudaDataType type) {
  constexpr int kRows = 3, kOuts = 5, kInner = 40;
  const Stream stream;
  std::vector<T> x(kRows * kInner), w(kOuts * kInner);
  for (int i = 0; i < kRows * kInner; ++i) x[i] = static_cast<float>(i % 7) - 3;
  for (int i = 0; i < kOuts * kInner; ++i) w[i] = static_cast<float>(i % 5) - 2;
  std::vector<float> y(kRows * kOuts, 1.0f);
  DeviceBuffer<T> dx(x.size(), "x"), dw(w.size(), "w");
  DeviceBuffer<float> dy(y.size(), "y");
  copy_to_device(dx.data(), x.data(), x.size(), stream);
  copy_to_device(dw.data(), w.data(), w.size(), stream);
  copy_to_device(dy.data(), y.data(), y.size(), stream);

  cublasLtHandle_t handle;
  cublasLtMatmulDesc_t desc;
  cublasLtMatrixLayout_t w_layout, x_layout, y_layout;
  const cublasOperation_t transposed = CUBLAS_OP_T;
  const float alpha = 2, beta = 1;
  cublasLtCreate(&handle);
  cublasLtMatmulDescCreate(&desc, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  cublasLtMatmulDescSetAttribute(desc, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed);
  cublasLtMatrixLayoutCreate(&w_layout, type, kInner, kOuts, kInner);
  cublasLtMatrixLayoutCreate(&x_layout, type, kInner, kRows, kInner);
  cublasLtMatrixLayoutCreate(&y_layout, CUDA_R_32F, kOuts, kRows, kOuts);
  CHECK(cublasLtMatmul(handle, desc, &alpha, dw.data(), w_layout, dx.data(), x_layout, &beta,
                       dy.data(), y_layout, dy.data(), y_layout, nullptr, nullptr, 0,
                       stream.get()) == CUBLAS_STATUS_SUCCESS);
  CHECK(cublasLtMatmul(handle, desc, &alpha, dx.data(), x_layout, dx.data(), x_layout, &beta,
                       dy.data(), y_layout, dy.data(), y_layout, nullptr, nullptr, 0,
                       stream.get()) == CUBLAS_STATUS_INVALID_VALUE);  // shapes do not fit
  copy_to_host(y.data(), dy.data(), y.size(), stream);
  for (int r = 0; r < kRows; ++r) {
    for (int o = 0; o < kOuts; ++o) {
      float sum = 0;
      for (int k = 0; k < kInner; ++k)
        sum += to_float(x[r * kInner + k]) * to_float(w[o * kInner + k]);
      CHECK(y[r * kOuts + o] == 2 * sum + 1);
    }
  }
  for (cublasLtMatrixLayout_t layout : {w_layout, x_layout, y_layout})
    cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulDescDestroy(desc);
  cublasLtDestroy(handle);
}

TEST_CASE("simt: cublasLtMatmul is a plain product") {
  check_matmul<float>(CUDA_R_32F);
  check_matmul<__half>(CUDA_R_16F);
  check_matmul<__nv_bfloat16>(CUDA_R_16BF);
}
