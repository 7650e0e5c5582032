// How a ghost is rounded, where its codes and scales stand in their group, and what they mean: pure
// functions, the same on host and device. kvstore/ghost.h says what they are for. Products that are
// added are fmaf(), and sums over a head have one order, so that both get the same bits.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kvstore/policy.h"

namespace thaw {

// +1 or -1 for dimension i of a rotation: a bit of a hash (the finalizer of SplitMix64).
THAW_HOST_DEVICE constexpr float rotation_sign(int i) {
  std::uint64_t h = static_cast<std::uint64_t>(i + 1) * 0x9e3779b97f4a7c15;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9;
  h = (h ^ (h >> 27)) * 0x94d049bb133111eb;
  return (h >> 63) != 0 ? -1.0f : 1.0f;
}

struct Angle {
  float cosine, sine;
};

THAW_HOST_DEVICE inline Angle sum_of_angles(const Angle& a, const Angle& b) {
  return {fmaf(a.cosine, b.cosine, -(a.sine * b.sine)), fmaf(a.sine, b.cosine, a.cosine * b.sine)};
}

// (first, second) turned by an angle.
struct TurnedPair {
  float first, second;
};

THAW_HOST_DEVICE inline TurnedPair turn_pair(float first, float second, const Angle& by) {
  return {fmaf(first, by.cosine, -(second * by.sine)), fmaf(second, by.cosine, first * by.sine)};
}

// step(b): the best step of a uniform grid of 2^b values for a Gaussian of variance 1 (Max, 1960).
THAW_HOST_DEVICE inline float ghost_step(int bits) {
  return bits == 1 ? 1.596f : bits == 2 ? 0.996f : bits == 3 ? 0.586f : bits == 4 ? 0.335f : 0.0f;
}

// sqrt(D / (1 - D)) / step: what a number's ghost errs by, over the step. D is the error of that
// grid, squared (Max, 1960), and 1 - D by what an unbiased scale makes it larger.
THAW_HOST_DEVICE inline float ghost_noise(int bits) {
  return bits == 1 ? 0.473f : bits == 2 ? 0.369f : bits == 3 ? 0.337f : bits == 4 ? 0.323f : 0.0f;
}

// The root mean square of dim x n numbers, from the sums of the squares of each dimension.
THAW_HOST_DEVICE inline float rms_of(const double* squares, int n, int dim) {
  double sum = 0;
  for (int i = 0; i < dim; ++i) sum += squares[i];
  return static_cast<float>(sqrt(sum / (static_cast<double>(n) * dim)));
}

// The grids that are tried, as factors of the one that suits a Gaussian.
inline constexpr int kGhostGrids = 5;
THAW_HOST_DEVICE inline float grid_factor(int grid) {
  return grid == 0 ? 0.8f : grid == 1 ? 0.9f : grid == 2 ? 1.0f : grid == 3 ? 1.1f : 1.2f;
}

// The number u - 2^(b-1) + 1/2 of the cell that x lies in; inverse = 1 / step, half = 2^(b-1). The
// lowest where x * inverse is NaN.
THAW_HOST_DEVICE inline float grid_number(float x, float inverse, float half) {
  const float cell = floorf(x * inverse);
  return (cell > half - 1 ? half - 1 : cell > -half ? cell : -half) + 0.5f;
}

// beta: how much of what rounding lost of the values before a token in its chain its own value
// makes up for. docs/kvstore.md has what others cost.
inline constexpr float kFeedback = 0.35f;

// The unbiased scale of a vector x with the numbers c, from |x|^2 and <x,c>.
THAW_HOST_DEVICE inline float unbiased_scale(float squares, float xc) {
  const float scale = xc > 0 ? squares / xc : 0.0f;
  return scale < INFINITY ? scale : 0.0f;
}

// The byte that stands for `scale`: the nearest in the scale of mantissas, 0 for nothing.
THAW_HOST_DEVICE inline std::uint8_t byte_of_scale(float scale, float unit) {
  const float ratio = unit > 0 ? scale / unit : 0.0f;
  if (!(ratio > 0)) return 0;
  const float bounded = ratio < 0.0625f ? 0.0625f : ratio > 15.75f ? 15.75f : ratio;
  std::uint32_t bits;
  memcpy(&bits, &bounded, sizeof bits);
  const int code = static_cast<int>((bits + (1u << 17)) >> 18) - ((127 - 4) << 5);
  return static_cast<std::uint8_t>(code < 1 ? 1 : code > 255 ? 255 : code);
}

// Where part of a code stands: bits [shift, shift + width) of `byte` hold bits [low, low + width)
// of the code. Codes of 3 bits have two parts, of 2 and 1 bits; all others one.
struct CodePlace {
  std::size_t byte;
  int shift, width, low;
};

THAW_HOST_DEVICE inline int code_parts(int bits) { return bits == 3 ? 2 : 1; }

// Eight vectors of 32 codes are packed together, 8 / width of them in the bits of each byte: code
// `lane` of vector i.
THAW_HOST_DEVICE inline CodePlace code_place(int i, int lane, int bits, int part) {
  const int log_width = bits == 1 || part == 1 ? 0 : bits == 4 ? 2 : 1;
  const int log_per_byte = 3 - log_width;
  const std::size_t start = part == 0 ? 0 : 64;
  return {start + static_cast<std::size_t>((i >> log_per_byte) * 32 + lane),
          (i & ((1 << log_per_byte) - 1)) << log_width, 1 << log_width, part == 0 ? 0 : 2};
}

// Keys, from the group's start: a packet of eight vectors holds 8 dimensions of 32 tokens; a vector
// holds two neighbouring dimensions of 16 tokens. token: 0 .. 31.
THAW_HOST_DEVICE inline CodePlace key_place(int token, int dim, int bits, int part) {
  CodePlace place = code_place(dim % 8 / 2 * 2 + token / 16, token % 16 * 2 + dim % 2, bits, part);
  place.byte += static_cast<std::size_t>(dim / 8 * 32 * bits);
  return place;
}

// Values, from the group's first value code: a packet holds 16 dimensions of 16 tokens; a vector
// holds 16 dimensions of two neighbouring tokens.
THAW_HOST_DEVICE inline CodePlace value_place(int token, int dim, int bits, int part) {
  CodePlace place = code_place(token / 2 % 8, dim % 16 * 2 + token % 2, bits, part);
  place.byte += static_cast<std::size_t>((dim / 16 * 2 + token / 16) * 32 * bits);
  return place;
}

// What a scale byte stands for, over its unit.
THAW_HOST_DEVICE inline float scale_of_byte(std::uint32_t code) {
  const std::uint32_t bits = (code << 18) + ((127u - 4) << 23);
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return code == 0 ? 0.0f : scale;
}

}  // namespace thaw
