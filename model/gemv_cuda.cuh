// y = W x for a few rows of activations at a time: what decoding spends its time on. One kernel,
// for every weight format and for each way to place and finish the rows (model/ops_cuda.cu).
#pragma once

#include "device/kernel.cuh"
#include "model/device_weights.h"

namespace thaw {

// A row of a matrix.
struct WeightRow {
  const uint4* codes;
  const std::byte* scales;
};
__device__ inline WeightRow row_of(const DeviceMatrix& w, int row) {
  const int scale_bytes = w.type == DType::kQ4_1 ? 4 : 2;
  return {w.codes + static_cast<std::int64_t>(row) * w.units,
          w.scales + static_cast<std::int64_t>(row) * (w.cols / 32) * scale_bytes};
}

// A unit of 16 bytes of a row of weights (model/device_weights.h), in registers. Weight j of it is
// line().x * code(j) + line().y, both f32: codes come out in the form that takes the fewest
// instructions, and the line makes up for it once a unit.
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

  __device__ void load(const WeightRow& row, int u) {
    const uint4 all = load_16_once(row.codes + u);
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
    const int block = u * kElements / 32;
    if constexpr (kType == DType::kQ4_1)
      scale = reinterpret_cast<const std::uint32_t*>(row.scales)[block];
    else
      scale = kHasScale ? reinterpret_cast<const std::uint16_t*>(row.scales)[block] : 0u;
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

  // A 4-bit code c comes as 1 + c / 16:  d (c - 8) = 16 d (1 + c / 16) - 24 d.
  __device__ float2 line() const {
    const float2 dm = unpack2<__half>(scale);
    if constexpr (kType == DType::kQ8_0) return make_float2(dm.x, 0);
    if constexpr (kType == DType::kQ4_0) return make_float2(16 * dm.x, -24 * dm.x);
    if constexpr (kType == DType::kQ4_1) return make_float2(16 * dm.x, dm.y - 16 * dm.x);
    return make_float2(1, 0);
  }

  // The weight itself, rounded once.
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
  }
}

inline constexpr int kGemvThreads = 128;
inline constexpr int kGemvStaged = 8192;  // floats of activations in shared memory, at most
// Weight rows that a warp reads side by side.
template <int kT>
inline constexpr int kGemvRows = kT == 1 ? 4 : 2;
// Blocks of a multiprocessor at the same time: as many as there are registers for, with no spills.
template <int kT>
inline constexpr int kGemvBlocks = kT == 1 ? 5 : 4;

struct GemvInput {
  const float* x;     // n_rows x cols
  const float* norm;  // cols, or null; otherwise RMSNorm(x) * norm is multiplied instead of x
  float eps;
  int n_rows;  // at most kT
  int cols;
  int chunk;  // columns that are staged at a time: whole units of 32 lanes
};

// Where in shared memory column e of a chunk lies: such that lanes with neighbouring units read
// neighbouring 16 bytes.
template <int kElements>
__device__ inline int staged_at(int e) {
  const int unit = e / kElements, quad = e % kElements / 4;
  return ((unit / kWarp * (kElements / 4) + quad) * kWarp + unit % kWarp) * 4 + e % 4;
}

// Columns from `begin` of all rows into shared memory, times norm, with zeros to the end of the
// last unit; adds their squares to this thread's.
template <int kElements, int kT>
__device__ inline void stage(float* staged, float (&squares)[kT], const GemvInput& in, int begin) {
  const int n = min(in.chunk, in.cols - begin);
  const int n_padded = (n + kElements - 1) / kElements * kElements;
  for (int i = static_cast<int>(threadIdx.x); i < n_padded; i += kGemvThreads) {
    const float gain = in.norm == nullptr || i >= n ? 1.0f : in.norm[begin + i];
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      const bool is_there = t < in.n_rows && i < n;
      const float x = is_there ? in.x[static_cast<std::int64_t>(t) * in.cols + begin + i] : 0.0f;
      squares[t] += x * x;
      staged[t * in.chunk + staged_at<kElements>(i)] = x * gain;
    }
  }
}

