#include "kvstore/row.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "device/half.h"

namespace thaw {
namespace {

constexpr int kBlock = 32;
constexpr std::size_t kQ8_0Bytes = 34, kQ4_0Bytes = 18;

void store_q8_0(std::byte* out, const float* in) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i) largest = std::max(largest, std::fabs(in[i]));
  const std::uint16_t d = f32_to_f16(largest / 127.0f);
  std::memcpy(out, &d, 2);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  for (int i = 0; i < kBlock; ++i) out[2 + i] = static_cast<std::byte>(q8_0_code(in[i], inverse));
}

void store_q4_0(std::byte* out, const float* in) {
  float largest = 0;
  for (int i = 0; i < kBlock; ++i)
    if (std::fabs(in[i]) > std::fabs(largest)) largest = in[i];
  const float d = largest / -8.0f;
  const std::uint16_t bits = f32_to_f16(d);
  std::memcpy(out, &bits, 2);
  const float inverse = d != 0 ? 1.0f / d : 0.0f;
  for (int i = 0; i < kBlock / 2; ++i)
    out[2 + i] = static_cast<std::byte>(q4_0_code(in[i], inverse) |
                                        q4_0_code(in[i + kBlock / 2], inverse) << 4);
}

float block_scale(const std::byte* in) {
  std::uint16_t bits;
  std::memcpy(&bits, in, 2);
  return f16_to_f32(bits);
}

void load_q8_0(float* out, const std::byte* in) {
  const float d = block_scale(in);
  for (int i = 0; i < kBlock; ++i)
    out[i] = d * static_cast<float>(static_cast<std::int8_t>(in[2 + i]));
}

void load_q4_0(float* out, const std::byte* in) {
  const float d = block_scale(in);
  for (int i = 0; i < kBlock / 2; ++i) {
    const int pair = std::to_integer<int>(in[2 + i]);
    out[i] = d * static_cast<float>((pair & 15) - 8);
    out[i + kBlock / 2] = d * static_cast<float>((pair >> 4) - 8);
  }
}

}  // namespace

std::string_view kv_type_name(KvType type) {
  constexpr std::string_view kNames[] = {"f16", "bf16", "f32", "q8_0", "q4_0"};
  return kNames[static_cast<int>(type)];
}

std::optional<KvType> kv_type_named(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(KvType::kQ4_0); ++i)
    if (kv_type_name(static_cast<KvType>(i)) == name) return static_cast<KvType>(i);
  return {};
}

std::size_t kv_row_bytes(KvType type, int head_dim) {
  static constexpr std::size_t kBlockBytes[] = {64, 64, 128, kQ8_0Bytes, kQ4_0Bytes};
  return static_cast<std::size_t>(head_dim) * kBlockBytes[static_cast<int>(type)] / kBlock;
}

void store_row(std::byte* out, const float* in, int n, KvType type) {
  switch (type) {
    case KvType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case KvType::kF16:
    case KvType::kBF16:
      for (int i = 0; i < n; ++i) {
        const std::uint16_t bits = type == KvType::kF16 ? f32_to_f16(in[i]) : f32_to_bf16(in[i]);
        std::memcpy(out + 2 * i, &bits, 2);
      }
      return;
    case KvType::kQ8_0:
      for (int i = 0; i < n; i += kBlock, out += kQ8_0Bytes) store_q8_0(out, in + i);
      return;
    case KvType::kQ4_0:
      for (int i = 0; i < n; i += kBlock, out += kQ4_0Bytes) store_q4_0(out, in + i);
  }
}

void load_row(float* out, const std::byte* in, int n, KvType type) {
  switch (type) {
    case KvType::kF16:
      return widen_f16(out, reinterpret_cast<const std::uint16_t*>(in), n);
    case KvType::kBF16:
      return widen_bf16(out, reinterpret_cast<const std::uint16_t*>(in), n);
    case KvType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
      return;
    case KvType::kQ8_0:
      for (int i = 0; i < n; i += kBlock, in += kQ8_0Bytes) load_q8_0(out + i, in);
      return;
    case KvType::kQ4_0:
      for (int i = 0; i < n; i += kBlock, in += kQ4_0Bytes) load_q4_0(out + i, in);
  }
}

}  // namespace thaw
