// y = W x for a few rows of activations at a time: what decoding spends its time on. One kernel,
// for every weight format and for each way to place and finish the rows (model/ops_cuda.cu).
//
// Weights stream through a ring in shared memory, by asynchronous copies that are several steps
// ahead, so that what a multiprocessor has on its way does not depend on its registers. Activations
// stand in shared memory, too: as floats where weights are floats; where weights are codes, as
// 16-bit integers a block of 32 in two planes of 8 bits, whose products with codes are exact.
#pragma once

#include "device/kernel.cuh"
#include "model/device_weights.h"

namespace thaw {

// A row of a matrix.
struct WeightRow {
  const uint4* codes;
  const uint4* scales;
};
__device__ inline WeightRow row_of(const DeviceMatrix& w, int row) {
  return {w.codes + static_cast<std::int64_t>(row) * w.units,
          w.scales + static_cast<std::int64_t>(row) * w.scale_units};
}

// A unit of 16 bytes of a row of weights (model/device_weights.h), in registers. Codes come out in
// the form that takes the fewest instructions; weight() makes up for it.
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

  __device__ void set(uint4 all) {
    words[0] = all.x, words[1] = all.y, words[2] = all.z, words[3] = all.w;
  }
  __device__ void load(const WeightRow& row, int u) {
    set(load_16_once(row.codes + u));
    scale = scale_of(row.scales, u);
  }
  // Of unit u of what `scales` begins with.
  __device__ static std::uint32_t scale_of(const uint4* scales, int u) {
    const int block = u * kElements / 32;
    if constexpr (kType == DType::kQ4_1)
      return reinterpret_cast<const std::uint32_t*>(scales)[block];
    return kHasScale ? reinterpret_cast<const std::uint16_t*>(scales)[block] : 0u;
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

  // The weight itself, rounded once. A 4-bit code c comes as 1 + c / 16:
  //   d (c - 8) = d (16 (1 + c / 16) - 24)
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

inline constexpr int kGemvThreads = 256;
inline constexpr int kGemvWarps = kGemvThreads / kWarp;
// Blocks of a multiprocessor at the same time: with the ring they ask for more bytes than the
// memory's latency swallows, and leave room for the next kernel's blocks.
inline constexpr int kGemvBlocks = 2;
// Steps of the ring: one is multiplied, the others arrive. A block of the widest product and two of
// another, or the other way round, fit into a multiprocessor's shared memory: kernels overlap.
template <DType kType>
inline constexpr int kGemvStages = WeightUnit<kType>::kHasScale ? 5 : 6;
inline constexpr std::size_t kGemvStaged = 64
                                           << 10;  // bytes of activations in shared memory, at most

// What a warp multiplies at a time of a row: a unit a lane, and their scales. Numbers of 16 bytes.
template <DType kType>
struct WeightStep {
  static constexpr int kElements = WeightUnit<kType>::kElements * kWarp;
  static constexpr int kScales = kType == DType::kQ8_0   ? 2
                                 : kType == DType::kQ4_0 ? 4
                                 : kType == DType::kQ4_1 ? 8
                                                         : 0;
  static constexpr int kSize = kWarp + kScales;
};
template <DType kType>
constexpr std::size_t kGemvRing = std::size_t{kGemvWarps} * kGemvStages<kType> * 2 *
                                  WeightStep<kType>::kSize * sizeof(uint4);

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
      const float peak =
          warp_reduce<Max, 8>(fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(x.z), fabsf(x.w))));
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

// A warp's ring, and what it is filled from: the steps of the rows of its pairs, one pair a turn.
template <DType kType, class Op>
class WeightRing {
  using Step = WeightStep<kType>;

 public:
  __device__ WeightRing(const Op& op, uint4* ring, int pair, int pairs_a_turn, int cols)
      : op_(op),
        ring_(ring),
        pair_(pair),
        pairs_a_turn_(pairs_a_turn),
        units_((cols + WeightUnit<kType>::kElements - 1) / WeightUnit<kType>::kElements),
        scale_units_(n_scale_units(kType, cols)) {
    begin_pair();
  }

  // Begins to copy the next step into the slot after the last one; all lanes call.
  __device__ void fetch() {
    if (step_ * kWarp >= units_) {
      step_ = 0, pair_ += pairs_a_turn_;
      begin_pair();
    }
    if (pair_ < op_.n_pairs()) {
      uint4* to = ring_ + slot_ * 2 * Step::kSize;
      const int unit = step_ * kWarp + lane_index();
      cp_async_16(to + lane_index(), rows_[0].codes + unit, unit < units_);
      cp_async_16(to + Step::kSize + lane_index(), rows_[1].codes + unit, unit < units_);
      if constexpr (Step::kScales > 0) {
        if (lane_index() < 2 * Step::kScales) {
          const bool second = lane_index() >= Step::kScales;
          const int i = lane_index() % Step::kScales, scale = step_ * Step::kScales + i;
          cp_async_16(to + (second ? Step::kSize : 0) + kWarp + i,
                      (second ? rows_[1].scales : rows_[0].scales) + scale, scale < scale_units_);
        }
      }
    }
    cp_async_commit();
    ++step_;
    slot_ = slot_ + 1 == kGemvStages<kType> ? 0 : slot_ + 1;
  }

