// Stored keys and values as kernels read them, eight numbers at a time, whatever the type, and as
// they write them: the bits of store_row() and load_row() (kvstore/row.h), NaN aside.
#pragma once

#include "device/kernel.cuh"
#include "kvstore/row.h"

namespace thaw {

inline constexpr int kRowUnit = 8;    // numbers that a thread reads at a time
inline constexpr int kRowBlock = 32;  // that a warp stores at a time: a block of q8_0 and q4_0

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

// Number i of a row, alone.
template <KvType kType>
__device__ inline float number_of(const std::byte* row, int i) {
  if constexpr (kType == KvType::kF32) return reinterpret_cast<const float*>(row)[i];
  if constexpr (kType == KvType::kF16) return to_float(reinterpret_cast<const __half*>(row)[i]);
  if constexpr (kType == KvType::kBF16)
    return to_float(reinterpret_cast<const __nv_bfloat16*>(row)[i]);
  if constexpr (kType == KvType::kQ8_0 || kType == KvType::kQ4_0) {
    RowUnit<kType> unit;
    unit.load(row, i / kRowUnit);
    float x[kRowUnit];
    unit.values(x);
    float number = 0;
#pragma unroll
    for (int j = 0; j < kRowUnit; ++j) number = i % kRowUnit == j ? x[j] : number;
    return number;
  }
}

// 32 numbers, one a lane, as a block of q8_0: d = max|x| / 127, NaN passed over.
__device__ inline void store_q8_0(std::byte* out, float x) {
  const float largest = fmaxf(warp_max(fabsf(x)), 0.0f);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  const std::uint32_t d = pack2<__half>(largest / 127.0f, 0);
  const int lane = lane_index(), code = q8_0_code(x, inverse);
  if (lane == 0) *reinterpret_cast<std::uint16_t*>(out) = static_cast<std::uint16_t>(d);
  reinterpret_cast<std::int8_t*>(out + 2)[lane] = static_cast<std::int8_t>(code);
}

// As a block of q4_0: d = (the first x of largest magnitude) / -8.
__device__ inline void store_q4_0(std::byte* out, float x) {
  const int lane = lane_index();
  const float magnitude = warp_max(fabsf(x));
  const unsigned where = __ballot_sync(kAllLanes, fabsf(x) == magnitude);
  const float first = __shfl_sync(kAllLanes, x, max(__ffs(static_cast<int>(where)) - 1, 0));
  const float d = (magnitude > 0 ? first : 0.0f) / -8.0f;
  const float inverse = d != 0 ? 1.0f / d : 0.0f;
  const int code = q4_0_code(x, inverse);
  const int other = __shfl_down_sync(kAllLanes, code, kRowBlock / 2);
  if (lane == 0)
    *reinterpret_cast<std::uint16_t*>(out) = static_cast<std::uint16_t>(pack2<__half>(d, 0));
  if (lane < kRowBlock / 2) out[2 + lane] = static_cast<std::byte>(code | other << 4);
}

// Numbers first to first + 31 of a row, where it has them; all lanes call.
template <KvType kType>
__device__ inline void store_numbers(std::byte* row, const float* in, int first, int n) {
  const int i = first + lane_index();
  const float x = i < n ? in[i] : 0.0f;
  if constexpr (kType == KvType::kQ8_0) return store_q8_0(row + first / kRowBlock * 34, x);
  if constexpr (kType == KvType::kQ4_0) return store_q4_0(row + first / kRowBlock * 18, x);
  if (i >= n) return;
  if constexpr (kType == KvType::kF32) reinterpret_cast<float*>(row)[i] = x;
  if constexpr (kType == KvType::kF16) reinterpret_cast<__half*>(row)[i] = from_float<__half>(x);
  if constexpr (kType == KvType::kBF16)
    reinterpret_cast<__nv_bfloat16*>(row)[i] = from_float<__nv_bfloat16>(x);
}

}  // namespace thaw
