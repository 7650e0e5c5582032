#include "model/tensor.h"

#include <bit>
#include <cstring>

#include "device/error.h"

namespace thaw {

const DTypeInfo& dtype_info(DType type) {
  static constexpr DTypeInfo kInfo[] = {
      {"F32", 1, 4}, {"F16", 1, 2}, {"BF16", 1, 2}, {"Q8_0", 32, 34}, {"Q4_0", 32, 18}, {"Q4_1", 32, 20},
  };
  return kInfo[static_cast<int>(type)];
}

std::int64_t row_bytes(DType type, std::int64_t cols) {
  const DTypeInfo& info = dtype_info(type);
  return cols / info.block * info.block_bytes;
}

float f16_to_f32(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000u) << 16;
  const std::uint32_t rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // Exponent and mantissa moved into place are short by the difference of the biases, 127 - 15; a
  // multiplication makes up for it and normalises subnormals at the same time.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

std::uint16_t f32_to_f16(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half = 0;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;  // NaN
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and more round to infinity
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {
    // Below 2^-14: adding 1/2 leaves the subnormal's bits, rounded by the FPU, at the bottom.
    const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    half = std::bit_cast<std::uint32_t>(shifted) - 0x3f000000u;
  }
  return static_cast<std::uint16_t>(sign | half);
}

float bf16_to_f32(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

std::uint16_t f32_to_bf16(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>(bits >> 16 | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

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
      for (std::int64_t i = 0; i < n; ++i) out[i] = f16_to_f32(load_u16(in + 2 * i));
      return;
    case DType::kBF16:
      for (std::int64_t i = 0; i < n; ++i) out[i] = bf16_to_f32(load_u16(in + 2 * i));
      return;
    default: {
      const DTypeInfo& info = dtype_info(type);
      for (std::int64_t i = 0; i < n; i += info.block, in += info.block_bytes)
        dequantize_block(out + i, in, type);
    }
  }
}

}  // namespace thaw
