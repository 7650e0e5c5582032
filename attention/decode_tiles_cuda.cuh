// Decode attention over f16 rows on tensor cores, for which a plain kernel spends ten times the
// instructions. Nothing is lost by it: a query is split into an f16 number and the f16 rest, which
// stand in rows g and g + 8 of the same product, and so is a probability.
#pragma once

#include <algorithm>

#include "attention/decode_cuda.cuh"
#include "attention/prefill_cuda.cuh"

namespace thaw {

inline constexpr int kDecodeTileQueries = 8;
inline constexpr int kDecodeTileTokens = 16;  // of a warp at a time
inline constexpr int kDecodeTileStages = 2;   // one is multiplied while the next arrives
inline constexpr int kDecodeWarps = kDecodeThreads / kWarp;

template <int kDim>
constexpr int kDecodeTileNumbers = kDecodeTileTokens* kTileStride<kDim>;
template <int kDim>
constexpr std::size_t kDecodeTileShared =
    std::max(std::size_t{kDecodeWarps} * kDecodeTileStages * 2 * kDecodeTileNumbers<kDim> * 2,
             kJoinShared<kDecodeWarps, kDecodeTileQueries, kDim>);

// A lane's part of a warp's 8 queries: of query g = lane / 4, as mma_16x8x16 has rows g and g + 8.
template <int kDim>
struct DecodeTile {
  std::uint32_t q[kDim / 16][4];
  float o[kDim / 8][4];
  float m, l;
  int visible;

  __device__ void load(const DecodeProblem& p, int kv_head, int first_query, int kv_len) {
    const int query = first_query + lane_index() / 4, t = lane_index() % 4;
    visible = p.visible(kv_len, query);
    m = kLowest, l = 0;
    const float* from = p.q + (visible > 0 ? p.at(kv_head, query) : 0);
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c) {
      const int d = 8 * c + 2 * t;
      const bool exists = visible > 0 && d < p.head_dim;
      const SplitPair x(exists ? from[d] * p.scale : 0.0f, exists ? from[d + 1] * p.scale : 0.0f);
      q[c / 2][c % 2 * 2] = x.high, q[c / 2][c % 2 * 2 + 1] = x.low;
    }
#pragma unroll
    for (auto& row : o)
      for (float& x : row) x = 0;
  }

  // s[n][j]: of this lane's query and token 8 n + 2 t + j.
  __device__ void score(float (&s)[2][2], const __half* keys) const {
    const int row = lane_index() % 8, matrix = lane_index() / 8;
    float d[2][4] = {};
#pragma unroll
    for (int c = 0; c < kDim / 16; ++c) {
      std::uint32_t k[4];  // tokens 0.. and 8.., each dims 16 c.. and 16 c + 8..
      load_matrices(k, keys + (matrix / 2 * 8 + row) * kTileStride<kDim> + 16 * c + matrix % 2 * 8);
      mma_16x8x16<__half>(d[0], q[c], {k[0], k[1]});
      mma_16x8x16<__half>(d[1], q[c], {k[2], k[3]});
    }
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) s[n][j] = d[n][j] + d[n][j + 2];
  }

  // Scores of tokens from `first` become e^(s - m); what was summed before is scaled to the new m.
  __device__ void weigh(float (&s)[2][2], int first) {
    float peak = m;
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (first + 8 * n + 2 * (lane_index() % 4) + j >= visible) s[n][j] = kLowest;
        peak = fmaxf(peak, s[n][j]);
      }
    }
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
    peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
    const float kept = power(m, peak);
    m = peak, l *= kept;
#pragma unroll
    for (auto& row : o)
#pragma unroll
      for (float& x : row) x *= kept;
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int j = 0; j < 2; ++j) l += s[n][j] = power(s[n][j], peak);
  }

  // o += P V
  __device__ void add_values(const float (&s)[2][2], const __half* values) {
    const int row = lane_index() % 8, matrix = lane_index() / 8;
    const SplitPair first(s[0][0], s[0][1]), second(s[1][0], s[1][1]);
    const std::uint32_t p[4] = {first.high, first.low, second.high, second.low};
#pragma unroll
    for (int d = 0; d < kDim / 8; d += 2) {
      std::uint32_t v[4];  // dims 8 d.. and 8 d + 8.., each tokens 0.. and 8..
      load_matrices<true>(
          v, values + (matrix % 2 * 8 + row) * kTileStride<kDim> + 8 * d + matrix / 2 * 8);
      mma_16x8x16<__half>(o[d], p, {v[0], v[1]});
      mma_16x8x16<__half>(o[d + 1], p, {v[2], v[3]});
    }
  }

  // Where join_teams() expects them: this warp's states and sums.
  __device__ void store(float* sums, float* states) {
    const int query = lane_index() / 4, t = lane_index() % 4;
    l += __shfl_xor_sync(kAllLanes, l, 1);
    l += __shfl_xor_sync(kAllLanes, l, 2);
    if (t == 0) states[2 * query] = m, states[2 * query + 1] = l;
#pragma unroll
    for (int c = 0; c < kDim / 8; ++c) {
      float* to = sums + query * kDim + 8 * c + 2 * t;
      to[0] = o[c][0] + o[c][2], to[1] = o[c][1] + o[c][3];
    }
  }
};

