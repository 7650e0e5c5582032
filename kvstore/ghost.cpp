// How a token becomes a ghost, and what the ghost then stands for.
#include "kvstore/ghost.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "device/tile_cpu.h"
#include "kvstore/ghost_code.h"
#include "kvstore/row.h"

namespace thaw {
namespace {

constexpr auto kSigns = [] {
  std::array<float, GhostQuery::kMaxDim> signs = {};
  for (int i = 0; i < GhostQuery::kMaxDim; ++i)
    signs[static_cast<std::size_t>(i)] = rotation_sign(i);
  return signs;
}();

// Sums and differences of numbers 1, 2 and 4 apart, within eight.
f32x8 hadamard8(f32x8 x) {
  constexpr f32x8 kOnes = {1, -1, 1, -1, 1, -1, 1, -1}, kTwos = {1, 1, -1, -1, 1, 1, -1, -1},
                  kFours = {1, 1, 1, 1, -1, -1, -1, -1};
  x = __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6) + x * kOnes;
  x = __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5) + x * kTwos;
  return __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3) + x * kFours;
}

// x = H x / sqrt(n) for n a power of two (Sylvester's Hadamard matrix); its own inverse.
void hadamard(float* x, int n) {
  for (int i = 0; i + 8 <= n; i += 8) store8(x + i, hadamard8(load8(x + i)));
  for (int width = n < 8 ? 1 : 8; width < n; width *= 2) {
    for (int i = 0; i < n; i += 2 * width) {
#pragma omp simd
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

using Place = CodePlace (*)(int, int, int, int);

template <Place place>
void put_code(std::byte* codes, int token, int dim, int bits, unsigned code) {
  for (int part = 0; part < code_parts(bits); ++part) {
    const CodePlace at = place(token, dim, bits, part);
    const unsigned mask = ((1u << at.width) - 1) << at.shift;
    const unsigned value = code >> at.low << at.shift & mask;
    codes[at.byte] = std::byte((std::to_integer<unsigned>(codes[at.byte]) & ~mask) | value);
  }
}

template <Place place>
unsigned get_code(const std::byte* codes, int token, int dim, int bits) {
  unsigned code = 0;
  for (int part = 0; part < code_parts(bits); ++part) {
    const CodePlace at = place(token, dim, bits, part);
    code |= (std::to_integer<unsigned>(codes[at.byte]) >> at.shift & ((1u << at.width) - 1))
            << at.low;
  }
  return code;
}

// Sums over a head are 32 sums of every 32nd number, joined in halves: a warp's order.
constexpr int kSums = 32;

float join(float (&sums)[kSums]) {
  for (int width = kSums / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
  return sums[0];
}

float product(const float* a, const float* b, int n) {
  float sums[kSums] = {};
  int first = 0;
  for (; first + kSums <= n; first += kSums)
    for (int i = 0; i < kSums; ++i) sums[i] = fmaf(a[first + i], b[first + i], sums[i]);
  for (int i = 0; first + i < n; ++i) sums[i] = fmaf(a[first + i], b[first + i], sums[i]);
  return join(sums);
}

// c = the numbers of x on a grid of `step`. Returns <x,c> and <c,c>.
std::pair<float, float> round_to_grid(float* c, const float* x, int n, float step, int bits) {
  const float inverse = step > 0 ? 1.0f / step : 0.0f, half = static_cast<float>(1 << (bits - 1));
  for (int i = 0; i < n; ++i) c[i] = grid_number(x[i], inverse, half);
  return {product(x, c, n), product(c, c, n)};
}

// Rounds x to `bits`, on the best of a few grids around the Gaussian's: the one with the largest
// <x,c>^2 / <c,c> loses least, whichever gain is taken. Writes the codes of one token, c as numbers
// of the grid, and returns its scale.
template <Place place>
float round_to_codes(std::byte* codes, float* c, int token, int bits, const float* x,
                     int head_dim) {
  float best = -1, step = 0;
  const float squares = product(x, x, head_dim);
  const float usual = ghost_step(bits) * std::sqrt(squares / static_cast<float>(head_dim));
  for (int grid = 0; grid < kGhostGrids; ++grid) {
    const float tried = grid_factor(grid) * usual;
    const auto [xc, cc] = round_to_grid(c, x, head_dim, tried, bits);
    if (xc * xc / cc > best) best = xc * xc / cc, step = tried;
  }
  const auto [xc, cc] = round_to_grid(c, x, head_dim, step, bits);
  const float half = static_cast<float>(1 << (bits - 1));
  for (int i = 0; i < head_dim; ++i)
    put_code<place>(codes, token, i, bits, static_cast<unsigned>(static_cast<int>(c[i] + half)));
  return unbiased_scale(squares, xc);
}

float read_scale(std::byte scale, float unit) {
  return unit * scale_of_byte(std::to_integer<std::uint32_t>(scale));
}

template <Place place>
void read_codes(float* out, const std::byte* codes, int token, int bits, float scale,
                int head_dim) {
  const float centre = static_cast<float>(1 << (bits - 1)) - 0.5f;
  for (int i = 0; i < head_dim; ++i)
    out[i] = scale * (static_cast<float>(get_code<place>(codes, token, i, bits)) - centre);
}

void centre_and_rotate(float* x, const float* in, const float* mean, int head_dim) {
  for (int i = 0; i < head_dim; ++i) x[i] = in[i] - mean[i];
  rotate(x, head_dim);
}

// carry += x - scale c, what rounding x to a ghost lost.
void carry_on(float* carry, const float* x, const float* c, float scale, int head_dim) {
  for (int i = 0; i < head_dim; ++i) carry[i] += fmaf(-scale, c[i], x[i]);
}

}  // namespace

void rotate(float* x, int head_dim) {
  for (int i = 0; i < head_dim; ++i) x[i] *= kSigns[static_cast<std::size_t>(i)];
  hadamard_blocks(x, head_dim);
}

void rotate_back(float* x, int head_dim) {
  hadamard_blocks(x, head_dim);
  for (int i = 0; i < head_dim; ++i) x[i] *= kSigns[static_cast<std::size_t>(i)];
}

void widen_scales(float* out, const std::byte* scales) {
  for (int i = 0; i < kGhostGroup; ++i)
    out[i] = scale_of_byte(std::to_integer<std::uint32_t>(scales[i]));
}

void write_ghost(std::byte* group, const GhostFormat& f, int i, const float* k, const float* v,
                 const GhostCentre& centre, float* carry) {
  float x[GhostQuery::kMaxDim], y[GhostQuery::kMaxDim], c[GhostQuery::kMaxDim];
  std::byte* values = group + f.key_bytes();
  std::byte* scales = values + f.value_bytes();
  centre_and_rotate(x, k, centre.key_mean, f.head_dim);
  const float key = round_to_codes<key_place>(group, c, i, f.key_bits, x, f.head_dim);
  scales[i] = static_cast<std::byte>(byte_of_scale(key, centre.key_unit));
  if (f.value_bits == 0) return;
  if (i % kChainTokens == 0) std::fill_n(carry, f.head_dim, 0.0f);
  centre_and_rotate(x, v, centre.value_mean, f.head_dim);
  for (int j = 0; j < f.head_dim; ++j) y[j] = fmaf(kFeedback, carry[j], x[j]);
  const float value = round_to_codes<value_place>(values, c, i, f.value_bits, y, f.head_dim);
  std::byte& scale = scales[f.scale_bytes() + i];
  scale = static_cast<std::byte>(byte_of_scale(value, centre.value_unit));
  carry_on(carry, x, c, read_scale(scale, centre.value_unit), f.head_dim);
}

void carry_ghost(float* carry, const std::byte* group, const GhostFormat& f, int i, const float* v,
                 const GhostCentre& centre) {
  float x[GhostQuery::kMaxDim], c[GhostQuery::kMaxDim];
  if (f.value_bits == 0) return;
  const std::byte* values = group + f.key_bytes();
  const std::byte scale = values[f.value_bytes() + f.scale_bytes() + i];
  if (i % kChainTokens == 0) std::fill_n(carry, f.head_dim, 0.0f);
  centre_and_rotate(x, v, centre.value_mean, f.head_dim);
  read_codes<value_place>(c, values, i, f.value_bits, 1, f.head_dim);
  carry_on(carry, x, c, read_scale(scale, centre.value_unit), f.head_dim);
}

void read_ghost_key(float* out, const std::byte* group, const GhostFormat& f, int i,
                    const GhostCentre& centre) {
  const std::byte* scales = group + f.key_bytes() + f.value_bytes();
  read_codes<key_place>(out, group, i, f.key_bits, read_scale(scales[i], centre.key_unit),
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
  read_codes<value_place>(out, values, i, f.value_bits, read_scale(scales[i], centre.value_unit),
                          f.head_dim);
}

void prepare_query(GhostQuery& out, const float* q, const float* key_mean, const GhostRope& rope,
                   const GhostFormat& f) {
  float x[GhostQuery::kMaxDim] = {};
  std::copy_n(q, f.head_dim, x);
  rope.prepare(out, q, key_mean);
  rotate(x, f.head_dim);
  f32x8 most = {};
  for (int i = 0; i < f.padded_dim(); i += 8)
    most = larger(larger(load8(x + i), -load8(x + i)), most);
  const float largest = max8(most), inverse = largest > 0 ? 127.0f / largest : 0.0f;
  out.scale = largest / 127.0f;
  int codes[GhostQuery::kMaxDim], sum = 0;
  for (int i = 0; i < f.padded_dim(); ++i) {
    codes[i] = q8_0_code(x[i], inverse);
    sum += codes[i];
  }
  for (int i = 0; i < f.padded_dim(); i += 2) {
    const std::uint32_t pair = (static_cast<unsigned>(codes[i]) & 0xff) |
                               (static_cast<unsigned>(codes[i + 1]) & 0xff) << 8;
    out.pairs[i / 2] = pair | pair << 16;
  }
  out.offset = -(static_cast<float>(1 << (f.key_bits - 1)) - 0.5f) * static_cast<float>(sum);
  out.noise = ghost_noise(f.key_bits) * std::sqrt(product(x, x, f.head_dim));
}

}  // namespace thaw
