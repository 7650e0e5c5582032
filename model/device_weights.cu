#include <cstring>

#include "device/error.h"
#include "model/device_weights.h"

namespace thaw {
namespace {

constexpr std::int64_t kUnitBytes = 16;

// One row: blocks of header and codes into a row of codes and a row of scales.
void split_blocks(std::byte* codes, std::byte* scales, const std::byte* in, DType type,
                  std::int64_t cols) {
  const DTypeInfo& info = dtype_info(type);
  const auto header = static_cast<std::size_t>(scale_bytes(type));
  const std::size_t rest = static_cast<std::size_t>(info.block_bytes) - header;
  for (std::int64_t block = 0; block < cols / info.block; ++block) {
    std::memcpy(scales, in, header), std::memcpy(codes, in + header, rest);
    scales += header, codes += rest, in += info.block_bytes;
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
  const int header = scale_bytes(tensor.type), block = dtype_info(tensor.type).block;
  require(tensor.cols % block == 0 && tensor.rows < 1 << 30 && tensor.cols < 1 << 30, tensor.name,
          ": shape: expected whole blocks of ", block, " columns, found ", tensor.rows, " x ",
          tensor.cols);
  const std::int64_t n_blocks = tensor.cols / block;
  const std::int64_t row_codes = n_blocks * (dtype_info(tensor.type).block_bytes - header);
  const std::int64_t units = (row_codes + kUnitBytes - 1) / kUnitBytes;
  const auto n_codes = static_cast<std::size_t>(tensor.rows * units * kUnitBytes);
  const std::int64_t scale_units = n_scale_units(tensor.type, static_cast<int>(tensor.cols));
  const auto n_scales = static_cast<std::size_t>(tensor.rows * scale_units * kUnitBytes);
  std::byte* codes = reserve(n_codes, tensor.name);
  std::byte* scales = n_scales == 0 ? nullptr : reserve(n_scales, tensor.name);
  at->second = {tensor.type,
                static_cast<int>(tensor.rows),
                static_cast<int>(tensor.cols),
                static_cast<int>(units),
                static_cast<int>(scale_units),
                reinterpret_cast<const uint4*>(codes),
                reinterpret_cast<const uint4*>(scales)};
  if (header == 0 && row_codes == units * kUnitBytes) {
    copy_to_device(codes, tensor.data, n_codes, stream);
    return;
  }
  std::vector<std::byte> host_codes(n_codes), host_scales(n_scales);
  for (std::int64_t r = 0; r < tensor.rows; ++r) {
    std::byte* to = host_codes.data() + r * units * kUnitBytes;
    if (header == 0)
      std::memcpy(to, tensor.row(r), static_cast<std::size_t>(row_codes));
    else
      split_blocks(to, host_scales.data() + r * scale_units * kUnitBytes, tensor.row(r),
                   tensor.type, tensor.cols);
  }
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