  // Asks for what follows of the first pair's rows, as far as it is soon needed.
  __device__ void prefetch() const {
    const auto* codes = reinterpret_cast<const unsigned char*>(
        lane_index() < kWarp / 2 ? rows_[0].codes : rows_[1].codes);
    const int begin = (kGemvStages<kType> - 1) * kWarp * 16 + lane_index() % (kWarp / 2) * kLine;
    const int end = min(units_ * 16, begin + kMostPrefetched);
    for (int at = begin; at < end; at += kWarp / 2 * kLine) prefetch_line(codes + at);
  }

 private:
  static constexpr int kLine = 128, kMostPrefetched = 8 << 10;  // bytes, of a row

  __device__ void begin_pair() {
    const int pair = min(pair_, op_.n_pairs() - 1);
    rows_[0] = op_.row(pair, 0), rows_[1] = op_.row(pair, 1);
  }

  const Op& op_;
  uint4* ring_;
  WeightRow rows_[2];
  int pair_, pairs_a_turn_, units_, scale_units_, step_ = 0, slot_ = 0;
};

// sums[i][t] += row i of a step . row t of the activations, at this lane's unit.
template <DType kType, int kT>
__device__ inline void multiply_floats(float (&sums)[2][kT], const uint4* step, void* shared,
                                       int chunk, int unit) {
  WeightUnit<kType> w[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) w[i].set(step[i * WeightStep<kType>::kSize + lane_index()]);
#pragma unroll
  for (int q = 0; q < Staged<kType>::kPieces; ++q) {
    const float4 c[2] = {w[0].codes(q), w[1].codes(q)};
#pragma unroll
    for (int t = 0; t < kT; ++t) {
      const auto a =
          reinterpret_cast<const float4&>(Staged<kType>(shared, t, chunk).piece(unit, q));
#pragma unroll
      for (int i = 0; i < 2; ++i)
        sums[i][t] =
            fmaf(c[i].x, a.x, fmaf(c[i].y, a.y, fmaf(c[i].z, a.z, fmaf(c[i].w, a.w, sums[i][t]))));
    }
  }
}

__device__ inline int dot_words(const std::uint32_t (&codes)[4], uint4 x, int sum) {
  sum = __dp4a(static_cast<int>(codes[0]), static_cast<int>(x.x), sum);
  sum = __dp4a(static_cast<int>(codes[1]), static_cast<int>(x.y), sum);
  sum = __dp4a(static_cast<int>(codes[2]), static_cast<int>(x.z), sum);
  return __dp4a(static_cast<int>(codes[3]), static_cast<int>(x.w), sum);
}

