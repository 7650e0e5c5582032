// How kernels write ghosts: a warp rounds a key or a value, a block puts a group together.
#pragma once

#include "kvstore/device_view.h"
#include "kvstore/ghost_code.h"
#include "kvstore/rotation_cuda.cuh"
#include "kvstore/row_cuda.cuh"
#include "kvstore/step_cuda.h"

namespace thaw {

inline constexpr int kGhostThreads = 128;

struct GhostJob {
  DeviceGhosts ghosts;
  float *means, *units;  // those of `ghosts`, to be written
  float* carries;        // k/v head x head_dim: write_ghost()'s, behind the newest token
  int* carried_to;       // a k/v head: the token that its carry is for
  DeviceRows cold;
  const StepPlace* place;
  bool fixes_centre;           // one block a head, which also fixes the centre
  int n_heads = 0;             // of a layer; these four are set where a launch is for all layers
  std::size_t cold_layer = 0;  // bytes of `cold` from a layer to the next
  DeviceHot hot = {};  // of layer 0; n_lanes is 0 where the step's tokens are read from `cold`

  // The same for a layer, where this is for layer 0.
  __device__ GhostJob of_layer(int layer) const {
    GhostJob job = *this;
    const std::size_t heads = static_cast<std::size_t>(layer) * n_heads;
    const GhostFormat& f = ghosts.format;
    job.ghosts.offset += heads * ghosts.kPageGroups * f.group_bytes();
    job.means += heads * 2 * f.head_dim, job.units += heads * 2;
    job.carries += heads * f.head_dim, job.carried_to += heads;
    job.cold.offset += layer * cold_layer;
    const std::ptrdiff_t lanes = static_cast<std::ptrdiff_t>(layer) * hot.n_lanes;
    job.hot.rows.pages += lanes * hot.lane_pages, job.hot.n_rows += lanes;
    return job;
  }
};

// The angle of a pair at `token`.
__device__ inline Angle angle_of(const DeviceRope& rope, int n_pairs, int pair, int token) {
  const float* middle = rope.middle + token / GhostRope::kSpan * 2 * n_pairs + pair;
  const float* within = rope.within + token % GhostRope::kSpan * 2 * n_pairs + pair;
  return sum_of_angles({middle[0], middle[n_pairs]}, {within[0], within[n_pairs]});
}

// A vector on a grid: <x,c> and <c,c>; numbers from head_dim on are left out.
struct GridSums {
  float xc, cc;
};
__device__ inline GridSums sums_on_grid(const float (&x)[kGhostUnits], int head_dim, float step,
                                        int bits) {
  const float inverse = step > 0 ? 1.0f / step : 0.0f, half = static_cast<float>(1 << (bits - 1));
  GridSums sums = {0, 0};
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    if (lane_index() + j * kWarp >= head_dim) continue;
    const float c = grid_number(x[j], inverse, half);
    sums.xc = fmaf(x[j], c, sums.xc), sums.cc = fmaf(c, c, sums.cc);
  }
  return {warp_sum(sums.xc), warp_sum(sums.cc)};
}

// Puts the code of dimension `dim` of token i into a group in shared memory, in which other threads
// put codes into the same words.
template <bool kIsKey>
__device__ inline void put_code(std::uint32_t* codes, int i, int dim, int bits, unsigned code) {
  for (int part = 0; part < code_parts(bits); ++part) {
    const CodePlace at = kIsKey ? key_place(i, dim, bits, part) : value_place(i, dim, bits, part);
    const int shift = static_cast<int>(at.byte % 4) * 8 + at.shift;
    const unsigned mask = ((1u << at.width) - 1) << shift;
    atomicAnd(codes + at.byte / 4, ~mask);
    atomicOr(codes + at.byte / 4, (code >> at.low << shift) & mask);
  }
}

// Rounds x as round_to_codes() in kvstore/ghost.cpp does; the codes go into `codes`, of token i of
// a group, and their numbers into c. Every lane gets the scale. All lanes of the warp call.
template <bool kIsKey>
__device__ inline float round_in_warp(std::uint32_t* codes, float (&c)[kGhostUnits], int i,
                                      int bits, const float (&x)[kGhostUnits], int head_dim) {
  float squares = 0;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) squares = fmaf(x[j], x[j], squares);
  squares = warp_sum(squares);
  const float usual = ghost_step(bits) * sqrtf(squares / static_cast<float>(head_dim));
  float best = -1, step = 0;
  for (int grid = 0; grid < kGhostGrids; ++grid) {
    const GridSums sums = sums_on_grid(x, head_dim, grid_factor(grid) * usual, bits);
    const float kept = sums.xc * sums.xc / sums.cc;
    if (kept > best) best = kept, step = grid_factor(grid) * usual;
  }
  const GridSums sums = sums_on_grid(x, head_dim, step, bits);
  const float inverse = step > 0 ? 1.0f / step : 0.0f, half = static_cast<float>(1 << (bits - 1));
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int dim = lane_index() + j * kWarp;
    if (dim >= head_dim) continue;
    c[j] = grid_number(x[j], inverse, half);
    put_code<kIsKey>(codes, i, dim, bits, static_cast<unsigned>(static_cast<int>(c[j] + half)));
  }
  return unbiased_scale(squares, sums.xc);
}

