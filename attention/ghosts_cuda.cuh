// Scores of ghosts: sums of products of 8-bit integers, which are exact. Queries are rounded to 8
// bits as on the CPU (kvstore/ghost.h). A span of 128 tokens at a time: four groups of ghosts.
#pragma once

#include "attention/tiered_cuda.cuh"
#include "kvstore/rotation_cuda.cuh"

namespace thaw {

static_assert(GhostRope::kSpan == kTiledThreads, "a thread has a token of a span");
inline constexpr int kSpanGroups = GhostRope::kSpan / kGhostGroup;

// Word `column` (0 .. 7) of each row of 32 bytes of a packet of eight vectors: 4 codes of each.
template <int kBits>
struct CodeWords {
  std::uint32_t words[kBits];

  __device__ void load(const std::byte* packet, int column) {
#pragma unroll
    for (int i = 0; i < kBits; ++i) words[i] = load_4_once(packet + 32 * i + 4 * column);
  }
  // As code_place() (kvstore/ghost_code.h) has it.
  __device__ std::uint32_t vector(int i) const {
    if constexpr (kBits == 3) {
      const std::uint32_t low = words[i / 4] >> i % 4 * 2 & 0x03030303u;
      return low | (words[2] >> i & 0x01010101u) << 2;
    } else {
      constexpr int kPer = 8 / kBits;
      return words[i / kPer] >> i % kPer * kBits & ((1u << kBits) - 1) * 0x01010101u;
    }
  }
  // Vectors i and i + step hold pairs that belong together: what is in the low halves of both, and
  // in the high halves.
  __device__ int2 four_codes(int i, int step) const {
    const std::uint32_t a = vector(i), b = vector(i + step);
    return make_int2(static_cast<int>(__byte_perm(a, b, 0x5410)),
                     static_cast<int>(__byte_perm(a, b, 0x7632)));
  }
};

// Where score_ghosts() has its queries and the rope's tables in shared memory; numbers of words.
// Turned queries stand there as the rope's table does (SplitRope, kvstore/ghost_rope.h): as f16
// numbers and what is left of them.
struct GhostQueryLayout {
  int n_rows;               // of the table, as whole steps of a product
  int codes;                // four dimensions x query
  int along, across;        // query x pair
  int turned, turned_size;  // two rows x query, then what is left; twice: spans take turns
  int pairs, cubic, rows;   // the tables
  int scale, offset, states, total;

  __host__ __device__ static int code_dim(const GhostFormat& format) {  // as whole steps, too
    return (format.head_dim + 31) / 32 * 32;
  }
  __host__ __device__ GhostQueryLayout(const GhostFormat& format, int n_fast)
      : n_rows(SplitRope::n_rows(n_fast)),
        codes(0),
        along(codes + kTiledQueries * code_dim(format) / 4),
        across(along + kTiledQueries * format.head_dim / 2),
        turned(across + kTiledQueries * format.head_dim / 2),
        turned_size(kTiledQueries * n_rows),
        pairs(turned + 2 * turned_size),
        cubic(pairs + format.head_dim),
        rows(cubic + 2 * format.head_dim),
        scale(rows + n_rows * SplitRope::kStride),
        offset(scale + kTiledQueries),
        states(offset + kTiledQueries),
        total(states + 2 * kTiledWarps * kTiledQueries) {}
};

inline constexpr int kPairUnits = kGhostUnits / 2;  // pairs of a lane

// Begins to copy the rope's tables, which are the same for all spans and never change, and so may
// be read before the previous kernel is done; cp_async_wait<0>() waits for them.
__device__ inline void load_rope_tables(float* shared, const GhostQueryLayout& at,
                                        const TieredProblem& p) {
  const DeviceRope& rope = p.kv.ghosts.rope;
  if (rope.rows == nullptr) return;  // there is no ghost yet
  const auto copy = [](float* to, const void* from, int n_words) {
#pragma unroll 4
    for (int i = 4 * static_cast<int>(threadIdx.x); i < n_words; i += 4 * kTiledThreads)
      cp_async_16_cached(to + i, static_cast<const float*>(from) + i);
  };
  copy(shared + at.pairs, rope.pairs, p.head_dim);
  copy(shared + at.cubic, rope.cubic, 2 * p.head_dim);
  copy(shared + at.rows, rope.rows, at.n_rows * SplitRope::kStride);
  cp_async_commit();
  for (int i = static_cast<int>(threadIdx.x); i < 2 * at.turned_size; i += kTiledThreads)
    shared[at.turned + i] = 0;  // of rows that there are not, as of queries
}

// What a warp reads of a query and of its head's centre, on its way before it is asked for.
struct QueryAhead {
  float x[kGhostUnits];                                                    // the query
  float a[kPairUnits], b[kPairUnits], c[kPairUnits], d[kPairUnits], unit;  // by pair; the centre's

