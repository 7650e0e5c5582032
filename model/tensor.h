// A weight matrix as it is stored in its file, and the formats it can have.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "device/half.h"

namespace thaw {

// Storage formats. Quantised formats hold blocks of consecutive elements of one row; of 32:
//   kQ8_0: f16 d, 32 x int8 c            x = d * c
//   kQ4_0: f16 d, 16 bytes               x = d * (c - 8)
//   kQ4_1: f16 d, f16 m, 16 bytes        x = d * c + m
//   kQ5_0: f16 d, 4 bytes, 16 bytes      x = d * (c - 16)
//   kQ5_1: f16 d, f16 m, 4 and 16 bytes  x = d * c + m
// Byte j of 16 holds element j in its low nibble and element j + 16 in its high one; the 4 bytes
// hold the fifth bits, element i's in bit i. (llama.cpp, ggml-common.h.) K-quants hold blocks of
// 256: model/k_quants.h.
// clang-format off
enum class DType : std::uint8_t {
  kF32, kF16, kBF16, kQ8_0, kQ4_0, kQ4_1, kQ5_0, kQ5_1, kQ4_K, kQ5_K, kQ6_K
};
// clang-format on

struct DTypeInfo {
  std::string_view name;  // "F32", "Q4_1", ...
  int block;              // elements in a block; a row is a whole number of blocks
  int block_bytes;        // bytes of a block
};
inline constexpr DTypeInfo kDTypes[] = {
    {"F32", 1, 4},      {"F16", 1, 2},      {"BF16", 1, 2},     {"Q8_0", 32, 34},
    {"Q4_0", 32, 18},   {"Q4_1", 32, 20},   {"Q5_0", 32, 22},   {"Q5_1", 32, 24},
    {"Q4_K", 256, 144}, {"Q5_K", 256, 176}, {"Q6_K", 256, 210},
};
inline constexpr int kNumDTypes = sizeof kDTypes / sizeof *kDTypes;
constexpr const DTypeInfo& dtype_info(DType type) { return kDTypes[static_cast<int>(type)]; }

constexpr bool is_k_quant(DType type) { return dtype_info(type).block == 256; }
// Whether a fifth bit stands apart from four.
constexpr bool has_five_bits(DType type) { return type == DType::kQ5_0 || type == DType::kQ5_1; }
// Whether x = d * c + m, with an m of the block's or of its part's own.
constexpr bool has_min(DType type) {
  return type == DType::kQ4_1 || type == DType::kQ5_1 || type == DType::kQ4_K ||
         type == DType::kQ5_K;
}
// What kQ4_0 and kQ5_0 take away from a code.
constexpr int zero_code(DType type) {
  return type == DType::kQ4_0 ? 8 : type == DType::kQ5_0 ? 16 : 0;
}

// The format of that name, if there is one; all names, between commas.
std::optional<DType> dtype_named(std::string_view name);
std::string dtype_names();

// Bytes of a row of `cols` elements. cols must be a multiple of the block.
constexpr std::int64_t row_bytes(DType type, std::int64_t cols) {
  return cols / dtype_info(type).block * dtype_info(type).block_bytes;
}

// A view of rows x cols elements, row-major, rows contiguous. Vectors have rows = 1.
// Does not own `data`: the mapped file behind the Model does.
struct Tensor {
  std::string name;  // as in the file; for messages
  DType type = DType::kF32;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  const std::byte* data = nullptr;

  const std::byte* row(std::int64_t r) const { return data + r * row_bytes(type, cols); }
  std::int64_t bytes() const { return rows * row_bytes(type, cols); }
};

// out[0..n) = n elements of `type` read from `in`; n is a multiple of the block. Exact: each
// element is the f32 nearest to its definition above.
void dequantize(float* out, const std::byte* in, DType type, std::int64_t n);

}  // namespace thaw
