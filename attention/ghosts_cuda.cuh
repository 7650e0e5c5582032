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
struct GhostQueryLayout {
  int codes;  // four dimensions x query: what four queries are multiplied by is read at once
  int along, across;        // query x pair
  int turned, turned_size;  // row of the rope's table x query, twice: spans take turns
  int pairs, cubic, rows;   // the tables
  int scale, offset, states, total;

  __host__ __device__ GhostQueryLayout(const GhostFormat& format, int n_fast)
      : codes(0),
        along(codes + kTiledQueries * format.padded_dim() / 4),
        across(along + kTiledQueries * format.head_dim / 2),
        turned(across + kTiledQueries * format.head_dim / 2),
        turned_size(kTiledQueries * (2 * n_fast + 4)),
        pairs(turned + 2 * turned_size),
        cubic(pairs + format.head_dim),
        rows(cubic + 2 * format.head_dim),
        scale(rows + GhostRope::kSpan * (2 * n_fast + 4)),
        offset(scale + kTiledQueries),
        states(offset + kTiledQueries),
        total(states + 2 * kTiledWarps * kTiledQueries) {}
};

inline constexpr int kPairUnits = kGhostUnits / 2;  // pairs of a lane

// The rope's tables that are the same for all spans and never change, which is why they may be read
// before the previous kernel is done.
__device__ inline void load_rope_tables(float* shared, const GhostQueryLayout& at,
                                        const TieredProblem& p) {
  const DeviceRope& rope = p.kv.ghosts.rope;
  if (rope.rows == nullptr) return;  // there is no ghost yet
  const int n_pairs = p.head_dim / 4, n_cubic = n_pairs + p.head_dim / 2;
  const int n = n_cubic + (2 * rope.n_fast + 4) * GhostRope::kSpan / 4;
  const auto* pairs = reinterpret_cast<const float4*>(rope.pairs);
  const auto* cubic = reinterpret_cast<const float4*>(rope.cubic) - n_pairs;
  const auto* rows = reinterpret_cast<const float4*>(rope.rows) - n_cubic;
  auto* to = reinterpret_cast<float4*>(shared + at.pairs);  // the others follow
#pragma unroll 8
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kTiledThreads)
    to[i] = (i < n_pairs ? pairs : i < n_cubic ? cubic : rows)[i];
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

// prepare_query() of kvstore/ghost.h by a warp, with scores as powers of two.
__device__ inline void prepare_ghost_query(float* shared, const GhostQueryLayout& at,
                                           const TieredProblem& p, const QueryAhead& of,
                                           int query) {
  const GhostFormat& f = p.kv.ghosts.format;
  const float scale = 1.0f / sqrtf(static_cast<float>(f.head_dim));
  const int lane = lane_index(), half = f.head_dim / 2;
  float x[kGhostUnits], largest = 0;
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
  for (int j = 0; j < kGhostUnits; ++j) largest = fmaxf(largest, fabsf(x[j]));
  largest = warp_max(largest);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  auto* codes = reinterpret_cast<std::int8_t*>(shared + at.codes + query);
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int code = __float2int_rn(x[j] * inverse), i = lane + j * kWarp;
    if (i < f.padded_dim())
      codes[i / 4 * 4 * kTiledQueries + i % 4] = static_cast<std::int8_t>(code);
    sum += code;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane != 0) return;
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
  float* turned = shared + at.turned + buffer * at.turned_size + query;
  float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
#pragma unroll
  for (int j = 0; j < kPairUnits; ++j) {
    const int i = lane_index() + j * kWarp;
    if (i >= half) break;
    const float a = fmaf(along[i], angle.cosine[j], across[i] * angle.sine[j]);
    const float b = fmaf(across[i], angle.cosine[j], -(along[i] * angle.sine[j]));
    if (i < n_fast) {
      turned[i * kTiledQueries] = a;
      turned[(n_fast + i) * kTiledQueries] = b;
    }
    c0 = fmaf(a, unit[i], c0), c1 = fmaf(b, linear[i], c1);
    c2 = fmaf(-a, square[i], c2), c3 = fmaf(-b, cube[i], c3);
  }
  c0 = warp_sum(c0), c1 = warp_sum(c1), c2 = warp_sum(c2), c3 = warp_sum(c3);
  if (lane_index() != 0) return;
  turned += 2 * n_fast * kTiledQueries;
  turned[0] = c0, turned[kTiledQueries] = c1;
  turned[2 * kTiledQueries] = c2, turned[3 * kTiledQueries] = c3;
}

// Of lane 8 s + c: the token of its group whose dot products it ends up with.
__device__ inline int token_of_lane() {
  const int slice = lane_index() / 8, column = lane_index() % 8;
  return 2 * column + slice % 2 + slice / 2 * 16;
}

// What token i of a group has in a row of scales, over their unit.
__device__ inline float scale_at(const std::byte* scales, int i) {
  return scale_of_byte(static_cast<std::uint32_t>(scales[i]));
}

