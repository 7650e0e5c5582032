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

// Where score_ghosts() has its queries in shared memory; numbers of words.
struct GhostQueryLayout {
  int codes, along, across, turned, scale, offset, states, total;

  __host__ __device__ GhostQueryLayout(const GhostFormat& format, int n_fast)
      : codes(0),
        along(codes + kTiledQueries * format.padded_dim() / 4),
        across(along + kTiledQueries * format.head_dim / 2),
        turned(across + kTiledQueries * format.head_dim / 2),
        scale(turned + kTiledQueries * (2 * n_fast + 4)),
        offset(scale + kTiledQueries),
        states(offset + kTiledQueries),
        total(states + 2 * kTiledWarps * kTiledQueries) {}
};

// prepare_query() of kvstore/ghost.h by a warp, with scores as powers of two.
__device__ inline void prepare_ghost_query(float* shared, const GhostQueryLayout& at,
                                           const TieredProblem& p, int kv_head, int query,
                                           int first) {
  const GhostFormat& f = p.kv.ghosts.format;
  const float* from = p.q + p.at(kv_head, first + query);
  const float* centre = p.kv.ghosts.means + static_cast<std::int64_t>(kv_head) * 2 * f.head_dim;
  const float scale = 1.0f / sqrtf(static_cast<float>(f.head_dim));
  const int lane = lane_index(), half = f.head_dim / 2;
  for (int i = lane; i < half; i += kWarp) {
    const DeviceRope::Pair pair = p.kv.ghosts.rope.pairs[i];
    const float a = from[pair.first] * p.scale, b = from[pair.second] * p.scale;
    const float c = centre[pair.first], d = centre[pair.second];
    shared[at.along + query * half + i] = fmaf(a, c, b * d);
    shared[at.across + query * half + i] = fmaf(b, c, -(a * d));
  }
  float x[kGhostUnits], largest = 0;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int i = lane + j * kWarp;
    x[j] = i < f.head_dim ? from[i] * scale : 0.0f;
  }
  rotate_in_warp(x, f.head_dim);
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) largest = fmaxf(largest, fabsf(x[j]));
  largest = warp_max(largest);
  const float inverse = largest > 0 ? 127.0f / largest : 0.0f;
  auto* codes = reinterpret_cast<std::int8_t*>(shared + at.codes) + query * f.padded_dim();
  int sum = 0;
#pragma unroll
  for (int j = 0; j < kGhostUnits; ++j) {
    const int code = __float2int_rn(x[j] * inverse), i = lane + j * kWarp;
    if (i < f.padded_dim()) codes[i] = static_cast<std::int8_t>(code);
    sum += code;
  }
  sum = __reduce_add_sync(kAllLanes, sum);
  if (lane != 0) return;
  // p.scale is `scale` times log2(e)
  shared[at.scale + query] = largest / 127.0f * (p.scale / scale) * p.kv.ghosts.units[2 * kv_head];
  shared[at.offset + query] =
      -(static_cast<float>(1 << (f.key_bits - 1)) - 0.5f) * static_cast<float>(sum);
}

// GhostRope::turn_query() by a warp: what a query's centre scores of a span are made of. A lane
// reads what it has prepared itself, and so waits for nobody.
__device__ inline void turn_ghost_query(float* shared, const GhostQueryLayout& at,
                                        const DeviceRope& rope, int half, int query, int span) {
  const float* cosine = rope.middle + static_cast<std::int64_t>(span) * 2 * half;
  const float *sine = cosine + half, *unit = rope.cubic, *linear = unit + half;
  const float *square = linear + half, *cube = square + half;
  const float* along = shared + at.along + query * half;
  const float* across = shared + at.across + query * half;
  float* turned = shared + at.turned + query;
  float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
  for (int i = lane_index(); i < half; i += kWarp) {
    const float a = fmaf(along[i], cosine[i], across[i] * sine[i]);
    const float b = fmaf(across[i], cosine[i], -(along[i] * sine[i]));
    if (i < rope.n_fast) {
      turned[i * kTiledQueries] = a;
      turned[(rope.n_fast + i) * kTiledQueries] = b;
    }
    c0 = fmaf(a, unit[i], c0), c1 = fmaf(b, linear[i], c1);
    c2 = fmaf(-a, square[i], c2), c3 = fmaf(-b, cube[i], c3);
  }
  c0 = warp_sum(c0), c1 = warp_sum(c1), c2 = warp_sum(c2), c3 = warp_sum(c3);
  if (lane_index() != 0) return;
  turned += 2 * rope.n_fast * kTiledQueries;
  turned[0] = c0, turned[kTiledQueries] = c1;
  turned[2 * kTiledQueries] = c2, turned[3 * kTiledQueries] = c3;
}