// The mean of a head's first keys, turned back to position 0, and values, and the units of their
// scales. squares: shared, {key, value} x head_dim. All threads call; they see the means when they
// return, and the units behind the next barrier.
template <KvType kType>
__device__ void fix_centre(const GhostJob& job, int head, double* squares) {
  const GhostFormat& f = job.ghosts.format;
  const int n = job.ghosts.centre_tokens, dim = f.head_dim, half = dim / 2;
  float *mean = job.means + head * 2 * dim, *units = job.units + head * 2;
  for (int task = static_cast<int>(threadIdx.x); task < 2 * half; task += kGhostThreads) {
    const bool value = task >= half;
    const int pair = value ? task - half : task;
    const DeviceRope::Pair p = job.ghosts.rope.pairs[pair];
    const auto read = [&](int t) {
      const std::byte* row = value ? job.cold.value(head, t) : job.cold.key(head, t);
      const float first = number_of<kType>(row, p.first), second = number_of<kType>(row, p.second);
      if (value) return TurnedPair{first, second};
      Angle back = angle_of(job.ghosts.rope, half, pair, t);
      back.sine = -back.sine;
      return turn_pair(first, second, back);
    };
    TurnedPair sum = {0, 0};
    for (int t = 0; t < n; ++t) {
      const TurnedPair x = read(t);
      sum.first += x.first / static_cast<float>(n), sum.second += x.second / static_cast<float>(n);
    }
    double first = 0, second = 0;
    for (int t = 0; t < n; ++t) {
      const TurnedPair x = read(t);
      const double a = x.first - sum.first, b = x.second - sum.second;
      first += a * a, second += b * b;
    }
    const int at = value ? dim : 0;
    mean[at + p.first] = sum.first, mean[at + p.second] = sum.second;
    squares[at + p.first] = first, squares[at + p.second] = second;
  }
  __syncthreads();  // all means and sums of squares are there
  if (threadIdx.x == 0) units[0] = ghost_step(f.key_bits) * rms_of(squares, n, dim);
  if (threadIdx.x == kWarp) units[1] = ghost_step(f.value_bits) * rms_of(squares + dim, n, dim);
}

// x = what is to be rounded of a key or a value, before anything is fed back: without its mean,
// rotated. mean: shared, head_dim floats of the warp's own. All lanes call.
template <KvType kType, bool kIsKey>
__device__ inline void centre_and_rotate(float (&x)[kGhostUnits], const GhostJob& job, float* mean,
                                         int head, int token, const std::byte* row) {
  const int dim = job.ghosts.format.head_dim;
  const float* at_zero = job.means + (head * 2 + (kIsKey ? 0 : 1)) * dim;
  for (int pair = lane_index(); pair < dim / 2; pair += kWarp) {
    const DeviceRope::Pair p = job.ghosts.rope.pairs[pair];
    TurnedPair turned = {at_zero[p.first], at_zero[p.second]};
    if (kIsKey)
      turned =
          turn_pair(turned.first, turned.second, angle_of(job.ghosts.rope, dim / 2, pair, token));
    mean[p.first] = turned.first, mean[p.second] = turned.second;
  }
  __syncwarp();  // the mean is complete
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    x[j] = i < dim ? number_of<kType>(row, i) - mean[i] : 0.0f;
  }
  __syncwarp();  // and read: the next token's may be written
  rotate_in_warp(x, dim);
}

// The byte of a scale into a group in shared memory. Returns what it stands for.
template <bool kIsKey>
__device__ inline float write_scale(const GhostJob& job, std::uint32_t* group, int head, int token,
                                    float scale) {
  const GhostFormat& f = job.ghosts.format;
  const float unit = job.units[head * 2 + (kIsKey ? 0 : 1)];
  const std::uint8_t byte = byte_of_scale(scale, unit);
  auto* scales = reinterpret_cast<std::uint8_t*>(group) + f.key_bytes() + f.value_bytes() +
                 (kIsKey ? 0 : f.scale_bytes());
  if (lane_index() == 0) scales[token % kGhostGroup] = byte;
  return unit * scale_of_byte(byte);
}

