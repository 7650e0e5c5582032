// Activations of a product of a few rows (model/gemv_cuda.cuh) in shared memory: as floats where
// weights are floats; where weights are codes, as 16-bit integers a block of 32 in two planes of 8
// bits, whose products with codes are exact.
#pragma once

#include "model/weight_unit_cuda.cuh"

namespace thaw {

inline constexpr int kGemvThreads = 256;

struct GemvInput {
  const float* x;     // n_rows x cols
  const float* norm;  // cols, or null; otherwise RMSNorm(x) * norm is multiplied instead of x
  float eps;
  int n_rows;  // at most kT
  int cols;
  int chunk;  // columns that are staged at a time: whole steps
};

// The scale of a block of 32 activations, and the sum of their integers.
struct BlockInfo {
  float scale;
  int total;
};
// Peak of the integers: 127 times 256, so that the high plane has 8 bits.
inline constexpr float kPeakCode = 32512;

// Activations of a row of a chunk in shared memory. A column's place is such that lanes with
// neighbouring units read neighbouring 16 bytes.
template <DType kType>
struct Staged {
  using Unit = WeightUnit<kType>;
  static constexpr bool kIsCodes = Unit::kHasScale;
  static constexpr int kPieces = kIsCodes ? Unit::kElements / 8 : Unit::kElements / 4;  // of a unit

  uint4* pieces;
  BlockInfo* blocks;  // of codes

  __host__ __device__ static std::size_t bytes(int chunk) {
    const auto n = static_cast<std::size_t>(chunk);
    return kIsCodes ? n * 2 + n / 32 * sizeof(BlockInfo) : n * sizeof(float);
  }
  __device__ Staged(void* shared, int t, int chunk) {
    auto* row = static_cast<unsigned char*>(shared) + t * bytes(chunk);
    pieces = reinterpret_cast<uint4*>(row);
    blocks = reinterpret_cast<BlockInfo*>(row + static_cast<std::size_t>(chunk) * 2);
  }
  __device__ uint4& piece(int unit, int i) const {
    return pieces[(unit / kWarp * kPieces + i) * kWarp + unit % kWarp];
  }

  // Columns e to e + 3, e a multiple of 4; neighbouring lanes have neighbouring ones, and all 32
  // lanes call.
  __device__ void put(int e, float4 x) const {
    const int unit = e / Unit::kElements, quad = e % Unit::kElements / 4;
    if constexpr (!kIsCodes) {
      reinterpret_cast<float4&>(piece(unit, quad)) = x;
    } else {
      const float peak = warp_reduce<MaxOrNan, 8>(
          MaxOrNan::join(MaxOrNan::join(fabsf(x.x), fabsf(x.y)),
                         MaxOrNan::join(fabsf(x.z), fabsf(x.w))));  // NaN becomes the scale
      const float inverse = peak > 0 ? kPeakCode / peak : 0.0f;
      const int codes[4] = {__float2int_rn(x.x * inverse), __float2int_rn(x.y * inverse),
                            __float2int_rn(x.z * inverse), __float2int_rn(x.w * inverse)};
      std::uint32_t high = 0, low = 0;
      int total = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int low_byte = static_cast<std::int8_t>(codes[j]);
        low |= static_cast<std::uint32_t>(low_byte & 0xff) << (8 * j);
        high |= static_cast<std::uint32_t>(((codes[j] - low_byte) >> 8) & 0xff) << (8 * j);
        total += codes[j];
      }
#pragma unroll
      for (int step = 4; step > 0; step /= 2) total += __shfl_xor_sync(kAllLanes, total, step);
      const int n = kPieces / 2;  // pieces of a plane
      reinterpret_cast<std::uint32_t*>(&piece(unit, quad / 4))[quad % 4] = high;
      reinterpret_cast<std::uint32_t*>(&piece(unit, n + quad / 4))[quad % 4] = low;
      if (e % 32 == 0) blocks[e / 32] = {peak / kPeakCode, total};
    }
  }
};

// Four columns of a row of n_cols; zeros beyond it. kWhole: n_cols is a multiple of 4, and there is
// no branch for which loads that follow would wait.
template <bool kWhole>
__device__ inline float4 load_columns(const float* row, int col, int n_cols) {
  if constexpr (kWhole) {
    const auto x = *reinterpret_cast<const float4*>(row + min(col, n_cols - 4));
    return col < n_cols ? x : make_float4(0, 0, 0, 0);
  } else {
    return make_float4(col < n_cols ? row[col] : 0.0f, col + 1 < n_cols ? row[col + 1] : 0.0f,
                       col + 2 < n_cols ? row[col + 2] : 0.0f,
                       col + 3 < n_cols ? row[col + 3] : 0.0f);
  }
}

// Columns from `begin` of all rows into shared memory, times norm, with zeros to the end of the
// last step; adds their squares to this thread's.
template <DType kType, int kT, bool kWhole>
__device__ inline void stage(void* shared, float (&squares)[kT], const GemvInput& in, int begin) {
  constexpr int kSpan = WeightStep<kType>::kElements;
  constexpr int kBatch = kT == 1 && kWhole ? 4 : 1;  // passes whose loads are under way together
  const int n = min(in.chunk, (in.cols - begin + kSpan - 1) / kSpan * kSpan);
  for (int first = static_cast<int>(threadIdx.x) * 4; first < n;
       first += kGemvThreads * 4 * kBatch) {
    float4 x[kBatch][kT], gain[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      gain[i] = make_float4(1, 1, 1, 1);
#pragma unroll
      for (int t = 0; t < kT; ++t)  // a row that is not there is one that nobody asks for
        x[i][t] =
            load_columns<kWhole>(in.x + static_cast<std::int64_t>(min(t, in.n_rows - 1)) * in.cols,
                                 begin + first + i * kGemvThreads * 4, in.cols);
    }
    if (in.norm != nullptr) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        gain[i] = load_columns<kWhole>(in.norm, begin + first + i * kGemvThreads * 4, in.cols);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int e = first + i * kGemvThreads * 4;
      if (e >= n) break;  // the same for all lanes
#pragma unroll
      for (int t = 0; t < kT; ++t) {
        float4& a = x[i][t];
        squares[t] += a.x * a.x + a.y * a.y + a.z * a.z + a.w * a.w;
        a.x *= gain[i].x, a.y *= gain[i].y, a.z *= gain[i].z, a.w *= gain[i].w;
        Staged<kType>(shared, t, in.chunk).put(e, a);
      }
    }
  }
}

}  // namespace thaw