  __device__ void load(const float* shared, const GhostQueryLayout& at, const TieredProblem& p,
                       int kv_head, int query) {
    const float* from = p.q + p.at(kv_head, query);
    const float* centre = p.kv.ghosts.means + static_cast<std::int64_t>(kv_head) * 2 * p.head_dim;
    const auto* pairs = reinterpret_cast<const DeviceRope::Pair*>(shared + at.pairs);
    unit = p.kv.ghosts.units[2 * kv_head];
#pragma unroll
    for (int j = 0; j < kPairUnits; ++j) {
      const DeviceRope::Pair pair = pairs[min(lane_index() + j * kWarp, p.head_dim / 2 - 1)];
      a[j] = from[pair.first], b[j] = from[pair.second];
      c[j] = centre[pair.first], d[j] = centre[pair.second];
    }
#pragma unroll
    for (int j = 0; j < kGhostUnits; ++j) {
      const int i = lane_index() + j * kWarp;
      x[j] = i < p.head_dim ? from[i] : 0.0f;
    }
  }
};

// prepare_query() of kvstore/ghost.h by a warp, with scores as powers of two. noise: of the chunk's
// first query; null: nobody asks for it.
__device__ inline void prepare_ghost_query(float* shared, const GhostQueryLayout& at,
                                           const TieredProblem& p, const QueryAhead& of, int query,
                                           float* noise) {
  const GhostFormat& f = p.kv.ghosts.format;
  const float scale = 1.0f / sqrtf(static_cast<float>(f.head_dim));
  const int lane = lane_index(), half = f.head_dim / 2;
  float x[kGhostUnits], largest = 0, squares = 0;
#pragma unroll
  for (int j = 0; j < kPairUnits; ++j) {
    const int i = lane + j * kWarp;
    if (i >= half) break;
    const float u = of.a[j] * p.scale, v = of.b[j] * p.scale;
    shared[at.along + query * half + i] = fmaf(u, of.c[j], v * of.d[j]);
    shared[at.across + query * half + i] = fmaf(v, of.c[j], -(u * of.d[j]));
  }
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) x[j] = of.x[j] * scale;
  rotate_in_warp(x, f.head_dim);
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j)
    largest = fmaxf(largest, fabsf(x[j])), squares = fmaf(x[j], x[j], squares);
  largest = warp_max(largest), squares = warp_sum(squares);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  auto* codes = reinterpret_cast<std::int8_t*>(shared + at.codes + query);
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int code = __float2int_rn(x[j] * inverse), i = lane + j * kWarp;
    if (i < GhostQueryLayout::code_dim(f))
      codes[i / 4 * 4 * kTiledQueries + i % 4] = static_cast<std::int8_t>(code);
    sum += code;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane != 0) return;
  if (noise) noise[query] = ghost_noise(f.key_bits) * sqrtf(squares) * of.unit;
  // p.scale is `scale` times log2(e)
  shared[at.scale + query] = largest / 127.0f * (p.scale / scale) * of.unit;
  shared[at.offset + query] =
      -(static_cast<float>(1 << (f.key_bits - 1)) - 0.5f) * static_cast<float>(sum);
}

// The angle of the middle of a span, of this lane's pairs.
struct SpanAngle {
  float cosine[kPairUnits], sine[kPairUnits];

