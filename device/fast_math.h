// Functions of floats that compilers turn into vector code inside a loop, or of vectors of floats.
#pragma once

#include <bit>
#include <cstdint>

#include "device/tile_cpu.h"

namespace thaw {

using TileBits = std::uint32_t __attribute__((vector_size(sizeof(TilePart))));

inline std::uint32_t bits_of(float x) { return std::bit_cast<std::uint32_t>(x); }
inline TileBits bits_of(TilePart x) { return std::bit_cast<TileBits>(x); }

// e^x, relative error below 2e-7; 0 from x = -86 down, so exp_fast(-infinity) = 0. Not for x > 88.
// e^x = 2^n e^r with n = round(x / ln 2); on |r| <= ln(2) / 2, where e^r is within 1e-7 of the
// polynomial of degree 5 whose largest relative error is least.
template <class F>
inline F exp_fast(F x) {
  using Bits = decltype(bits_of(F{}));
  const F bounded = x > -86.0f ? x : F{} - 86.0f;
  constexpr float kRound =
      12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const F shifted = bounded * 1.44269504f + kRound;
  const F n = shifted - kRound;
  const F r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 8.2903068542e-3f + 4.1897980557e-2f;
  p = p * r + 1.6667636607e-1f;
  p = p * r + 4.9999149155e-1f;
  p = p * r + 9.9999970700e-1f;
  p = p * r + 1.0f;
  const F power = std::bit_cast<F>(std::bit_cast<Bits>(p) + (std::bit_cast<Bits>(shifted) << 23));
  return x > -86.0f ? power : F{};
}

// x / (1 + e^-x), the sigmoid-weighted linear unit.
inline float silu(float x) {
  const float e = exp_fast(x < 0 ? x : -x);  // e^-|x|, never overflows
  return x * (x < 0 ? e : 1.0f) / (1.0f + e);
}

}  // namespace thaw
