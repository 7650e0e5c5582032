// Stored weights as kernels read them: rows, and units of 16 bytes of a row, in every format.
#pragma once

#include "device/kernel.cuh"
#include "model/device_weights.h"

namespace thaw {

// A row of a matrix.
struct WeightRow {
  const uint4* codes;
  const uint4* scales;
};
__device__ inline WeightRow row_of(const DeviceMatrix& w, int row) {
  return {w.codes + static_cast<std::int64_t>(row) * w.units,
          w.scales + static_cast<std::int64_t>(row) * w.scale_units};
}

// A unit of 16 bytes of a row of weights (model/device_weights.h), in registers. Codes come out in
// the form that takes the fewest instructions; weight() makes up for it.
template <DType kType>
struct WeightUnit {
  static constexpr bool kFourBits = kType == DType::kQ4_0 || kType == DType::kQ4_1;
  static constexpr bool kHasScale = kFourBits || kType == DType::kQ8_0;
  static constexpr int kElements = kFourBits               ? 32
                                   : kType == DType::kQ8_0 ? 16
                                   : kType == DType::kF32  ? 4
                                                           : 8;

  std::uint32_t words[4];
  std::uint32_t scale;  // d low, and m high

  __device__ void set(uint4 all) {
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
  __device__ void load(const WeightRow& row, int u) {
    set(load_16_once(row.codes + u));
    scale = scale_of(row.scales, u);
  }
  // Of unit u of what `scales` begins with.
  __device__ static std::uint32_t scale_of(const uint4* scales, int u) {
    const int block = u * kElements / 32;
    if constexpr (kType == DType::kQ4_1)
      return reinterpret_cast<const std::uint32_t*>(scales)[block];
    return kHasScale ? reinterpret_cast<const std::uint16_t*>(scales)[block] : 0u;
  }

  // Codes 4 q to 4 q + 3.
  __device__ float4 codes(int q) const {
    if constexpr (kType == DType::kF32) {
      return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]),
                         __uint_as_float(words[2]), __uint_as_float(words[3]));
    } else if constexpr (kType == DType::kQ8_0) {
      return make_float4(byte(words[q], 0), byte(words[q], 1), byte(words[q], 2),
                         byte(words[q], 3));
    } else if constexpr (kFourBits) {
      const std::uint32_t word = words[q % 4];
      const int at = q / 4 * 4;
      return make_float4(nibble(word, at), nibble(word, at + 8), nibble(word, at + 16),
                         nibble(word, at + 24));
    } else {
      using T = std::conditional_t<kType == DType::kF16, __half, __nv_bfloat16>;
      const float2 low = unpack2<T>(words[2 * q]), high = unpack2<T>(words[2 * q + 1]);
      return make_float4(low.x, low.y, high.x, high.y);
    }
  }

  // The weight itself, rounded once. A 4-bit code c comes as 1 + c / 16:
  //   d (c - 8) = d (16 (1 + c / 16) - 24)
  __device__ float weight(float code) const {
    const float2 dm = unpack2<__half>(scale);
    if constexpr (kType == DType::kQ8_0) return dm.x * code;
    if constexpr (kType == DType::kQ4_0) return dm.x * (16 * code - 24);
    if constexpr (kType == DType::kQ4_1) return fmaf(dm.x, 16 * code - 16, dm.y);
    return code;
  }

 private:
  // Byte i of the word, signed: as the low bits of 2^23 + 128 + c.
  __device__ static float byte(std::uint32_t word, int i) {
    const std::uint32_t bits = __byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440u + i);
    return __uint_as_float(bits) - 8388736.0f;
  }
  // The four bits from `at`, as the high bits of the fraction of a number from 1 to 2.
  __device__ static float nibble(std::uint32_t word, int at) {
    const std::uint32_t bits = at < 19 ? word << (19 - at) : word >> (at - 19);
    return __uint_as_float((bits & 0x00780000u) | 0x3f800000u);
  }
};

template <DType kType>
using Known = std::integral_constant<DType, kType>;

// body(Known<type>{})
template <class Body>
void with_type(DType type, const Body& body) {
  switch (type) {
    case DType::kF32:
      return body(Known<DType::kF32>{});
    case DType::kF16:
      return body(Known<DType::kF16>{});
    case DType::kBF16:
      return body(Known<DType::kBF16>{});
    case DType::kQ8_0:
      return body(Known<DType::kQ8_0>{});
    case DType::kQ4_0:
      return body(Known<DType::kQ4_0>{});
    case DType::kQ4_1:
      return body(Known<DType::kQ4_1>{});
    default:
      fail(dtype_info(type).name, ": not on a GPU");
  }
}

// What a warp multiplies at a time of a row: a unit a lane, and their scales. Numbers of 16 bytes.
template <DType kType>
struct WeightStep {
  static constexpr int kElements = WeightUnit<kType>::kElements * kWarp;
  static constexpr int kScales = kType == DType::kQ8_0   ? 2
                                 : kType == DType::kQ4_0 ? 4
                                 : kType == DType::kQ4_1 ? 8
                                                         : 0;
  static constexpr int kSize = kWarp + kScales;
};

}  // namespace thaw