// The row of one of the step's tokens, which end before `end`.
template <bool kIsKey>
__device__ inline const std::byte* row_of(const GhostJob& job, int head, int token, int end) {
  DeviceRows rows = job.cold;
  int row = token;
  if (job.hot.n_lanes > 0 && token == end - 1) {
    const int lane = head / job.hot.lane_heads;
    rows = job.hot.rows_of(lane), row = job.hot.n_rows[lane] - 1;
    head %= job.hot.lane_heads;
  }
  return kIsKey ? rows.key(head, row) : rows.value(head, row);
}

// The keys of tokens [first, last) into their group, by one warp.
template <KvType kType>
__device__ inline void write_keys(const GhostJob& job, std::uint32_t* group, float* mean, int head,
                                  int first, int last, int end) {
  const GhostFormat& f = job.ghosts.format;
  float x[kGhostUnits], c[kGhostUnits];
  for (int token = first; token < last; ++token) {
    centre_and_rotate<kType, true>(x, job, mean, head, token, row_of<true>(job, head, token, end));
    const float scale =
        round_in_warp<true>(group, c, token % kGhostGroup, f.key_bits, x, f.head_dim);
    write_scale<true>(job, group, head, token, scale);
  }
}

// carry += x - scale c, in the head's dimensions.
__device__ inline void carry_on(float (&carry)[kGhostUnits], const float (&x)[kGhostUnits],
                                const float (&c)[kGhostUnits], float scale, int head_dim) {
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j)
    if (lane_index() + j * kWarp < head_dim) carry[j] += fmaf(-scale, c[j], x[j]);
}

// What rounding lost of the values before `token` in its chain, as it was left by the step before,
// or from their rows and their ghosts in `stored`.
template <KvType kType>
__device__ inline void load_carry(float (&carry)[kGhostUnits], const GhostJob& job,
                                  const std::byte* stored, float* mean, int head, int token,
                                  bool was_left) {
  const GhostFormat& f = job.ghosts.format;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int dim = lane_index() + j * kWarp;
    carry[j] = was_left && dim < f.head_dim ? job.carries[head * f.head_dim + dim] : 0.0f;
  }
  if (was_left) return;
  const std::byte *values = stored + f.key_bytes(),
                  *scales = values + f.value_bytes() + f.scale_bytes();
  const float centre = static_cast<float>(1 << (f.value_bits - 1)) - 0.5f;
  float x[kGhostUnits], c[kGhostUnits];
  for (int t = token / kChainTokens * kChainTokens; t < token; ++t) {
    const int i = t % kGhostGroup;
    centre_and_rotate<kType, false>(x, job, mean, head, t, job.cold.value(head, t));
#pragma unroll
    for (int j = 0; j < kGhostUnits; ++j) {
      const int dim = lane_index() + j * kWarp;
      if (dim >= f.head_dim) continue;
      const CodePlace at = value_place(i, dim, f.value_bits, 0);
      const unsigned code =
          static_cast<unsigned>(values[at.byte]) >> at.shift & ((1u << at.width) - 1);
      c[j] = static_cast<float>(code) - centre;
    }
    const float unit = job.units[head * 2 + 1];
    carry_on(carry, x, c, unit * scale_of_byte(static_cast<std::uint32_t>(scales[i])), f.head_dim);
  }
}

// The values of tokens [first, last) of a chain into their group, by one warp. `stored`: the group
// in device memory, as it was before the step.
template <KvType kType>
__device__ inline void write_values(const GhostJob& job, std::uint32_t* group,
                                    const std::byte* stored, float* mean, int head, int first,
                                    int last, int end) {
  const GhostFormat& f = job.ghosts.format;
  float x[kGhostUnits], y[kGhostUnits], c[kGhostUnits], carry[kGhostUnits];
  // In a step of many tokens another block may be writing its carry.
  const bool was_left =
      end - first == 1 && first % kChainTokens != 0 && job.carried_to[head] == first;
  load_carry<kType>(carry, job, stored, mean, head, first, was_left);
  for (int token = first; token < last; ++token) {
    centre_and_rotate<kType, false>(x, job, mean, head, token,
                                    row_of<false>(job, head, token, end));
#pragma unroll
    for (int j = 0; j < kGhostUnits; ++j) y[j] = fmaf(kFeedback, carry[j], x[j]);
    const float scale = round_in_warp<false>(group + f.key_bytes() / 4, c, token % kGhostGroup,
                                             f.value_bits, y, f.head_dim);
    carry_on(carry, x, c, write_scale<false>(job, group, head, token, scale), f.head_dim);
  }
  if (last != end) return;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int dim = lane_index() + j * kWarp;
    if (dim < f.head_dim) job.carries[head * f.head_dim + dim] = carry[j];
  }
  if (lane_index() == 0) job.carried_to[head] = end;
}

}  // namespace thaw
