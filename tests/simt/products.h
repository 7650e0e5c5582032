// How far products of matrices on the GPU may be from the definition's, and what their tests share.
//
// Tolerances are on the error's power relative to the result's (NMSE). A lane adds K / 32 products
// and five steps join the lanes: about 20 roundings of 2^-24, each of power 2^-48 / 12, so 1e-14;
// 1e-11 leaves room for sums that cancel. q and k add the rounding of the angle in f32: at position
// 117 that is 117 x 2^-24 = 7e-6, squared 5e-11.
//
// Where weights are codes, activations are rounded to integers up to 32512, of the largest of a
// block of 32, which is at most sqrt(32) times their rms, for normal numbers some 2.5 times: a step
// has the power (2.5 / 32512)^2 / 12 = 5e-10 of theirs, and a sum of products that share of its
// own. 2e-9 holds blocks whose largest number is twice that.
//
// With more than 8 rows, numbers are rounded to the product's format, by at most u = 2^-11 (f16) or
// 2^-8 (bf16) of them and evenly: less than u^2 / 3 of the power; quantised weights are rounded as
// well. Errors of different products are independent, so a sum has the same share of its power. h
// is a product of two sums, and silu's slope adds to it: four times.
#pragma once

#include <cstdint>
#include <vector>

#include "device/cuda.h"
#include "model/tensor.h"
#include "tests/sanitized.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

namespace thaw::testing {

using Vector = std::vector<float>;

// All formats; where the emulator is slow, without those whose loads and codes others have, too.
inline std::vector<DType> product_types() {
  std::vector<DType> types;
  for (const DType type : kAllTypes)
    if (!simt::kIsSlow || (type != DType::kQ5_1 && type != DType::kQ4_K && type != DType::kQ5_K))
      types.push_back(type);
  return types;
}

// NMSE of a product with n_rows rows of activations.
inline double product_error(DType type, std::int64_t n_rows) {
  if (n_rows <= 8 && dtype_info(type).block > 1) return 2e-9;
  if (n_rows <= 8 || type == DType::kF32) return 1e-11;
  if (type == DType::kBF16) return 0x1p-16 / 3;
  return (type == DType::kF16 ? 1 : 2) * 0x1p-22 / 3;
}

// Copies of host memory on the device.
template <class T>
DeviceBuffer<T> on_device(const std::vector<T>& host, const Stream& stream) {
  DeviceBuffer<T> device(host.size(), "test");
  copy_to_device(device.data(), host.data(), host.size(), stream);
  return device;
}
inline Vector on_host(const DeviceBuffer<float>& device, const Stream& stream) {
  Vector host(device.size());
  copy_to_host(host.data(), device.data(), host.size(), stream);
  return host;
}

inline void append(Vector& to, const Vector& from) {
  to.insert(to.end(), from.begin(), from.end());
}

}  // namespace thaw::testing
