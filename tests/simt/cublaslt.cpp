#include <cublasLt.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "device/half.h"
#include "tests/simt/memory.h"
#include "tests/simt/queue.h"
#include "tests/simt/runtime.h"

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque {
  cublasOperation_t a = CUBLAS_OP_N, b = CUBLAS_OP_N;
};
struct cublasLtMatrixLayoutOpaque {
  cudaDataType type;
  std::int64_t rows, cols, stride;  // element (r, c) is at r + c stride

  std::size_t element() const { return type == CUDA_R_32F ? 4 : 2; }
  std::size_t bytes() const {
    return static_cast<std::size_t>((cols - 1) * stride + rows) * element();
  }
  float get(const void* data, std::int64_t r, std::int64_t c) const {
    const std::int64_t at = r + c * stride;
    if (type == CUDA_R_32F) return static_cast<const float*>(data)[at];
    const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[at];
    return type == CUDA_R_16F ? thaw::f16_to_f32(bits) : thaw::bf16_to_f32(bits);
  }
  void set(void* data, std::int64_t r, std::int64_t c, float x) const {
    const std::int64_t at = r + c * stride;
    if (type == CUDA_R_32F) {
      static_cast<float*>(data)[at] = x;
    } else {
      static_cast<std::uint16_t*>(data)[at] =
          type == CUDA_R_16F ? thaw::f32_to_f16(x) : thaw::f32_to_bf16(x);
    }
  }
};
struct cublasLtMatmulPreferenceOpaque {};

namespace {

using Layout = cublasLtMatrixLayoutOpaque;

// Rows of op(a), n_inner long, as f32. `transposed`: they are columns of a.
std::vector<float> rows_of(const void* a, const Layout& layout, bool transposed) {
  const std::int64_t n = transposed ? layout.cols : layout.rows;
  const std::int64_t n_inner = transposed ? layout.rows : layout.cols;
  std::vector<float> out(static_cast<std::size_t>(n * n_inner));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t k = 0; k < n_inner; ++k)
      out[i * n_inner + k] = transposed ? layout.get(a, k, i) : layout.get(a, i, k);
  return out;
}

void multiply(const void* a, const Layout& a_layout, bool a_transposed, const void* b,
              const Layout& b_layout, bool b_transposed, const void* c, const Layout& c_layout,
              void* d, const Layout& d_layout, float alpha, float beta) {
  const std::vector<float> left = rows_of(a, a_layout, a_transposed);
  const std::vector<float> right = rows_of(b, b_layout, !b_transposed);  // columns of op(b)
  const std::int64_t n_inner = a_transposed ? a_layout.rows : a_layout.cols;
  for (std::int64_t j = 0; j < d_layout.cols; ++j) {
    for (std::int64_t i = 0; i < d_layout.rows; ++i) {
      const float *x = &left[i * n_inner], *y = &right[j * n_inner];
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t k = 0; k < n_inner; ++k) sum += x[k] * y[k];
      const float old = beta == 0 ? 0 : beta * c_layout.get(c, i, j);
      d_layout.set(d, i, j, alpha * sum + old);
    }
  }
}

template <class T, class... Args>
cublasStatus_t create(T** out, Args... args) {
  if (simt::fails()) return CUBLAS_STATUS_NOT_INITIALIZED;
  *out = new T{args...};
  return CUBLAS_STATUS_SUCCESS;
}
template <class T>
cublasStatus_t destroy(T* object) {
  delete object;
  return CUBLAS_STATUS_SUCCESS;
}

}  // namespace

const char* cublasLtGetStatusString(cublasStatus_t status) {
  return status == CUBLAS_STATUS_SUCCESS         ? "CUBLAS_STATUS_SUCCESS"
         : status == CUBLAS_STATUS_INVALID_VALUE ? "CUBLAS_STATUS_INVALID_VALUE"
                                                 : "CUBLAS_STATUS_NOT_SUPPORTED";
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* out) { return create(out); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* out, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  if (compute != CUBLAS_COMPUTE_32F || scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  return create(out);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc) { return destroy(desc); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc,
                                              cublasLtMatmulDescAttributes_t which,
                                              const void* value, std::size_t bytes) {
  if (bytes != sizeof(cublasOperation_t)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(which == CUBLASLT_MATMUL_DESC_TRANSA ? &desc->a : &desc->b, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* out, cudaDataType type,
                                          std::uint64_t rows, std::uint64_t cols,
                                          std::int64_t stride) {
  const auto n_rows = static_cast<std::int64_t>(rows), n_cols = static_cast<std::int64_t>(cols);
  if (n_rows < 1 || n_cols < 1 || stride < n_rows) return CUBLAS_STATUS_INVALID_VALUE;
  return create(out, type, n_rows, n_cols, stride);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  return destroy(layout);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* out) {
  return create(out);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t,
                                                    cublasLtMatmulPreferenceAttributes_t,
                                                    const void*, std::size_t) {
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int wanted,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* found) {
  if (simt::fails()) return CUBLAS_STATUS_NOT_SUPPORTED;
  *found = std::min(wanted, 1);
  if (*found == 1) results[0] = {};
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t*, void*,
                              std::size_t, cudaStream_t stream) {
  if (simt::fails()) return CUBLAS_STATUS_EXECUTION_FAILED;
  const bool ta = desc->a == CUBLAS_OP_T, tb = desc->b == CUBLAS_OP_T;
  const Layout la = *a_layout, lb = *b_layout, lc = *c_layout, ld = *d_layout;
  const std::int64_t inner = ta ? la.rows : la.cols;
  if (inner != (tb ? lb.cols : lb.rows) || ld.rows != (ta ? la.cols : la.rows) ||
      ld.cols != (tb ? lb.rows : lb.cols) || lc.rows != ld.rows || lc.cols != ld.cols)
    return CUBLAS_STATUS_INVALID_VALUE;
  const auto visible = [](const void* data, const Layout& layout) {
    return simt::kind_of(data, layout.bytes()) != simt::Kind::kPageable;
  };
  if (!visible(a, la) || !visible(b, lb) || !visible(c, lc) || !visible(d, ld))
    return CUBLAS_STATUS_INVALID_VALUE;
  float scales[2];
  std::memcpy(&scales[0], alpha, 4), std::memcpy(&scales[1], beta, 4);
  simt::enqueue(*stream, simt::name_or("matmul"), [=](const simt::Op&) {
    multiply(a, la, ta, b, lb, tb, c, lc, d, ld, scales[0], scales[1]);
    return static_cast<std::int64_t>(la.bytes() + lb.bytes() + ld.bytes());
  });
  return CUBLAS_STATUS_SUCCESS;
}
