// Stored weights as kernels read them: rows, and units of 16 bytes of a row, in every format.
#pragma once

#include "device/kernel.cuh"
#include "model/device_weights.h"
#include "model/high_bits.h"

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

// A unit of 16 bytes of a row of weights (model/device_weights.h), in registers. A weight is d c,
// or d c + m: c is what code_bytes() gives, less kZero, and d and m what scales() does.
template <DType kType>
struct WeightUnit {
  static constexpr bool kIsK = is_k_quant(kType);
  static constexpr bool kHasScale = dtype_info(kType).block > 1;
  static constexpr int kGroups = kType == DType::kQ6_K ? 2 : 1;  // with a d of their own
  static constexpr bool kHasMin = has_min(kType);
  static constexpr bool kIsSigned = kType == DType::kQ8_0 || kType == DType::kQ6_K;  // its bytes
  static constexpr int kZero = zero_code(kType);
  static constexpr int kElements = unit_elements(kType);
  static constexpr int kHighBits = n_high_bits(kType), kHighWordsAt = high_bits_at(kType) / 4;

  std::uint32_t words[4];
  std::uint32_t scale;  // d low, and m high; of a K-quant, the block's d and e
  // Of a K-quant, and the high bits of others, as stored, so that a load waits for no other: see
  // model/high_bits.h.
  int p = 0;  // it shifts, though no unit may be loaded
  std::uint32_t part_scales, scales_high;
  std::uint32_t high_bits[2];

  __device__ void set(uint4 all) {
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
  // Of unit u of what `scales` begins with.
  __device__ void set_scale(const uint4* scales, int u) {
    if constexpr (kIsK) {
      const auto* block =
          reinterpret_cast<const std::uint32_t*>(scales) + u / kKParts * (scale_bytes(kType) / 4);
      p = u % kKParts;
      scale = block[0];
      if constexpr (kType == DType::kQ6_K) {
        part_scales = reinterpret_cast<const std::uint16_t*>(block + 1)[p];
      } else {
        part_scales = reinterpret_cast<const std::uint8_t*>(block + 1)[p];
        scales_high = block[3];
      }
      for (int i = 0; i < kHighBits; ++i) high_bits[i] = block[kHighWordsAt + kHighBits * p + i];
    } else if constexpr (kType == DType::kQ5_0) {
      const auto* block = reinterpret_cast<const std::uint16_t*>(scales) + 3 * u;
      scale = block[0], high_bits[0] = block[1] | static_cast<std::uint32_t>(block[2]) << 16;
    } else if constexpr (kType == DType::kQ5_1) {
      const auto* block = reinterpret_cast<const uint2*>(scales) + u;
      scale = block->x, high_bits[0] = block->y;
    } else if constexpr (kType == DType::kQ4_1) {
      scale = reinterpret_cast<const std::uint32_t*>(scales)[u];
    } else if constexpr (kHasScale) {
      scale = reinterpret_cast<const std::uint16_t*>(scales)[u * kElements / 32];
    }
  }
  __device__ void load(const WeightRow& row, int u) {
    set(load_16_once(row.codes + u));
    set_scale(row.scales, u);
  }

  // d and m, exact; of two groups, which are 16 elements each, d and d.
  __device__ float2 scales() const {
    const float2 both = unpack2<__half>(scale);
    if constexpr (kType == DType::kQ6_K) {
      const auto s = [&](int group) {
        return static_cast<float>(static_cast<std::int8_t>(part_scales >> 8 * group)) / kCodeUnit;
      };
      return make_float2(both.x * s(0), both.x * s(1));
    } else if constexpr (kIsK) {
      const std::uint32_t high = scales_high >> 4 * p;
      const std::uint32_t s = (part_scales & 15) | (high & 3) << 4;
      const std::uint32_t m = part_scales >> 4 | (high & 12) << 2;
      return make_float2(both.x * static_cast<float>(s), -both.y * static_cast<float>(m));
    }
    return both;
  }

  // Of weights 4 q to 4 q + 3, a byte each.
  __device__ std::uint32_t code_bytes(int q) const {
    if constexpr (kType == DType::kQ8_0) return words[q];
    std::uint32_t codes = words[q % 4] >> q / 4 * 4 & 0x0f0f0f0fu;
    if constexpr (kHighBits > 0) {
      constexpr std::uint32_t kMask = kHighBits == 2 ? 0x03030303u : 0x01010101u;
      codes |= (high_bits[kHighBits * q / 8] >> kHighBits * q % 8 & kMask) << 4;
    }
    return codes * kCodeUnit;
  }

  // Weights 4 q to 4 q + 3, rounded once.
  __device__ float4 weights(int q) const {
    if constexpr (kType == DType::kF32) {
      return make_float4(__uint_as_float(words[0]), __uint_as_float(words[1]),
                         __uint_as_float(words[2]), __uint_as_float(words[3]));
    } else if constexpr (kHasScale) {
      const std::uint32_t codes = code_bytes(q);
      const float2 both = scales();
      const float d = q / 4 % kGroups == 0 ? both.x : both.y;
      const auto weight = [&](int i) {
        return kHasMin ? fmaf(d, code(codes, i), both.y) : d * code(codes, i);
      };
      return make_float4(weight(0), weight(1), weight(2), weight(3));
    } else {
      using T = std::conditional_t<kType == DType::kF16, __half, __nv_bfloat16>;
      const float2 low = unpack2<T>(words[2 * q]), high = unpack2<T>(words[2 * q + 1]);
      return make_float4(low.x, low.y, high.x, high.y);
    }
  }

 private:
  // What codes of kQ6_K are multiplied by: at the top of a byte, the sign is where a byte's is.
  static constexpr std::uint32_t kCodeUnit = kType == DType::kQ6_K ? 4 : 1;

  // c of byte i: first as the low bits of 2^23 + c, or of 2^23 + 128 + c.
  __device__ static float code(std::uint32_t codes, int i) {
    constexpr float kLeast = kIsSigned ? 128 : kZero;
    const std::uint32_t bytes = kIsSigned ? codes ^ 0x80808080u : codes;
    const std::uint32_t bits = __byte_perm(bytes, 0x4b000000u, 0x7440u + i);
    return __uint_as_float(bits) - (8388608.0f + kLeast);
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
    case DType::kQ5_0:
      return body(Known<DType::kQ5_0>{});
    case DType::kQ5_1:
      return body(Known<DType::kQ5_1>{});
    case DType::kQ4_K:
      return body(Known<DType::kQ4_K>{});
    case DType::kQ5_K:
      return body(Known<DType::kQ5_K>{});
    case DType::kQ6_K:
      return body(Known<DType::kQ6_K>{});
  }
}

// What a warp multiplies at a time of a row: a unit a lane, and their scales. Numbers of 16 bytes.
template <DType kType>
struct WeightStep {
  static constexpr int kElements = WeightUnit<kType>::kElements * kWarp;
  static constexpr int kScales = n_scale_units(kType, kElements);
  static constexpr int kSize = kWarp + kScales;
};

}  // namespace thaw