// A packet's share of the sums over dimensions of the codes of a query and of four tokens. queries:
// those of the packet's first dimensions. Queries are taken by four, also those that are not there.
template <int kBits>
__device__ inline void dot_packet(int (&four)[kTiledQueries][4], const CodeWords<kBits>& codes,
                                  const int4* queries, int n_queries) {
#pragma unroll
  for (int part = 0; part < 4; ++part) {  // four dimensions of half of the tokens
    const int half = part % 2, dims = part / 2;
    const int2 u = codes.four_codes(4 * dims + half, 2);
#pragma unroll
    for (int i = 0; i < kTiledQueries; i += 4) {
      if (i >= n_queries) break;
      const int4 q = queries[(kTiledQueries * dims + i) / 4];
      const int of[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        four[i + j][2 * half] = __dp4a(u.x, of[j], four[i + j][2 * half]);
        four[i + j][2 * half + 1] = __dp4a(u.y, of[j], four[i + j][2 * half + 1]);
      }
    }
  }
}

// What a warp reads of a group of ghosts, on its way before it is asked for. Lane 8 s + c reads
// word c of packets s, s + 4, ..: four tokens of a quarter of the dimensions.
template <int kBits>
struct GroupAhead {
  static constexpr int kPackets = 4;  // of heads of up to 128; those behind are read when needed
  std::uint32_t silent = ~0u;         // where all are, there is no more here
  const std::byte* at;
  CodeWords<kBits> packets[kPackets];
  float scale;

  __device__ void load(const GhostFormat& f) {
    if (silent == ~0u) return;  // the same for all lanes
#pragma unroll
    for (int j = 0; j < kPackets; ++j) {
      const int packet = lane_index() / 8 + 4 * j;
      if (packet < f.padded_dim() / 8) packets[j].load(at + packet * 32 * kBits, lane_index() % 8);
    }
    scale = scale_at(at + f.key_bytes() + f.value_bytes(), token_of_lane());
  }

  // dots[query] = the sum over dimensions for token_of_lane(). Lanes trade with those that have the
  // other quarters.
  __device__ void dot(int (&dots)[kTiledQueries], const float* query_codes, int n_queries,
                      int padded_dim) const {
    const auto* queries = reinterpret_cast<const int4*>(query_codes);
    const int slice = lane_index() / 8;
    int four[kTiledQueries][4] = {};
#pragma unroll
    for (int j = 0; j < kPackets; ++j)
      if (slice + 4 * j < padded_dim / 8)
        dot_packet<kBits>(four, packets[j], queries + (slice + 4 * j) * kTiledQueries / 2,
                          n_queries);
    for (int packet = slice + 4 * kPackets; packet < padded_dim / 8; packet += 4) {
      CodeWords<kBits> codes;
      codes.load(at + packet * 32 * kBits, lane_index() % 8);
      dot_packet<kBits>(four, codes, queries + packet * kTiledQueries / 2, n_queries);
    }
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i) {
      if (i >= n_queries) break;
      const bool high = slice >= 2, odd = slice % 2 != 0;
      int a = high ? four[i][2] : four[i][0], b = high ? four[i][3] : four[i][1];
      a += __shfl_xor_sync(kAllLanes, high ? four[i][0] : four[i][2], 16);
      b += __shfl_xor_sync(kAllLanes, high ? four[i][1] : four[i][3], 16);
      dots[i] = (odd ? b : a) + __shfl_xor_sync(kAllLanes, odd ? a : b, 8);
    }
  }
};

// centre[query] = the score of the turned centre at `place` of the span.
__device__ inline void score_centres(float (&centre)[kTiledQueries], const float* turned,
                                     int n_queries, const float* rows, int n_rows, int place) {
#pragma unroll
  for (float& x : centre) x = 0;
#pragma unroll 4
  for (int row = 0; row < n_rows; ++row) {
    const float x = rows[row * GhostRope::kSpan + place];
#pragma unroll
    for (int i = 0; i < kTiledQueries; i += 4) {
      if (i >= n_queries) break;
      const auto t = *reinterpret_cast<const float4*>(turned + row * kTiledQueries + i);
      centre[i] = fmaf(t.x, x, centre[i]), centre[i + 1] = fmaf(t.y, x, centre[i + 1]);
      centre[i + 2] = fmaf(t.z, x, centre[i + 2]), centre[i + 3] = fmaf(t.w, x, centre[i + 3]);
    }
  }
}

// A group's tokens that say nothing: hot ones, and those that are not there yet.
__device__ inline std::uint32_t silent_tokens(const TieredProblem& p, int lane, int group,
                                              int kv_len) {
  const int n = kv_len - group * kGhostGroup;
  if (n <= 0) return ~0u;
  const std::uint32_t hot =
      p.kv.hot.mask[static_cast<std::int64_t>(lane) * p.kv.hot.mask_words + group];
  return n < kGhostGroup ? hot | ~0u << n : hot;
}

}  // namespace thaw