// Begins to copy a warp's tile of keys, and of values after them; zeros from token `end` on and
// beyond head_dim.
template <int kDim>
__device__ inline void fetch_decode_tile(__half* tile, const DecodeProblem& p, int kv_head,
                                         int first, int end) {
  constexpr int kUnits = kDim / kRowUnit;
  if (first < end) {
    const std::byte* key = p.kv.rows.key(kv_head, first);  // the tile stands in one page
#pragma unroll 4
    for (int n = lane_index(); n < 2 * kDecodeTileTokens * kUnits; n += kWarp) {
      const int unit = n % kUnits, row = n / kUnits % kDecodeTileTokens;
      const bool is_value = n >= kDecodeTileTokens * kUnits;
      const bool valid = first + row < end && unit * kRowUnit < p.head_dim;
      const std::byte* from =
          key + row * p.kv.rows.row_bytes + (is_value ? p.kv.rows.value_offset : 0) + unit * 16;
      __half* to = tile + (is_value ? kDecodeTileNumbers<kDim> : 0) + row * kTileStride<kDim>;
      cp_async_16_once(static_cast<void*>(to + unit * kRowUnit), valid ? from : key, valid);
    }
  }
  cp_async_commit();
}

// Computes  as decode_attention, of f16 rows with head_dim <= kDim
// Grid      splits of the tokens x k/v heads x chunks of kDecodeTileQueries queries
// Block     kDecodeThreads; warps take tiles of kDecodeTileTokens tokens in turns
// Shared    kDecodeTileShared<kDim>: each warp's tiles, then what warps join
// Bytes     as decode_attention
template <int kDim>
__global__ void __launch_bounds__(kDecodeThreads, kDecodeBlocks + 1) decode_tiles(DecodeProblem p) {
  constexpr int kTurn = kDecodeWarps * kDecodeTileTokens;
  constexpr int kTile = 2 * kDecodeTileNumbers<kDim>;
  __half* tiles = dynamic_shared<__half>() + warp_index() * kDecodeTileStages * kTile;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, kv_head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(blockIdx.z) * kDecodeTileQueries;
  const DecodeSplit split(kv_len, kTurn);
  if (split.begin >= split.end) return;

  const int begin = split.begin + warp_index() * kDecodeTileTokens;
  fetch_decode_tile<kDim>(tiles, p, kv_head, begin, split.end);
  DecodeTile<kDim> state;
  state.load(p, kv_head, first_query, kv_len);
  for (int first = begin, turn = 0; first < split.end; first += kTurn, turn ^= 1) {
    fetch_decode_tile<kDim>(tiles + (turn ^ 1) * kTile, p, kv_head, first + kTurn, split.end);
    cp_async_wait<1>();
    __syncwarp();  // all lanes' copies of this tile have arrived
    float s[2][2];
    state.score(s, tiles + turn * kTile);
    state.weigh(s, first);
    state.add_values(s, tiles + turn * kTile + kDecodeTileNumbers<kDim>);
    __syncwarp();  // nobody reads this tile any more: the turn after the next overwrites it
  }
  __syncthreads();  // nobody reads tiles any more, and none is on its way
  float* sums = dynamic_shared<float>();
  float* states = sums + kDecodeWarps * kDecodeTileQueries * kDim;
  state.store(sums + warp_index() * kDecodeTileQueries * kDim,
              states + warp_index() * kDecodeTileQueries * 2);
  join_teams<kDecodeWarps, kDecodeTileQueries, kDim>(p, kv_head, first_query, split.n_splits);
  if (split.n_splits > 1) join_splits<kDecodeTileQueries>(p, kv_head, first_query, split.n_splits);
}

}  // namespace thaw
