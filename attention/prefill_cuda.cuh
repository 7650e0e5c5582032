// Attention of many queries on tensor cores (FlashAttention-2, 2307.08691): a block takes a tile of
// queries through the tokens a tile at a time, while the next tile of keys and values arrives.
#pragma once

#include "attention/exact_cuda.cuh"
#include "kvstore/row_cuda.cuh"

namespace thaw {

inline constexpr int kPrefillThreads = 128;
inline constexpr int kTileQueries = 64;  // 16 a warp
inline constexpr int kTileTokens = 64;

// What numbers are multiplied as.
template <KvType kType>
using TileNumber = std::conditional_t<kType == KvType::kBF16, __nv_bfloat16, __half>;

// Rows of kDim numbers and 16 bytes more, so that eight rows that lie below each other stand in
// different banks.
template <int kDim>
constexpr int kTileStride = kDim + 8;
template <int kDim>
constexpr int kTileNumbers = kTileTokens* kTileStride<kDim>;
template <int kDim>
constexpr std::size_t kPrefillShared = std::size_t{4} * kTileNumbers<kDim> * 2;  // 2 x keys, values

// Begins to copy the keys and values of a tile into `tile`; zeros from token `end` on and beyond
// head_dim. What is not 16 bits wide is unpacked on the way.
template <KvType kType, int kDim>
__device__ inline void fetch_tile(TileNumber<kType>* tile, const ExactProblem& p, int kv_head,
                                  int first, int end) {
  constexpr int kUnits = kDim / kRowUnit;
  const std::byte* key = p.kv.rows.key(kv_head, first);  // the tile stands in one page
#pragma unroll(RowUnit <kType>::kWide ? 4 : 1)
  for (int n = static_cast<int>(threadIdx.x); n < 2 * kTileTokens * kUnits; n += kPrefillThreads) {
    const int unit = n % kUnits, row = n / kUnits % kTileTokens, which = n / (kUnits * kTileTokens);
    const bool valid = first + row < end && unit * kRowUnit < p.head_dim;
    const std::byte* from =
        key + row * p.kv.rows.row_bytes + (which == 1 ? p.kv.rows.value_offset : 0);
    auto* to = tile + which * kTileNumbers<kDim> + row * kTileStride<kDim> + unit * kRowUnit;
    if constexpr (RowUnit<kType>::kWide) {
      cp_async_16(static_cast<void*>(to), valid ? from + unit * 16 : key, valid);
    } else {
      uint4 packed = make_uint4(0, 0, 0, 0);
      if (valid) {
        RowUnit<kType> stored;
        float x[kRowUnit];
        stored.load(from, unit);
        stored.values(x);
        packed = make_uint4(pack2<__half>(x[0], x[1]), pack2<__half>(x[2], x[3]),
                            pack2<__half>(x[4], x[5]), pack2<__half>(x[6], x[7]));
      }
      store_16(to, packed);
    }
  }
}

// A lane's part of 16 queries: of rows g and g + 8 (g = lane / 4), as mma_16x8x16 has them.
template <KvType kType, int kDim>
struct PrefillState {
  using T = TileNumber<kType>;
  std::uint32_t q[kDim / 16][4];
  float o[kDim / 8][4];
  float m[2], l[2];
  int visible[2];

  __device__ void load(const ExactProblem& p, int kv_head, int first_query, int kv_len) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first_query + g + 8 * i;
      visible[i] = p.visible(kv_len, query);
      m[i] = kLowest, l[i] = 0;
      const float* from = p.q + (visible[i] > 0 ? p.at(kv_head, query) : 0);
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
        const int d = 8 * c + 2 * t;
        const bool exists = visible[i] > 0 && d < p.head_dim;
        q[c / 2][i + c % 2 * 2] =
            pack2<T>(exists ? from[d] * p.scale : 0.0f, exists ? from[d + 1] * p.scale : 0.0f);
      }
    }
#pragma unroll
    for (auto& tile : o)
      for (float& x : tile) x = 0;
  }

  // s (16 x kTileTokens) = Q K^T
  __device__ void score(float (&s)[kTileTokens / 8][4], const T* keys) const {
    const int row = lane_index() % 8, matrix = lane_index() / 8;
#pragma unroll
    for (int n = 0; n < kTileTokens / 8; n += 2) {
#pragma unroll
      for (int j = 0; j < 8; ++j) s[n + j / 4][j % 4] = 0;
#pragma unroll
      for (int c = 0; c < kDim / 16; ++c) {
        std::uint32_t k[4];  // tokens 8 n.. and 8 n + 8.., each dims 16 c.. and 16 c + 8..
        load_matrices(
            k, keys + (8 * n + matrix / 2 * 8 + row) * kTileStride<kDim> + 16 * c + matrix % 2 * 8);
        mma_16x8x16<T>(s[n], q[c], {k[0], k[1]});
        mma_16x8x16<T>(s[n + 1], q[c], {k[2], k[3]});
      }
    }
  }

  // Scores of tokens from `first` become e^(s - m); what was summed before is scaled to the new m.
  __device__ void weigh(float (&s)[kTileTokens / 8][4], int first) {
    const int t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float peak = m[i];
#pragma unroll
      for (int n = 0; n < kTileTokens / 8; ++n) {
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
          if (first + 8 * n + 2 * t + j % 2 >= visible[i]) s[n][j] = kLowest;
          peak = fmaxf(peak, s[n][j]);
        }
      }
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
      const float kept = power(m[i], peak);
      m[i] = peak;
      l[i] *= kept;
