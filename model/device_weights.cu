#include <cstring>

#include "device/error.h"
#include "model/device_weights.h"
#include "model/high_bits.h"

namespace thaw {
namespace {

constexpr std::int64_t kUnitBytes = 16;

// A row of a file into a row of codes and a row of scales, which are zeros before.
void split_row(std::byte* codes, std::byte* scales, const std::byte* in, DType type,
               std::int64_t cols) {
  const DTypeInfo& info = dtype_info(type);
  if (info.block == 1)
    return void(std::memcpy(codes, in, static_cast<std::size_t>(row_bytes(type, cols))));
  const auto header = static_cast<std::size_t>(scale_bytes(type) * info.block / 256);
  const auto of_codes = static_cast<std::size_t>(info.block / unit_elements(type) * kUnitBytes);
  for (std::int64_t block = 0; block < cols / info.block; ++block) {
    if (is_k_quant(type))
      split_k_block(codes, scales, in, type);
    else if (has_five_bits(type))
      split_five_bits(codes, scales, in, type);
    else
      std::memcpy(scales, in, header), std::memcpy(codes, in + header, of_codes);
    scales += header, codes += of_codes, in += info.block_bytes;
  }
}

}  // namespace

DeviceWeights::DeviceWeights(const Weights& weights, const Stream& stream) {
  add(weights.embedding, stream);
  for (const LayerWeights& w : weights.layers) {
    for (const Tensor* tensor : {&w.wq, &w.wk, &w.wv, &w.wo, &w.w_gate, &w.w_up, &w.w_down})
      add(*tensor, stream);
    add(w.attn_norm, stream), add(w.ffn_norm, stream);
  }
  add(weights.final_norm, stream), add(weights.output, stream);
  stream.synchronize();  // kernels may read weights before the work that precedes them is done
}

std::byte* DeviceWeights::reserve(std::size_t bytes, const std::string& what) {
  bytes_ += bytes;
  return storage_.emplace_back(bytes, what.c_str()).data();
}

void DeviceWeights::add(const Tensor& tensor, const Stream& stream) {
  const auto [at, is_new] = matrices_.try_emplace(tensor.data);
  if (!is_new) return;
  const int block = dtype_info(tensor.type).block;
  require(tensor.cols % block == 0 && tensor.rows < 1 << 30 && tensor.cols < 1 << 30, tensor.name,
          ": shape: expected whole blocks of ", block, " columns, found ", tensor.rows, " x ",
          tensor.cols);
  const auto rows = static_cast<int>(tensor.rows), cols = static_cast<int>(tensor.cols);
  const int units = n_units(tensor.type, cols), scale_units = n_scale_units(tensor.type, cols);
  const std::int64_t row_codes = units * kUnitBytes, row_scales = scale_units * kUnitBytes;
  const auto n_codes = static_cast<std::size_t>(rows * row_codes);
  const auto n_scales = static_cast<std::size_t>(rows * row_scales);
  std::byte* codes = reserve(n_codes, tensor.name);
  std::byte* scales = n_scales == 0 ? nullptr : reserve(n_scales, tensor.name);
  at->second = {tensor.type,
                rows,
                cols,
                units,
                scale_units,
                reinterpret_cast<const uint4*>(codes),
                reinterpret_cast<const uint4*>(scales)};
  if (block == 1 && row_codes == row_bytes(tensor.type, cols)) {
    copy_to_device(codes, tensor.data, n_codes, stream);
    return;
  }
  std::vector<std::byte> host_codes(n_codes), host_scales(n_scales);
  for (int r = 0; r < rows; ++r)
    split_row(host_codes.data() + r * row_codes, host_scales.data() + r * row_scales, tensor.row(r),
              tensor.type, cols);
  copy_to_device(codes, host_codes.data(), n_codes, stream);
  if (n_scales > 0) copy_to_device(scales, host_scales.data(), n_scales, stream);
}

void DeviceWeights::add(const std::vector<float>& norm, const Stream& stream) {
  auto* device = reinterpret_cast<float*>(reserve(norm.size() * sizeof(float), "norm"));
  copy_to_device(device, norm.data(), norm.size(), stream);
  norms_[norm.data()] = device;
}

const DeviceMatrix& DeviceWeights::matrix(const Tensor& tensor) const {
  const auto at = matrices_.find(tensor.data);
  require(at != matrices_.end(), tensor.name, ": not in device memory");
  return at->second;
}

const float* DeviceWeights::norm(const std::vector<float>& norm) const {
  const auto at = norms_.find(norm.data());
  require(at != norms_.end(), "norm: not in device memory");
  return at->second;
}

}  // namespace thaw