// Of lane 8 s + c: the token of its group whose dot products it ends up with.
__device__ inline int token_of_lane() {
  const int slice = lane_index() / 8, column = lane_index() % 8;
  return 2 * column + slice % 2 + slice / 2 * 16;
}

// dots[query] = sum over dimensions of the codes of a query and of token_of_lane(). Lane 8 s + c
// reads word c of packets s, s + 4, ..: four tokens of a quarter of the dimensions, and then trades
// with the lanes that have the other quarters.
template <int kBits>
__device__ inline void dot_ghosts(int (&dots)[kTiledQueries], const int* queries, int n_queries,
                                  const std::byte* group, int padded_dim) {
  const int slice = lane_index() / 8, column = lane_index() % 8;
  int four[kTiledQueries][4] = {};
  for (int packet = slice; packet < padded_dim / 8; packet += 4) {
    CodeWords<kBits> codes;
    codes.load(group + packet * 32 * kBits, column);
#pragma unroll
    for (int part = 0; part < 4; ++part) {  // four dimensions of half of the tokens
      const int half = part % 2, dims = part / 2;
      const int2 u = codes.four_codes(4 * dims + half, 2);
#pragma unroll
      for (int i = 0; i < kTiledQueries; ++i) {
        if (i >= n_queries) break;
        const int q = queries[i * padded_dim / 4 + 2 * packet + dims];
        four[i][2 * half] = __dp4a(u.x, q, four[i][2 * half]);
        four[i][2 * half + 1] = __dp4a(u.y, q, four[i][2 * half + 1]);
      }
    }
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

// centre[query] = the score of the turned centre at `place` of the span.
__device__ inline void score_centres(float (&centre)[kTiledQueries], const float* turned,
                                     int n_queries, const DeviceRope& rope, int place) {
#pragma unroll
  for (float& x : centre) x = 0;
#pragma unroll 4
  for (int row = 0; row < 2 * rope.n_fast + 4; ++row) {
    const float x = rope.rows[row * GhostRope::kSpan + place];
#pragma unroll
    for (int i = 0; i < kTiledQueries; ++i) {
      if (i >= n_queries) break;
      centre[i] = fmaf(turned[row * kTiledQueries + i], x, centre[i]);
    }
  }
}

// What token i of a group has in a row of scales, over their unit.
__device__ inline float scale_at(const std::byte* scales, int i) {
  return scale_of_byte(static_cast<std::uint32_t>(scales[i]));
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

__device__ inline int n_ghosts(const TieredProblem& p, int kv_len) {
  return kv_len >= p.kv.ghosts.centre_tokens ? kv_len : 0;
}

// m and l of the lanes' tokens into p.scored.
__device__ inline void join_scores(const TieredProblem& p, float* states, int head, int n_queries,
                                   const float (&m)[kTiledQueries],
                                   const float (&l)[kTiledQueries]) {
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    const float peak = warp_max(m[i]), sum = warp_sum(l[i] * power(m[i], peak));
    float* state = states + 2 * (warp_index() * kTiledQueries + i);
    if (lane_index() == 0) state[0] = peak, state[1] = sum;
  }
  __syncthreads();  // all warps' states are there
  const int query = static_cast<int>(threadIdx.x);
  if (query >= n_queries) return;
  PowerState all;
  for (int w = 0; w < kTiledWarps; ++w) all.m = fmaxf(all.m, states[2 * (w * 8 + query)]);
  for (int w = 0; w < kTiledWarps; ++w)
    all.l += states[2 * (w * 8 + query) + 1] * power(states[2 * (w * 8 + query)], all.m);
  p.scored.set_state(head + query, static_cast<int>(blockIdx.x), all);
}

// The scores of a span, and what they add to m and l of this lane's tokens.
template <int kBits>
__device__ inline void score_span(const TieredProblem& p, const float* shared,
                                  const GhostQueryLayout& at, int kv_head, int head, int n_queries,
                                  int span, int kv_len, float (&m)[kTiledQueries],
                                  float (&l)[kTiledQueries]) {
  const GhostFormat& f = p.kv.ghosts.format;
  const int group = span * kSpanGroups + warp_index(), token = token_of_lane();
  const std::uint32_t silent = silent_tokens(p, kv_head / p.kv.hot.lane_heads, group, kv_len);
  int dots[kTiledQueries] = {};
  float centre[kTiledQueries] = {}, scale = 0;
  if (silent != ~0u) {  // the same for all lanes
    const std::byte* ghosts = p.kv.ghosts.group(kv_head, group);
    scale = scale_at(ghosts + f.key_bytes() + f.value_bytes(), token);
    dot_ghosts<kBits>(dots, reinterpret_cast<const int*>(shared + at.codes), n_queries, ghosts,
                      f.padded_dim());
    score_centres(centre, shared + at.turned, n_queries, p.kv.ghosts.rope,
                  warp_index() * kGhostGroup + token);
  }
  float* scores = p.ghost_scores + static_cast<std::int64_t>(head) * p.ghost_stride +
                  group * kGhostGroup + token;
#pragma unroll
  for (int i = 0; i < kTiledQueries; ++i) {
    if (i >= n_queries) break;
    const float product = static_cast<float>(dots[i]) + shared[at.offset + i];
    const float s = (silent >> token & 1u) != 0
                        ? kLowest
                        : fmaf(shared[at.scale + i] * scale, product, centre[i]);
    scores[static_cast<std::int64_t>(i) * p.ghost_stride] = s;
    const float peak = fmaxf(m[i], s);
    l[i] = l[i] * power(m[i], peak) + power(s, peak);
    m[i] = peak;
  }
}

// Computes  scores of up to kTiledQueries queries of a k/v head with the ghosts of its tokens,
//           kLowest for hot ones; m and l of each split
// Grid      splits of the spans x k/v heads x chunks of queries
// Block     kTiledThreads; a span at a time, a warp for each of its groups
// Shared    GhostQueryLayout
// Bytes     reads key codes and their scales once a chunk, but not those of groups that are all
//           hot, and the rows of the rope's table a span; writes a score a query and token
template <int kBits>
__global__ void __launch_bounds__(kTiledThreads, kTiledBlocks) score_ghosts(TieredProblem p) {
  const DeviceGhosts& ghosts = p.kv.ghosts;
  const GhostQueryLayout at(ghosts.format, ghosts.rope.n_fast);
  float* shared = dynamic_shared<float>();
  const int kv_head = static_cast<int>(blockIdx.y);
  const int first = static_cast<int>(blockIdx.z) * kTiledQueries;
  const int n_queries = min(kTiledQueries, p.group - first), head = kv_head * p.group + first;
  const int half = ghosts.format.head_dim / 2;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int kv_len = *p.kv.kv_len, split = static_cast<int>(blockIdx.x);
  const Share share =
      share_of(n_ghosts(p, kv_len), GhostRope::kSpan, split, static_cast<int>(gridDim.x));
  float m[kTiledQueries], l[kTiledQueries] = {};
#pragma unroll
  for (float& x : m) x = kLowest;

  for (int query = warp_index(); query < n_queries && share.begin < share.end; query += kTiledWarps)
    prepare_ghost_query(shared, at, p, kv_head, query, first);
  for (int token = share.begin; token < share.end; token += GhostRope::kSpan) {
    const int span = token / GhostRope::kSpan;
    for (int query = warp_index(); query < n_queries; query += kTiledWarps)
      turn_ghost_query(shared, at, ghosts.rope, half, query, span);
    __syncthreads();  // all queries are turned
    score_span<kBits>(p, shared, at, kv_head, head, n_queries, span, kv_len, m, l);
    __syncthreads();  // and read: the next span turns them anew
  }
  join_scores(p, shared + at.states, head, n_queries, m, l);
}

}  // namespace thaw