#pragma unroll
      for (auto& tile : o) tile[2 * i] *= kept, tile[2 * i + 1] *= kept;
#pragma unroll
      for (int n = 0; n < kTileTokens / 8; ++n) {
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) l[i] += s[n][j] = power(s[n][j], peak);
      }
    }
  }

  // o += P V
  __device__ void add_values(const float (&s)[kTileTokens / 8][4], const T* values) {
    const int row = lane_index() % 8, matrix = lane_index() / 8;
#pragma unroll
    for (int c = 0; c < kTileTokens / 16; ++c) {
      const std::uint32_t p[4] = {
          pack2<T>(s[2 * c][0], s[2 * c][1]), pack2<T>(s[2 * c][2], s[2 * c][3]),
          pack2<T>(s[2 * c + 1][0], s[2 * c + 1][1]), pack2<T>(s[2 * c + 1][2], s[2 * c + 1][3])};
#pragma unroll
      for (int d = 0; d < kDim / 8; d += 2) {
        std::uint32_t v[4];  // dims 8 d.. and 8 d + 8.., each tokens 16 c.. and 16 c + 8..
        load_matrices<true>(v, values + (16 * c + matrix % 2 * 8 + row) * kTileStride<kDim> +
                                   8 * d + matrix / 2 * 8);
        mma_16x8x16<T>(o[d], p, {v[0], v[1]});
        mma_16x8x16<T>(o[d + 1], p, {v[2], v[3]});
      }
    }
  }

  __device__ void store(const ExactProblem& p, int kv_head, int first_query) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 1);
      l[i] += __shfl_xor_sync(kAllLanes, l[i], 2);
      if (visible[i] == 0) continue;
      float* to = p.o + p.at(kv_head, first_query + g + 8 * i);
#pragma unroll
      for (int c = 0; c < kDim / 8; ++c) {
        const int d = 8 * c + 2 * t;
        if (d < p.head_dim) to[d] = o[c][2 * i] / l[i], to[d + 1] = o[c][2 * i + 1] / l[i];
      }
    }
  }
};

// Computes  o = softmax(q K^T / sqrt(head_dim)) V of kTileQueries queries of a k/v head, each over
//           the tokens that it sees; head_dim <= kDim
// Grid      tiles of queries x k/v heads; the last tile, which sees most, first
// Block     kPrefillThreads; a warp has 16 queries
// Shared    kPrefillShared<kDim>: two tiles of keys and values
// Bytes     reads q, and the keys and values that the tile sees; writes o
template <KvType kType, int kDim>
__global__ void __launch_bounds__(kPrefillThreads, kDim <= 96 ? 3 : 2)
    prefill_attention(ExactProblem p) {
  auto* tiles = dynamic_shared<TileNumber<kType>>();
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, kv_head = static_cast<int>(blockIdx.y);
  const int first_query = static_cast<int>(gridDim.x - 1 - blockIdx.x) * kTileQueries;
  const int last_query = min(first_query + kTileQueries, p.n_queries()) - 1;
  const int end = p.visible(kv_len, last_query);

  PrefillState<kType, kDim> state;
  state.load(p, kv_head, first_query + 16 * warp_index(), kv_len);
  fetch_tile<kType, kDim>(tiles, p, kv_head, 0, end);
  cp_async_commit();
  for (int first = 0, turn = 0; first < end; first += kTileTokens, turn ^= 1) {
    TileNumber<kType>* tile = tiles + turn * 2 * kTileNumbers<kDim>;
    if (first + kTileTokens < end)
      fetch_tile<kType, kDim>(tiles + (turn ^ 1) * 2 * kTileNumbers<kDim>, p, kv_head,
                              first + kTileTokens, end);
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();  // all threads' copies of this tile have arrived
    float s[kTileTokens / 8][4];
    state.score(s, tile);
    state.weigh(s, first);
    state.add_values(s, tile + kTileNumbers<kDim>);
    __syncthreads();  // nobody reads this tile any more: the turn after the next overwrites it
  }
  state.store(p, kv_head, first_query + 16 * warp_index());
}

}  // namespace thaw
