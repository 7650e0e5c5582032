#include "model/tensor.h"

#include <cstring>

#include "model/k_quants.h"

namespace thaw {

namespace {

std::uint16_t load_u16(const std::byte* p) {
  std::uint16_t bits;
  std::memcpy(&bits, p, sizeof bits);
  return bits;
}

// Element i of a block of 4 bits, or of 5 with the fifths in front.
int code_of(const std::byte* codes, DType type, int i) {
  const int fifth = std::to_integer<int>(codes[i / 8]) >> i % 8 & 1;
  if (has_five_bits(type)) codes += 4;
  const int four = std::to_integer<int>(codes[i % 16]) >> i / 16 * 4 & 15;
  return has_five_bits(type) ? four | fifth << 4 : four;
}

void dequantize_k_block(float* out, const std::byte* in, DType type) {
  const float d = f16_to_f32(load_u16(in + k_d_at(type)));
  const KScales scales = has_min(type) ? k_scales(in) : KScales{};
  const float e = has_min(type) ? f16_to_f32(load_u16(in + 2)) : 0.0f;
  for (int p = 0; p < kKParts; ++p) {
    for (int i = 0; i < kPartCols; ++i, ++out) {
      const int c = k_code(in, type, p, i);
      if (has_min(type)) {  // both products are exact
        *out = d * static_cast<float>(scales.s[p] * c) - e * static_cast<float>(scales.m[p]);
      } else {
        const auto s = static_cast<std::int8_t>(in[k_scales_at(type) + 2 * p + i / 16]);
        *out = d * static_cast<float>(s * (c - 32));
      }
    }
  }
}

// One block.
void dequantize_block(float* out, const std::byte* in, DType type) {
  if (is_k_quant(type)) return dequantize_k_block(out, in, type);
  const float d = f16_to_f32(load_u16(in));
  for (int i = 0; i < 32; ++i) {
    if (type == DType::kQ8_0)
      out[i] = d * static_cast<float>(static_cast<std::int8_t>(in[2 + i]));
    else if (has_min(type))
      out[i] = d * static_cast<float>(code_of(in + 4, type, i)) + f16_to_f32(load_u16(in + 2));
    else
      out[i] = d * static_cast<float>(code_of(in + 2, type, i) - zero_code(type));
  }
}

}  // namespace

std::optional<DType> dtype_named(std::string_view name) {
  for (int i = 0; i < kNumDTypes; ++i)
    if (kDTypes[i].name == name) return static_cast<DType>(i);
  return std::nullopt;
}

std::string dtype_names() {
  std::string names;
  for (const DTypeInfo& info : kDTypes) (names += names.empty() ? "" : ", ") += info.name;
  return names;
}

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
