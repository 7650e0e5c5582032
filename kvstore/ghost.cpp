// How a token becomes a ghost, and what the ghost then stands for.
#include "kvstore/ghost.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "kvstore/ghost_code.h"

namespace thaw {
namespace {

// x = H x / sqrt(n) for n a power of two (Sylvester's Hadamard matrix); its own inverse.
void hadamard(float* x, int n) {
  for (int width = 1; width < n; width *= 2) {
    for (int i = 0; i < n; i += 2 * width) {
      for (int j = i; j < i + width; ++j) {
        const float a = x[j], b = x[j + width];
        x[j] = a + b;
        x[j + width] = a - b;
      }
    }
  }
  const float scale = 1.0f / std::sqrt(static_cast<float>(n));
  for (int i = 0; i < n; ++i) x[i] *= scale;
}

void hadamard_blocks(float* x, int n) {
  while (n > 0) {
    const int block = static_cast<int>(std::bit_floor(static_cast<unsigned>(n)));
    hadamard(x, block);
    x += block;
    n -= block;
  }
}

// The best uniform step for a Gaussian of variance 1, by bits.
constexpr float kStep[] = {0, 1.596f, 0.996f, 0.586f, 0.335f};

using Place = CodePlace (*)(int, int, int, int);

void put_code(std::byte* codes, Place place, int token, int dim, int bits, unsigned code) {
  for (int part = 0; part < code_parts(bits); ++part) {
    const CodePlace at = place(token, dim, bits, part);
    const unsigned mask = ((1u << at.width) - 1) << at.shift;
    const unsigned value = code >> at.low << at.shift & mask;
    codes[at.byte] = std::byte((std::to_integer<unsigned>(codes[at.byte]) & ~mask) | value);
  }
}

unsigned get_code(const std::byte* codes, Place place, int token, int dim, int bits) {
  unsigned code = 0;
  for (int part = 0; part < code_parts(bits); ++part) {
    const CodePlace at = place(token, dim, bits, part);
    code |= (std::to_integer<unsigned>(codes[at.byte]) >> at.shift & ((1u << at.width) - 1))
            << at.low;
  }
  return code;
}

// c = the numbers u - 2^(b-1) + 1/2 of the codes of x on a grid of `step`. Returns <x,c> and <c,c>.
std::pair<float, float> round_to_grid(float* c, const float* x, int n, float step, int bits) {
  const float inverse = step > 0 ? 1.0f / step : 0.0f, half = static_cast<float>(1 << (bits - 1));
  float xc = 0, cc = 0;
#pragma omp simd reduction(+ : xc, cc)
  for (int i = 0; i < n; ++i) {
    const float cell = std::floor(x[i] * inverse);
    c[i] = (cell < -half ? -half : cell > half - 1 ? half - 1 : cell) + 0.5f;
    xc += x[i] * c[i];
    cc += c[i] * c[i];
  }
  return {xc, cc};
}

enum class Gain { kUnbiased, kLeastSquares };

// Rounds x - mean, rotated, to `bits`, on the best of a few grids around the Gaussian's: the one
// with the largest <x,c>^2 / <c,c> loses least, whichever gain is taken. Writes the codes of one
// token and returns its scale.
float round_to_codes(std::byte* codes, Place place, int token, int bits, const float* in,
                     const float* mean, int head_dim, Gain gain) {
  float x[GhostQuery::kMaxDim], c[GhostQuery::kMaxDim];
  float squares = 0, best = -1, step = 0;
  for (int i = 0; i < head_dim; ++i) x[i] = in[i] - mean[i];
  rotate(x, head_dim);
  for (int i = 0; i < head_dim; ++i) squares += x[i] * x[i];
  const float usual = kStep[bits] * std::sqrt(squares / static_cast<float>(head_dim));
  for (const float factor : {0.8f, 0.9f, 1.0f, 1.1f, 1.2f}) {
    const auto [xc, cc] = round_to_grid(c, x, head_dim, factor * usual, bits);
    if (xc * xc / cc > best) best = xc * xc / cc, step = factor * usual;
  }
  const auto [xc, cc] = round_to_grid(c, x, head_dim, step, bits);
  const float half = static_cast<float>(1 << (bits - 1));
  for (int i = 0; i < head_dim; ++i)
    put_code(codes, place, token, i, bits, static_cast<unsigned>(static_cast<int>(c[i] + half)));
  const float scale = gain == Gain::kUnbiased ? (xc > 0 ? squares / xc : 0.0f) : xc / cc;
  return std::isfinite(scale) ? scale : 0.0f;
}

// The byte that stands for `scale`: the nearest in the scale of mantissas, 0 for nothing.
std::byte scale_byte(float scale, float unit) {
  const float ratio = unit > 0 ? scale / unit : 0.0f;
  if (!(ratio > 0)) return std::byte{0};
  const float bounded = std::clamp(ratio, 0.0625f, 15.75f);
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(bounded) + (1u << 17);
  const int code = static_cast<int>(bits >> 18) - ((127 - 4) << 5);
  return static_cast<std::byte>(std::clamp(code, 1, 255));
}

float read_scale(const std::byte* scales, int i, float unit) {
  float wide[kGhostGroup];
  widen_scales(wide, scales);
  return unit * wide[i];
}

void read_codes(float* out, const std::byte* codes, Place place, int token, int bits, float scale,
                int head_dim) {
  const float centre = static_cast<float>(1 << (bits - 1)) - 0.5f;
  for (int i = 0; i < head_dim; ++i)
    out[i] = scale * (static_cast<float>(get_code(codes, place, token, i, bits)) - centre);
}

}  // namespace

void rotate(float* x, int head_dim) {
  for (int i = 0; i < head_dim; ++i) x[i] *= rotation_sign(i);
  hadamard_blocks(x, head_dim);
}

void rotate_back(float* x, int head_dim) {
  hadamard_blocks(x, head_dim);
  for (int i = 0; i < head_dim; ++i) x[i] *= rotation_sign(i);
}

float ghost_step(int bits) { return kStep[bits]; }

void widen_scales(float* out, const std::byte* scales) {
  for (int i = 0; i < kGhostGroup; ++i)
    out[i] = scale_of_byte(std::to_integer<std::uint32_t>(scales[i]));
}

void write_ghost(std::byte* group, const GhostFormat& f, int i, const float* k, const float* v,
                 const GhostCentre& centre) {
  std::byte* values = group + f.key_bytes();
  std::byte* scales = values + f.value_bytes();
  scales[i] = scale_byte(round_to_codes(group, key_place, i, f.key_bits, k, centre.key_mean,
                                        f.head_dim, Gain::kUnbiased),
                         centre.key_unit);
  if (f.value_bits > 0)
    scales[f.scale_bytes() + i] =
        scale_byte(round_to_codes(values, value_place, i, f.value_bits, v, centre.value_mean,
                                  f.head_dim, Gain::kLeastSquares),
                   centre.value_unit);
}

void read_ghost_key(float* out, const std::byte* group, const GhostFormat& f, int i,
                    const GhostCentre& centre) {
  const std::byte* scales = group + f.key_bytes() + f.value_bytes();
  read_codes(out, group, key_place, i, f.key_bits, read_scale(scales, i, centre.key_unit),
             f.head_dim);
}

void read_ghost_value(float* out, const std::byte* group, const GhostFormat& f, int i,
                      const GhostCentre& centre) {
  if (f.value_bits == 0) {
    std::fill_n(out, f.head_dim, 0.0f);
    return;
  }
  const std::byte* values = group + f.key_bytes();
  const std::byte* scales = values + f.value_bytes() + f.scale_bytes();
  read_codes(out, values, value_place, i, f.value_bits, read_scale(scales, i, centre.value_unit),
             f.head_dim);
}

void prepare_query(GhostQuery& out, const float* q, const float* key_mean, const GhostRope& rope,
                   const GhostFormat& f) {
  float x[GhostQuery::kMaxDim] = {};
  std::copy_n(q, f.head_dim, x);
  rope.prepare(out, q, key_mean);
  rotate(x, f.head_dim);
  float largest = 0;
  for (int i = 0; i < f.head_dim; ++i) largest = std::max(largest, std::fabs(x[i]));
  out.scale = largest / 127.0f;
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  int sum = 0;
  for (int i = 0; i < f.padded_dim(); i += 2) {
    const int a = static_cast<int>(std::lrint(x[i] * inverse));
    const int b = static_cast<int>(std::lrint(x[i + 1] * inverse));
    const std::uint32_t pair = (static_cast<unsigned>(a) & 0xff) | (static_cast<unsigned>(b) & 0xff)
                                                                       << 8;
    out.pairs[i / 2] = pair | pair << 16;
    sum += a + b;
  }
  out.offset = -(static_cast<float>(1 << (f.key_bits - 1)) - 0.5f) * static_cast<float>(sum);
}

}  // namespace thaw
