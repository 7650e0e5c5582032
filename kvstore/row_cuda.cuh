// Stored keys and values as kernels read them: eight numbers at a time, whatever the type.
#pragma once

#include "device/kernel.cuh"
#include "kvstore/kvstore.h"

namespace thaw {

inline constexpr int kRowUnit = 8;  // numbers that a thread reads at a time

template <KvType kType>
using KnownKv = std::integral_constant<KvType, kType>;

// body(KnownKv<type>{})
template <class Body>
void with_kv_type(KvType type, const Body& body) {
  switch (type) {
    case KvType::kF16:
      return body(KnownKv<KvType::kF16>{});
    case KvType::kBF16:
      return body(KnownKv<KvType::kBF16>{});
    case KvType::kF32:
      return body(KnownKv<KvType::kF32>{});
    case KvType::kQ8_0:
      return body(KnownKv<KvType::kQ8_0>{});
    case KvType::kQ4_0:
      return body(KnownKv<KvType::kQ4_0>{});
  }
}

// The stored bytes of a unit, on their way to registers: loads are begun here, and waited for only
// when values() is asked.
template <KvType kType>
struct RowUnit {
  static constexpr bool kWide = kType == KvType::kF16 || kType == KvType::kBF16;
  static constexpr int kBlockBytes = kType == KvType::kQ8_0 ? 34 : 18;
  std::uint32_t words[kType == KvType::kF32 ? 8 : 4];
  float scale;

  // Unit u of a row: numbers 8 u to 8 u + 7. Rows of 16-bit and 32-bit numbers stand at multiples
  // of 16 bytes, blocks at multiples of 2.
  __device__ void load(const std::byte* row, int u) {
    if constexpr (kWide || kType == KvType::kF32) {
#pragma unroll
      for (int i = 0; i < (kWide ? 1 : 2); ++i) {
        const uint4 all = load_16_once(row + (kWide ? u : 2 * u + i) * 16);
        words[4 * i] = all.x, words[4 * i + 1] = all.y;
        words[4 * i + 2] = all.z, words[4 * i + 3] = all.w;
      }
    } else {
      const auto* block = reinterpret_cast<const std::uint16_t*>(row + u / 4 * kBlockBytes);
      scale = unpack2<__half>(block[0]).x;
      const int first = kType == KvType::kQ8_0 ? u % 4 * 4 : u % 2 * 4;
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = block[1 + first + i];
      if constexpr (kType == KvType::kQ4_0)
        if (u % 4 >= 2)
          for (std::uint32_t& pair : words) pair >>= 4;
    }
  }

  __device__ void values(float (&x)[kRowUnit]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (kType == KvType::kF32) {
        x[2 * i] = __uint_as_float(words[2 * i]), x[2 * i + 1] = __uint_as_float(words[2 * i + 1]);
      } else if constexpr (kWide) {
        using T = std::conditional_t<kType == KvType::kF16, __half, __nv_bfloat16>;
        const float2 both = unpack2<T>(words[i]);
        x[2 * i] = both.x, x[2 * i + 1] = both.y;
      } else {
        x[2 * i] = scale * code(words[i]);
        x[2 * i + 1] = scale * code(words[i] >> 8);
      }
    }
  }

 private:
  __device__ static float code(std::uint32_t bits) {
    if constexpr (kType == KvType::kQ8_0)
      return static_cast<float>(static_cast<std::int8_t>(bits & 0xffu));
    return static_cast<float>(static_cast<int>(bits & 15u) - 8);
  }
};

}  // namespace thaw
