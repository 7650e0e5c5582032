// Blocks of K-quants (model/k_quants.h) made from floats, in the plainest way.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "model/k_quants.h"

namespace thaw::testing {

inline void put_k_code(std::byte* block, DType type, int p, int i, int c) {
  const KPart at = k_part(type, p);
  block[at.low_at + i] |= static_cast<std::byte>((c & 15) << at.low_shift);
  if (k_high_bits(type) > 0)
    block[at.high_at + i] |= static_cast<std::byte>((c >> 4) << at.high_shift);
}

// s and m, 6 bits each, of part p of kQ4_K or kQ5_K.
inline void put_k_scales(std::byte* block, int p, int s, int m) {
  std::byte* q = block + k_scales_at(DType::kQ4_K);
  const auto put = [&](int at, int bits) { q[at] |= static_cast<std::byte>(bits); };
  if (p < 4) {
    put(p, s), put(p + 4, m);
  } else {
    put(p + 4, (s & 15) | (m & 15) << 4);
    put(p - 4, (s >> 4) << 6), put(p, (m >> 4) << 6);
  }
}

inline int rounded(float x, float step, int least, int most) {
  return step > 0 ? std::clamp(static_cast<int>(std::lround(x / step)), least, most) : least;
}

inline void quantize_with_min(std::byte* out, const float* x, DType type) {
  const int most = type == DType::kQ4_K ? 15 : 31;
  float lows[kKParts], steps[kKParts], d = 0, e = 0;
  for (int p = 0; p < kKParts; ++p) {
    const auto [lo, hi] = std::minmax_element(x + p * kPartCols, x + (p + 1) * kPartCols);
    lows[p] = std::min(*lo, 0.0f);
    steps[p] = (std::max(*hi, 0.0f) - lows[p]) / static_cast<float>(most);
    d = std::max(d, steps[p] / 63), e = std::max(e, -lows[p] / 63);
  }
  const std::uint16_t halves[] = {f32_to_f16(d), f32_to_f16(e)};
  std::memcpy(out, halves, sizeof halves);
  d = f16_to_f32(halves[0]), e = f16_to_f32(halves[1]);
  for (int p = 0; p < kKParts; ++p) {
    const int s = rounded(steps[p], d, 0, 63), m = rounded(-lows[p], e, 0, 63);
    put_k_scales(out, p, s, m);
    for (int i = 0; i < kPartCols; ++i)
      put_k_code(out, type, p, i,
                 rounded(x[p * kPartCols + i] + e * static_cast<float>(m),
                         d * static_cast<float>(s), 0, most));
  }
}

inline void quantize_q6_k(std::byte* out, const float* x) {
  constexpr int kGroup = 16;
  float peaks[256 / kGroup] = {}, d = 0;
  for (int i = 0; i < 256; ++i) {
    float& peak = peaks[i / kGroup];
    if (std::fabs(x[i]) > std::fabs(peak)) peak = x[i];  // its sign makes scales of both signs
  }
  for (const float peak : peaks) d = std::max(d, std::fabs(peak) / 32 / 127);
  const std::uint16_t half = f32_to_f16(d);
  std::memcpy(out + k_d_at(DType::kQ6_K), &half, sizeof half);
  d = f16_to_f32(half);
  for (int i = 0; i < 256; ++i) {
    const int s = rounded(-peaks[i / kGroup] / 32, d, -128, 127);
    out[k_scales_at(DType::kQ6_K) + i / kGroup] = static_cast<std::byte>(s);
    const float step = d * static_cast<float>(s);
    const int c = step != 0 ? std::clamp(static_cast<int>(std::lround(x[i] / step)), -32, 31) : 0;
    put_k_code(out, DType::kQ6_K, i / kPartCols, i % kPartCols, c + 32);
  }
}

inline void quantize_k_block(std::byte* out, const float* x, DType type) {
  std::fill(out, out + dtype_info(type).block_bytes, std::byte{});
  type == DType::kQ6_K ? quantize_q6_k(out, x) : quantize_with_min(out, x, type);
}

}  // namespace thaw::testing
