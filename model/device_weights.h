// The weights of a model in device memory.
//
// Every matrix is repacked into two planes when it is loaded, so that a warp's loads are whole
// 16-byte words side by side:
//   codes   rows x units of 16 bytes: 4 F32, 8 F16 or BF16, 16 codes of Q8_0, or 32 codes of the
//           others, of more than four bits the low ones; the last unit of a row is padded with
//           zeros
//   scales  rows x blocks: f16 d (Q8_0, Q4_0), f16 d and f16 m (Q4_1), or what model/high_bits.h
//           says; a row is padded with zeros to whole units of 16 bytes; null for float formats
// But for K-quants, the bytes within a unit are those of the file (model/tensor.h). Float formats
// whose rows are whole units are copied from the mapped file as they are.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "device/cuda.h"
#include "model/weights.h"

namespace thaw {

// A view that kernels take; the planes belong to a DeviceWeights.
struct DeviceMatrix {
  DType type = DType::kF32;
  int rows = 0, cols = 0;
  int units = 0, scale_units = 0;  // in a row
  const uint4* codes = nullptr;
  const uint4* scales = nullptr;
};

// Elements of a unit.
__host__ __device__ constexpr int unit_elements(DType type) {
  if (type == DType::kF32) return 4;
  if (type == DType::kF16 || type == DType::kBF16) return 8;
  return type == DType::kQ8_0 ? 16 : 32;
}
// Bytes of the scales of 256 elements, which are whole blocks in every format.
__host__ __device__ constexpr int scale_bytes(DType type) {
  switch (type) {
    case DType::kQ8_0:
    case DType::kQ4_0:
      return 8 * 2;
    case DType::kQ4_1:
      return 8 * 4;
    case DType::kQ5_0:
      return 8 * 6;
    case DType::kQ5_1:
      return 8 * 8;
    case DType::kQ4_K:
      return 4 * 4;
    case DType::kQ5_K:
      return 4 * (4 + 8);
    case DType::kQ6_K:
      return 4 * (5 + 16);
    default:
      return 0;
  }
}
// Units of both planes in a row.
__host__ __device__ constexpr int n_units(DType type, int cols) {
  return (cols + unit_elements(type) - 1) / unit_elements(type);
}
__host__ __device__ constexpr int n_scale_units(DType type, int cols) {
  return (cols / 32 * scale_bytes(type) / 8 + 15) / 16;
}

class DeviceWeights {
 public:
  // Copies all tensors; what shares its bytes, such as a tied output head, is copied once. Returns
  // when they have arrived. `weights` is kept only as the name of its parts, below.
  DeviceWeights(const Weights& weights, const Stream& stream);

  // Of a tensor, or a norm, of the Weights that were copied. Throws Error for any other.
  const DeviceMatrix& matrix(const Tensor& tensor) const;
  const float* norm(const std::vector<float>& norm) const;

  std::size_t bytes() const { return bytes_; }

 private:
  void add(const Tensor& tensor, const Stream& stream);
  void add(const std::vector<float>& norm, const Stream& stream);
  std::byte* reserve(std::size_t bytes, const std::string& what);

  std::unordered_map<const void*, DeviceMatrix> matrices_;  // by the address in host memory
  std::unordered_map<const void*, const float*> norms_;
  std::vector<DeviceBuffer<std::byte>> storage_;
  std::size_t bytes_ = 0;
};

}  // namespace thaw