  __device__ void load(const DeviceRope& rope, int half, int span) {
    const float* from = rope.middle + static_cast<std::int64_t>(span) * 2 * half;
#pragma unroll
    for (int j = 0; j < kPairUnits; ++j) {
      const int i = lane_index() + j * kWarp;
      cosine[j] = i < half ? from[i] : 0.0f;
      sine[j] = i < half ? from[half + i] : 0.0f;
    }
  }
};

// GhostRope::turn_query() by a warp: what a query's centre scores of a span are made of. A lane
// reads what it has prepared itself, and so waits for nobody.
__device__ inline void turn_ghost_query(float* shared, const GhostQueryLayout& at,
                                        const SpanAngle& angle, int n_fast, int half, int query,
                                        int buffer) {
  const float *unit = shared + at.cubic, *linear = unit + half;
  const float *square = linear + half, *cube = square + half;
  const float* along = shared + at.along + query * half;
  const float* across = shared + at.across + query * half;
  auto* high =
      reinterpret_cast<std::uint32_t*>(shared + at.turned + buffer * at.turned_size) + query;
  std::uint32_t* low = high + at.turned_size / 2;
  const auto put = [&](int pair, float even, float odd) {
    const SplitPair x(even, odd);
    high[pair * kTiledQueries] = x.high, low[pair * kTiledQueries] = x.low;
  };
  float c[4] = {};
#pragma unroll
  for (int j = 0; j < kPairUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    if (i >= half) break;
    const float a = fmaf(along[i], angle.cosine[j], across[i] * angle.sine[j]);
    const float b = fmaf(across[i], angle.cosine[j], -(along[i] * angle.sine[j]));
    if (i < n_fast) put(i, a, b);
    c[0] = fmaf(a, unit[i], c[0]), c[1] = fmaf(b, linear[i], c[1]);
    c[2] = fmaf(-a, square[i], c[2]), c[3] = fmaf(-b, cube[i], c[3]);
  }
  const float even = warp_sums(c) * SplitRope::power_scale(lane_index() / 8);
  const float odd = __shfl_xor_sync(kAllLanes, even, 8);
  if (lane_index() % 16 == 0) put(n_fast + lane_index() / 16, even, odd);
}

// What a lane has of a group's products with queries. A row of a product is two neighbouring
// tokens; a column is a query and one of the two, since the query's numbers stand where that
// token's do, and zeros where the other's. So four queries fill the eight columns.
inline constexpr int kQuad = 4, kQuads = kTiledQueries / kQuad;
inline constexpr int kQueryLanes = kQuad / 2;  // lanes so far apart have the same queries
__device__ inline int token_of_lane(int i) {   // i: 0 or 1
  return i * 16 + lane_index() / 4 * 2 + lane_index() % 4 / kQueryLanes;
}
__device__ inline int query_of_lane() { return lane_index() % kQueryLanes * 2; }  // and the next
// The column that a lane brings along: which of the two tokens, and which query of the four.
__device__ inline int token_of_column() { return lane_index() / 16; }
__device__ inline int query_of_column() { return lane_index() / 4 % kQuad; }

// What a warp reads of a group of ghosts, on its way before it is asked for. Lane 4 g + t reads
// word g of packets t, t + 4, ..: four tokens of a quarter of the dimensions.
template <int kBits>
struct GroupAhead {
  static constexpr int kPackets = 4;  // of heads of up to 128; those behind are read when needed
  std::uint32_t silent = ~0u;         // where all are, there is no more here
  const std::byte* at;
  CodeWords<kBits> packets[kPackets];
  std::byte scales[2];  // as they are stored: who computes with them waits for them

  __device__ void load(const GhostFormat& f) {
    if (silent == ~0u) return;  // the same for all lanes
#pragma unroll
    for (int j = 0; j < kPackets; ++j)
      if (packet_of_lane(j) < f.padded_dim() / 8) load_packet(packets[j], j);
    const auto from = static_cast<std::uint32_t>(f.key_bytes() + f.value_bytes());
#pragma unroll
    for (int i = 0; i < 2; ++i) scales[i] = at[from + static_cast<std::uint32_t>(token_of_lane(i))];
  }

