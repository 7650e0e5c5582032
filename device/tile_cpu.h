// The inner loops of every dense product on the CPU: a few rows of activations against a tile of 16
// columns, written with the compilers' vector types so that one source serves AVX2, AVX-512 and
// NEON.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

namespace thaw {

using f32x8 = float __attribute__((vector_size(32)));
inline constexpr int kTileCols = 16;  // columns of a tile

// A tile's row is kTileParts vectors of kTilePart columns. kTileRows: most rows at a time, whose
// sums stay in registers (6: with 2 parts and a factor all 16 of AVX2).
#ifdef __AVX512BW__
using TilePart = float __attribute__((vector_size(64)));
inline constexpr int kTileRows = 12;
#else
using TilePart = f32x8;
inline constexpr int kTileRows = 6;
#endif
inline constexpr int kTilePart = sizeof(TilePart) / sizeof(float);
inline constexpr int kTileParts = kTileCols / kTilePart;

inline f32x8 load8(const float* p) {
  f32x8 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
// Keeps a loaded vector in a register: compilers would rather read it again at every use.
template <class Vector>
inline void keep(Vector& v) {
#ifdef __AVX__
  asm("" : "+x"(v));
#else
  (void)v;
#endif
}
inline f32x8 broadcast2(const float* p) {  // two floats, four times
  std::int64_t bits;
  std::memcpy(&bits, p, sizeof bits);
  const std::int64_t __attribute__((vector_size(32))) all = {bits, bits, bits, bits};
  return reinterpret_cast<f32x8>(all);
}
inline TilePart load_part(const float* row, int part) {
  TilePart v;
  std::memcpy(&v, row + part * kTilePart, sizeof v);
  return v;
}
inline void store8(float* p, f32x8 v) { std::memcpy(p, &v, sizeof v); }
inline float sum8(f32x8 v) {  // in a fixed order
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <class Vector>  // b where a is no number
inline Vector larger(Vector a, Vector b) {
  return a > b ? a : b;
}
inline float max8(f32x8 v) {
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  return std::max(v[0], v[1]);
}
// Of a part's halves, if it has two.
template <class Join>
inline f32x8 join_halves(const TilePart& v, const Join& join) {
  f32x8 halves[kTilePart / 8];
  std::memcpy(halves, &v, sizeof v);
  return kTilePart == 8 ? halves[0] : join(halves[0], halves[kTilePart / 8 - 1]);
}
inline float sum_part(const TilePart& v) {
  return sum8(join_halves(v, [](f32x8 a, f32x8 b) { return a + b; }));
}
inline float largest(const float* numbers, int n) {  // -infinity of none
  TilePart most = TilePart{} - std::numeric_limits<float>::infinity();
  int i = 0;
  for (; i + kTilePart <= n; i += kTilePart) most = larger(load_part(numbers + i, 0), most);
  float m = max8(join_halves(most, larger<f32x8>));
  for (; i < n; ++i) m = numbers[i] > m ? numbers[i] : m;
  return m;
}

// Element k is the sum of v[k]'s elements, in sum8()'s order.
inline f32x8 sums8(const f32x8 (&v)[8]) {
  f32x8 a[4], b[2];
  for (int k = 0; k < 4; ++k) {  // halves: v[k] in the lower half, v[k + 4] in the upper
    a[k] = __builtin_shufflevector(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
  for (int k = 0; k < 2; ++k) {
    b[k] = __builtin_shufflevector(a[2 * k], a[2 * k + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
           __builtin_shufflevector(a[2 * k], a[2 * k + 1], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  return __builtin_shufflevector(b[0], b[1], 0, 2, 8, 10, 4, 6, 12, 14) +
         __builtin_shufflevector(b[0], b[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

// out[r][c] += sum over i < n of x[r][i] * tile[i][c], for r < kRows and c < 16.
template <int kRows>
void tile_multiply_rows(float* out, std::int64_t out_stride, const float* x, std::int64_t x_stride,
                        const float* tile, std::int64_t tile_stride, std::int64_t n) {
  TilePart sum[kRows][kTileParts] = {};
  for (std::int64_t i = 0; i < n; ++i) {
    TilePart columns[kTileParts];
#pragma GCC unroll 2
    for (int part = 0; part < kTileParts; ++part) {
      columns[part] = load_part(tile + i * tile_stride, part);
      keep(columns[part]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const float factor = x[r * x_stride + i];
#pragma GCC unroll 2
      for (int part = 0; part < kTileParts; ++part) sum[r][part] += factor * columns[part];
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int part = 0; part < kTileParts; ++part) {
      const TilePart total = load_part(out + r * out_stride, part) + sum[r][part];
      std::memcpy(out + r * out_stride + part * kTilePart, &total, sizeof total);
    }
  }
}

template <int... kLess>
void tile_multiply(float* out, std::int64_t out_stride, const float* x, std::int64_t x_stride,
                   std::int64_t rows, const float* tile, std::int64_t tile_stride, std::int64_t n,
                   std::integer_sequence<int, kLess...>) {
  constexpr decltype(&tile_multiply_rows<1>) kByRows[] = {&tile_multiply_rows<kLess + 1>...};
  for (; rows > 0; rows -= kTileRows, out += kTileRows * out_stride, x += kTileRows * x_stride)
    kByRows[std::min<std::int64_t>(rows, kTileRows) - 1](out, out_stride, x, x_stride, tile,
                                                         tile_stride, n);
}

// The same for any number of rows.
inline void tile_multiply(float* out, std::int64_t out_stride, const float* x,
                          std::int64_t x_stride, std::int64_t rows, const float* tile,
                          std::int64_t tile_stride, std::int64_t n) {
  tile_multiply(out, out_stride, x, x_stride, rows, tile, tile_stride, n,
                std::make_integer_sequence<int, kTileRows>{});
}

// Rows become columns.
inline void transpose_8x8(f32x8 (&v)[8]) {
  f32x8 a[8], b[8];
  for (int r = 0; r < 8; r += 2) {  // pairs of rows, interleaved within each half
    a[r] = __builtin_shufflevector(v[r], v[r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[r + 1] = __builtin_shufflevector(v[r], v[r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int r = 0; r < 8; r += 4) {  // fours of rows
    for (int i = 0; i < 2; ++i) {
      b[r + 2 * i] = __builtin_shufflevector(a[r + i], a[r + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[r + 2 * i + 1] =
          __builtin_shufflevector(a[r + i], a[r + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int c = 0; c < 4; ++c) {  // halves
    v[c] = __builtin_shufflevector(b[c], b[c + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[c + 4] = __builtin_shufflevector(b[c], b[c + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

// out[c][r] = in[r][c] for 8 x 8 elements.
inline void transpose_8x8(float* out, std::int64_t out_stride, const float* in,
                          std::int64_t in_stride) {
  f32x8 v[8];
  for (int r = 0; r < 8; ++r) v[r] = load8(in + r * in_stride);
  transpose_8x8(v);
  for (int c = 0; c < 8; ++c) store8(out + c * out_stride, v[c]);
}

}  // namespace thaw
