// y = W x for a few rows of activations at a time: what decoding spends its time on. One kernel,
// for every weight format and for each way to place and finish the rows (model/ops_cuda.cu).
//
// Weights stream through a ring in shared memory, by asynchronous copies that are several steps
// ahead, so that what a multiprocessor has on its way does not depend on its registers. Activations
// stand in shared memory, too.
#pragma once

#include "model/gemv_staged_cuda.cuh"

namespace thaw {

inline constexpr int kGemvWarps = kGemvThreads / kWarp;
// Blocks of a multiprocessor at the same time: with the ring they ask for more bytes than the
// memory's latency swallows, and leave room for the next kernel's blocks.
inline constexpr int kGemvBlocks = 2;
// Steps of the ring: one is multiplied, the others arrive, as near to 150 units of 16 bytes of a
// row as can be. A block of the widest product and two of another, or, if it is not of kQ6_K, the
// other way round, fit into a multiprocessor's shared memory: kernels overlap.
template <DType kType>
inline constexpr int kGemvStages = 1 +
                                   (150 + WeightStep<kType>::kSize / 2) / WeightStep<kType>::kSize;
inline constexpr std::size_t kGemvStaged = 32768;  // bytes of activations in shared memory, at most

template <DType kType>
constexpr std::size_t kGemvRing = std::size_t{kGemvWarps} * kGemvStages<kType> * 2 *
                                  WeightStep<kType>::kSize * sizeof(uint4);

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
        units_(n_units(kType, cols)),
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
      cp_async_16_once(to + lane_index(), rows_[0].codes + unit, unit < units_);
      cp_async_16_once(to + Step::kSize + lane_index(), rows_[1].codes + unit, unit < units_);
#pragma unroll
      for (int first = 0; first < 2 * Step::kScales; first += kWarp) {
        const int i = first + lane_index();
        if (i >= 2 * Step::kScales) break;
        const bool second = i >= Step::kScales;
        const int at = second ? i - Step::kScales : i, scale = step_ * Step::kScales + at;
        cp_async_16_once(to + (second ? Step::kSize : 0) + kWarp + at,
                         (second ? rows_[1].scales : rows_[0].scales) + scale,
                         scale < scale_units_);
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
    const float4 c[2] = {w[0].weights(q), w[1].weights(q)};
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

// The same with codes. The sum of the products of a block, or of a group of it, is an integer below
// 2^28, put together from the pieces of 16 elements.
template <DType kType, int kT>
__device__ inline void multiply_codes(float (&sums)[2][kT], const uint4* step, void* shared,
                                      int chunk, int unit) {
  using Unit = WeightUnit<kType>;
  constexpr int kHalves = Unit::kElements / 16, kGroups = Unit::kGroups;
  std::uint32_t codes[2][kHalves][4];
  float2 scales[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4* row = step + i * WeightStep<kType>::kSize;
    Unit w;
    w.set(row[lane_index()]), w.set_scale(row + kWarp, lane_index());
#pragma unroll
    for (int q = 0; q < Unit::kElements / 4; ++q) codes[i][q / 4][q % 4] = w.code_bytes(q);
    scales[i] = w.scales();
  }
#pragma unroll
  for (int t = 0; t < kT; ++t) {
    const Staged<kType> x(shared, t, chunk);
    const BlockInfo block = x.blocks[unit * Unit::kElements / 32];
    int high[2][kGroups] = {}, low[2][kGroups] = {};
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      const uint4 x_high = x.piece(unit, half), x_low = x.piece(unit, kHalves + half);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        int &h = high[i][half % kGroups], &l = low[i][half % kGroups];
        h = dot_words(codes[i][half], x_high, h), l = dot_words(codes[i][half], x_low, l);
      }
    }
    const auto add = [&](float& sum, float scale, int dot) {
      sum = fmaf(scale * block.scale, static_cast<float>(dot), sum);
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int dot = (high[i][0] << 8) + low[i][0];
      add(sums[i][t], scales[i].x, dot - Unit::kZero * block.total);
      if constexpr (Unit::kHasMin) add(sums[i][t], scales[i].y, block.total);
      if constexpr (kGroups == 2) add(sums[i][t], scales[i].y, (high[i][1] << 8) + low[i][1]);
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