  // Adds to sums. queries: codes of four, four dimensions x query, 0 behind the last.
  __device__ void multiply(int (&sums)[4], const float* queries, int padded_dim) const {
    const int n_packets = padded_dim / 8;
    int of_four[2][4] = {};  // so that one product need not wait for the other
#pragma unroll
    for (int j = 0; j < kPackets; ++j)
      if (4 * j < n_packets) multiply(of_four, packets[j], queries, packet_of_lane(j));
#pragma unroll 1
    for (int j = kPackets; 4 * j < n_packets; ++j) {
      CodeWords<kBits> codes = {};
      if (packet_of_lane(j) < n_packets) load_packet(codes, j);
      multiply(of_four, codes, queries, packet_of_lane(j));
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += of_four[0][i] + of_four[1][i];
  }

 private:
  __device__ static int packet_of_lane(int j) { return lane_index() % 4 + 4 * j; }
  __device__ void load_packet(CodeWords<kBits>& codes, int j) const {
    codes.load(at + packet_of_lane(j) * 32 * kBits, lane_index() / 4);
  }

  // Adds the products of 32 dimensions, a packet of eight a lane. A vector holds two dimensions of
  // a half of the group.
  __device__ static void multiply(int (&sums)[2][4], const CodeWords<kBits>& codes,
                                  const float* queries, int packet) {
    const std::uint32_t low = token_of_column() == 0 ? 0x4410 : 0x1044;
    const std::uint32_t high = token_of_column() == 0 ? 0x4432 : 0x3244;
#pragma unroll
    for (int four = 0; four < 2; ++four) {  // dimensions
      std::uint32_t a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = codes.vector(4 * four + i);
      const std::uint32_t query =
          __float_as_uint(queries[(2 * packet + four) * kTiledQueries + query_of_column()]);
      const std::uint32_t b[2] = {__byte_perm(query, 0, low), __byte_perm(query, 0, high)};
      mma_16x8x32(sums[four], a, b);
    }
  }
};

// Adds to sums: the scores that the turned centre gives four queries at the places of group `group`
// of a span. Three products of the four: the fourth is 2^-22 of the first.
__device__ inline void multiply_centres(float (&sums)[4], const float* shared,
                                        const GhostQueryLayout& at, int buffer, int group,
                                        int quad) {
  constexpr int kStride = SplitRope::kStride;
  const auto* high = reinterpret_cast<const __half*>(shared + at.rows) +
                     (lane_index() / 16 * 8 + lane_index() % 8) * kStride + group * kGhostGroup +
                     lane_index() / 8 % 2 * 16;
  const __half* low = high + at.n_rows * kStride;
  const auto* turned =
      reinterpret_cast<const std::uint32_t*>(shared + at.turned + buffer * at.turned_size) +
      lane_index() % 4 * kTiledQueries + quad * kQuad + query_of_column();
  float of_token[2][4] = {};  // so that one product need not wait for the other
  for (int row = 0; row < at.n_rows; row += 16) {
    const std::uint32_t* from = turned + row / 2 * kTiledQueries;
    const std::uint32_t* rest = from + at.turned_size / 2;
#pragma unroll
    for (int token = 0; token < 2; ++token) {
      const std::uint32_t mine = token == token_of_column() ? ~0u : 0;
      const std::uint32_t b[2] = {from[0] & mine, from[4 * kTiledQueries] & mine};
      const std::uint32_t b_rest[2] = {rest[0] & mine, rest[4 * kTiledQueries] & mine};
      std::uint32_t a[4];
      load_matrices<true>(a, low + row * kStride + 8 * token);
      mma_16x8x16<__half>(of_token[token], a, b);
      load_matrices<true>(a, high + row * kStride + 8 * token);
      mma_16x8x16<__half>(of_token[token], a, b_rest);
      mma_16x8x16<__half>(of_token[token], a, b);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] += of_token[0][i] + of_token[1][i];
}

// A group's tokens that say nothing: hot ones, and those that are not there yet. hot: its word of
// the mask.
__device__ inline std::uint32_t silent_tokens(std::uint32_t hot, int group, int kv_len) {
  const int n = kv_len - group * kGhostGroup;
  return n <= 0 ? ~0u : n < kGhostGroup ? hot | ~0u << n : hot;
}

}  // namespace thaw
