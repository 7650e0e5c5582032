// Functions of floats that compilers turn into vector code inside a loop.
#pragma once

#include <bit>
#include <cstdint>

namespace thaw {

// e^x, relative error below 2e-7; 0 below x = -87.3, so exp_fast(-infinity) = 0. Not for x > 88.
// e^x = 2^n e^r with n = round(x / ln 2); e^r is a polynomial on |r| <= ln(2) / 2 (Cephes, expf).
inline float exp_fast(float x) {
  const float bounded = x < -87.3f ? -87.3f : x;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = bounded * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float exp_r = p * r * r + r + 1.0f;
  const std::int32_t exponent =
      std::bit_cast<std::int32_t>(shifted) - std::bit_cast<std::int32_t>(kRound);
  const float scale = std::bit_cast<float>((exponent + 127) << 23);
  return x < -87.3f ? 0.0f : exp_r * scale;
}

// x / (1 + e^-x), the sigmoid-weighted linear unit.
inline float silu(float x) {
  const float e = exp_fast(x < 0 ? x : -x);  // e^-|x|, never overflows
  return x * (x < 0 ? e : 1.0f) / (1.0f + e);
}

}  // namespace thaw
