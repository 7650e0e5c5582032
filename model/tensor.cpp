#include "model/tensor.h"

#include <cstring>

#include "device/error.h"

namespace thaw {

namespace {

std::uint16_t load_u16(const std::byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

int nibble(const std::byte* codes, int i) {  // element i of a 4-bit block
  const int byte = std::to_integer<int>(codes[i % 16]);
  return i < 16 ? byte & 15 : byte >> 4;
}

// One block of 32.
void dequantize_block(float* out, const std::byte* in, DType type) {
  const float d = f16_to_f32(load_u16(in));
  switch (type) {
    case DType::kQ8_0:
      for (int i = 0; i < 32; ++i)
        out[i] = d * static_cast<float>(static_cast<std::int8_t>(in[2 + i]));
      return;
    case DType::kQ4_0:
      for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(nibble(in + 2, i) - 8);
      return;
    case DType::kQ4_1: {
      const float m = f16_to_f32(load_u16(in + 2));
      for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(nibble(in + 4, i)) + m;
      return;
    }
    default:
      fail("dequantize_block: expected a block format, found ", dtype_info(type).name);
  }
}

}  // namespace

void dequantize(float* out, const std::byte* in, DType type, std::int64_t n) {
  switch (type) {
    case DType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case DType::kF16:
      widen_f16(out, reinterpret_cast<const std::uint16_t*>(in), n);
      return;
    case DType::kBF16:
      widen_bf16(out, reinterpret_cast<const std::uint16_t*>(in), n);
      return;
    default: {
      const DTypeInfo& info = dtype_info(type);
      for (std::int64_t i = 0; i < n; i += info.block, in += info.block_bytes)
        dequantize_block(out + i, in, type);
    }
  }
}

}  // namespace thaw