// The same with codes. The sum of the products of a block is an integer below 2^28; of 4-bit codes
// it is put together from the elements in low nibbles and those in high ones.
template <DType kType, int kT>
__device__ inline void multiply_codes(float (&sums)[2][kT], const uint4* step, void* shared,
                                      int chunk, int unit) {
  using Unit = WeightUnit<kType>;
  constexpr int kHalves = Unit::kFourBits ? 2 : 1;
  std::uint32_t codes[2][kHalves][4];
  float2 dm[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4* row = step + i * WeightStep<kType>::kSize;
    const uint4 all = row[lane_index()];
    const std::uint32_t words[4] = {all.x, all.y, all.z, all.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      codes[i][0][j] = Unit::kFourBits ? words[j] & 0x0f0f0f0fu : words[j];
      if constexpr (Unit::kFourBits) codes[i][1][j] = words[j] >> 4 & 0x0f0f0f0fu;
    }
    dm[i] = unpack2<__half>(Unit::scale_of(row + kWarp, lane_index()));
  }
#pragma unroll
  for (int t = 0; t < kT; ++t) {
    const Staged<kType> x(shared, t, chunk);
    const BlockInfo block = x.blocks[unit * Unit::kElements / 32];
    int high[2] = {}, low[2] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4 x_high = x.piece(unit, half), x_low = x.piece(unit, kHalves + half);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        high[i] = dot_words(codes[i][half], x_high, high[i]);
        low[i] = dot_words(codes[i][half], x_low, low[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      int dot = (high[i] << 8) + low[i];
      if constexpr (kType == DType::kQ4_0) dot -= 8 * block.total;
      sums[i][t] = fmaf(dm[i].x * block.scale, static_cast<float>(dot), sums[i][t]);
      if constexpr (kType == DType::kQ4_1)
        sums[i][t] = fmaf(dm[i].y * block.scale, static_cast<float>(block.total), sums[i][t]);
    }
  }
}

// The two results of activation row t, t being this lane, once the warp's lanes are added up.
template <int kT>
__device__ inline float2 add_up(const GemvInput& in, const float (&sums)[2][kT],
                                const float (&scale)[kT]) {
  float2 mine = {};
#pragma unroll
  for (int t = 0; t < kT; ++t) {
    float2 both = make_float2(warp_sum(sums[0][t]), warp_sum(sums[1][t]));
    if (in.norm != nullptr) both.x *= scale[t], both.y *= scale[t];
    if (lane_index() == t) mine = both;
  }
  return mine;
}

// Computes  y = W x for n_rows <= kT rows of activations, x normalised if in.norm is given: the
//           norm's factor 1 / rms(x) multiplies the sums, not the activations.
// Op        has pairs of weight rows: n_pairs(), row(pair, i) for i = 0 and 1, and
//           finish(pair, t, y0, y1, early), which one lane calls with both results of activation
//           row t and what it got from load(pair, t) before it multiplied
// Grid      any; warps take pairs in turns
// Block     kGemvThreads; the lanes of a warp take units of 16 bytes in turns
// Shared    kT rows of Staged, and kGemvRing, dynamic
// Bytes     reads W once, and x and norm once a block, or once a turn where cols > chunk
// The first steps of weights are on their way before the kernel before is done.
template <DType kType, int kT, class Op>
__global__ void __launch_bounds__(kGemvThreads, kT == 1 ? kGemvBlocks + 1 : kGemvBlocks)
    gemv(const __grid_constant__ Op op, const __grid_constant__ GemvInput in) {
  using Step = WeightStep<kType>;
  auto* shared = dynamic_shared<unsigned char>();
  uint4* ring = reinterpret_cast<uint4*>(shared + kT * Staged<kType>::bytes(in.chunk)) +
                warp_index() * kGemvStages<kType> * 2 * Step::kSize;
  const int pairs_a_turn = static_cast<int>(gridDim.x) * kGemvWarps;
  const int first_pair = static_cast<int>(blockIdx.x) * kGemvWarps + warp_index();
  WeightRing<kType, Op> weights(op, ring, first_pair, pairs_a_turn, in.cols);
  for (int i = 0; i + 1 < kGemvStages<kType>; ++i) weights.fetch();
  if (first_pair < op.n_pairs()) weights.prefetch();
  wait_for_previous_kernel();
  let_next_kernel_start();

  float squares[kT] = {}, scale[kT] = {};
  int slot = 0;
  const int n_turns = (op.n_pairs() + pairs_a_turn - 1) / pairs_a_turn;
  for (int turn = 0; turn < n_turns; ++turn) {
    const int pair = first_pair + turn * pairs_a_turn;
    const bool finishes = pair < op.n_pairs() && lane_index() < in.n_rows;
    const auto early = finishes ? op.load(pair, lane_index()) : typename Op::Loaded{};
    float sums[2][kT] = {};
    for (int begin = 0; begin < in.cols; begin += in.chunk) {
      if (turn == 0 || in.cols > in.chunk) {
        __syncthreads();  // the chunk before may still be read
        if (Staged<kType>::kIsCodes || in.cols % 4 == 0)
          stage<kType, kT, true>(shared, squares, in, begin);
        else
          stage<kType, kT, false>(shared, squares, in, begin);
        __syncthreads();  // this chunk is complete
      }
      const int end = min(in.chunk, in.cols - begin);
      for (int at = 0; at < end; at += Step::kElements) {
        cp_async_wait<kGemvStages<kType> - 2>();
        __syncwarp();  // this step is there for all lanes, and they are through with the one before
        weights.fetch();
        const int unit = at / WeightUnit<kType>::kElements + lane_index();
        if (pair < op.n_pairs()) {
          if constexpr (Staged<kType>::kIsCodes)
            multiply_codes<kType>(sums, ring + slot * 2 * Step::kSize, shared, in.chunk, unit);
          else
            multiply_floats<kType>(sums, ring + slot * 2 * Step::kSize, shared, in.chunk, unit);
        }
        slot = slot + 1 == kGemvStages<kType> ? 0 : slot + 1;
      }
    }
    if (turn == 0 && in.norm != nullptr) {
#pragma unroll
      for (int t = 0; t < kT; ++t)
        scale[t] = 1 / sqrtf(block_sum(squares[t]) / static_cast<float>(in.cols) + in.eps);
    }
    const float2 y = add_up(in, sums, scale);
    if (finishes) op.finish(pair, lane_index(), y.x, y.y, early);
  }
}

}  // namespace thaw