// sums[i][t] += unit i . the staged activations of row t, `x` at this lane's unit.
template <DType kType, int kRows, int kT>
__device__ inline void accumulate(float (&sums)[kRows][kT], const WeightUnit<kType> (&w)[kRows],
                                  const float* x, int chunk) {
  using Unit = WeightUnit<kType>;
  float dots[kRows][kT] = {}, totals[kT] = {};
#pragma unroll
  for (int q = 0; q < Unit::kElements / 4; ++q) {
    float4 a[kT];
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      a[t] = *reinterpret_cast<const float4*>(x + t * chunk + q * kWarp * 4);
      if constexpr (Unit::kFourBits) totals[t] += (a[t].x + a[t].y) + (a[t].z + a[t].w);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float4 c = w[i].codes(q);
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        float& dot = Unit::kHasScale ? dots[i][t] : sums[i][t];
        dot = fmaf(c.x, a[t].x, fmaf(c.y, a[t].y, fmaf(c.z, a[t].z, fmaf(c.w, a[t].w, dot))));
      }
    }
  }
  if constexpr (Unit::kHasScale) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const float2 line = w[i].line();
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        if constexpr (Unit::kFourBits) sums[i][t] = fmaf(line.y, totals[t], sums[i][t]);
        sums[i][t] = fmaf(line.x, dots[i][t], sums[i][t]);
      }
    }
  }
}

// Adds up the sums of the warp's lanes and hands each pair's results to op, each by its own lane.
template <class Op, int kRows, int kT>
__device__ inline void finish(const Op& op, const GemvInput& in, int pair,
                              const float (&sums)[kRows][kT], const float (&scale)[kT]) {
  constexpr int kPairs = kRows / 2;
  float mine[2] = {};
#pragma unroll
  for (int t = 0; t < kT; ++t) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      float sum = warp_sum(sums[i][t]);
      if (in.norm != nullptr) sum *= scale[t];
      if (lane_index() == t * kPairs + i / 2) mine[i % 2] = sum;
    }
  }
  const int my_pair = pair + lane_index() % kPairs, my_t = lane_index() / kPairs;
  if (my_pair < op.n_pairs() && my_t < in.n_rows) op.finish(my_pair, my_t, mine[0], mine[1]);
}

// Computes  y = W x for n_rows <= kT rows of activations, x normalised if in.norm is given: the
//           norm's factor 1 / rms(x) multiplies the sums, not the activations.
// Op        has pairs of weight rows: n_pairs(), row(pair, i) for i = 0 and 1, and
//           finish(pair, t, y0, y1), which one lane calls with both results of activation row t
// Grid      any; blocks take groups of 4 warps x kGemvRows weight rows in turns
// Block     kGemvThreads; a warp computes kGemvRows rows, its lanes take units of 16 bytes in turns
// Shared    kT x in.chunk floats, dynamic
// Bytes     reads W once, and x and norm once a block, or once a group where cols > chunk
// The first loads of weights are on their way before the kernel before is done; from then on each
// lane has one unit of every row on its way while it multiplies another.
template <DType kType, int kT, class Op>
__global__ void __launch_bounds__(kGemvThreads, kGemvBlocks<kT>)
    gemv(const __grid_constant__ Op op, const __grid_constant__ GemvInput in) {
  using Unit = WeightUnit<kType>;
  constexpr int kRows = kGemvRows<kT>;
  constexpr int kGroup = kGemvThreads / kWarp * kRows / 2;  // pairs
  float* staged = dynamic_shared<float>();
  const int lane = lane_index(), n_pairs = op.n_pairs();
  const int all_units = (in.cols + Unit::kElements - 1) / Unit::kElements;
  float squares[kT] = {}, scale[kT] = {};
  for (int group = static_cast<int>(blockIdx.x); group * kGroup < n_pairs; group += gridDim.x) {
    const bool first = group == static_cast<int>(blockIdx.x);
    const int pair = group * kGroup + warp_index() * (kRows / 2);
    const int n_units = pair < n_pairs ? all_units : 0;
    WeightRow rows[kRows];
    Unit next[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows[i] = op.row(min(pair + i / 2, n_pairs - 1), i % 2);
    const auto load_next = [&](int u) {
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        if (u < n_units) next[i].load(rows[i], u);
    };
    load_next(lane);
    if (first) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    float sums[kRows][kT] = {};
    for (int begin = 0; begin < in.cols; begin += in.chunk) {
      if (first || in.cols > in.chunk) {
        __syncthreads();  // the chunk before may still be read
        stage<Unit::kElements>(staged, squares, in, begin);
        __syncthreads();  // this chunk is complete
      }
      const int begin_unit = begin / Unit::kElements;
      const int end_unit = min(n_units, begin_unit + in.chunk / Unit::kElements);
      for (int u = begin_unit + lane; u < end_unit; u += kWarp) {
        Unit w[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) w[i] = next[i];
        load_next(u + kWarp);
        accumulate(sums, w, staged + staged_at<Unit::kElements>((u - begin_unit) * Unit::kElements),
                   in.chunk);
      }
    }
    if (first && in.norm != nullptr) {
#pragma unroll
      for (int t = 0; t < kT; ++t)
        scale[t] = 1 / sqrtf(block_sum(squares[t]) / static_cast<float>(in.cols) + in.eps);
    }
    finish(op, in, pair, sums, scale);
  }
}

}  // namespace thaw
