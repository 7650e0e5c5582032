#include "attention/exact_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "device/fast_math.h"
#include "device/prefetch_cpu.h"
#include "device/tile_cpu.h"
#include "kvstore/row.h"

namespace thaw {
namespace {

constexpr int kFewRows = 8;    // up to so many query rows, as in decode, dot products are faster
constexpr int kFewBlock = 32;  // then so many stored rows at a time, unpacked within L1
constexpr int kAhead = 16;     // rows from what is unpacked to what is fetched: two streams, which
                               // the CPU follows too late

// keys, values: [row][dim]. What keys of before leave in a last tile of rows is scored, too, and
// not looked at.
void unpack_block(ExactScratch& s, const ExactWork& w, int first, int n, KvType type, int head_dim,
                  int dim) {
  const std::size_t bytes = kv_row_bytes(type, head_dim);
  const int fetched = w.list ? w.end : w.rows->n_rows;
  const auto stored_key = [&](int i) { return w.rows->key(w.head, w.list ? w.list[i] : i); };
  for (int t = 0; t < n; ++t) {
    const std::byte* next = stored_key(std::min(first + t + kAhead, fetched - 1));
    prefetch(next, bytes), prefetch(next + w.rows->value_offset, bytes);
    const std::byte* from = stored_key(first + t);
    for (float* to : {s.keys.data() + t * dim, s.values.data() + t * dim}) {
      load_row(to, from, head_dim, type);
      std::fill(to + head_dim, to + dim, 0.0f);
      from += w.rows->value_offset;
    }
  }
}

// scores: [query row][kExactBlock]. Many rows: keys are turned into tiles of [dim][16 rows].
void score_many(ExactScratch& s, int rows, int n_padded, int dim) {
  std::fill_n(s.scores.data(), rows * kExactBlock, 0.0f);
  for (int t = 0; t < n_padded; t += 8) {
    float* tile = s.keys_t.data() + t / kTileCols * kTileCols * dim + t % kTileCols;
    for (int i = 0; i < dim; i += 8)
      transpose_8x8(tile + i * kTileCols, kTileCols, s.keys.data() + t * dim + i, dim);
  }
  for (int t = 0; t < n_padded; t += kTileCols)
    tile_multiply(s.scores.data() + t, kExactBlock, s.q.data(), dim, rows,
                  s.keys_t.data() + t * dim, kTileCols, dim);
}

// Few rows: dot products with eight keys at a time, whose partial sums are transposed instead.
void score_few(ExactScratch& s, int rows, int n_padded, int dim) {
  for (int t = 0; t < n_padded; t += 8) {
    const float* keys = s.keys.data() + t * dim;
    for (int r = 0; r < rows; ++r) {
      f32x8 sum[8] = {};
      for (int i = 0; i < dim; i += 8) {
        const f32x8 q = load8(s.q.data() + r * dim + i);
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k) sum[k] += q * load8(keys + k * dim + i);
      }
      store8(s.scores.data() + r * kExactBlock + t, sums8(sum));
    }
  }
}

void unpack_queries(ExactScratch& s, const ExactWork& w, int head_dim, int dim) {
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int r = 0; r < w.n_tokens * w.group; ++r) {
    const float* from = w.q + r / w.group * w.q_stride + r % w.group * head_dim;
    for (int i = 0; i < dim; ++i) s.q[r * dim + i] = i < head_dim ? from[i] * scale : 0.0f;
  }
}

// body(p) for every kTilePart of n numbers, the last with -infinity behind them.
template <class Body>
void in_parts(float* numbers, int n, const Body& body) {
  int i = 0;
  for (; i + kTilePart <= n; i += kTilePart) body(numbers + i);
  if (i == n) return;
  float last[kTilePart];
  std::fill_n(last, kTilePart, -std::numeric_limits<float>::infinity());
  std::copy_n(numbers + i, n - i, last);
  body(last);
  std::copy_n(last, n - i, numbers + i);
}

}  // namespace

int padded_dim(int head_dim) { return round_up(head_dim, kTileCols); }

void ExactScratch::reserve(int n_rows, int head_dim) {
  const auto grow = [](std::vector<float>& buffer, int n) {
    buffer.resize(std::max(buffer.size(), static_cast<std::size_t>(n)));
  };
  const int dim = padded_dim(head_dim);
  grow(q, n_rows * dim), grow(scores, n_rows * kExactBlock);
  for (std::vector<float>* buffer : {&keys, &keys_t, &values}) grow(*buffer, kExactBlock * dim);
}

void absorb_scores(SoftmaxState& state, float* o, float* scores, int n, int dim) {
  const float m = std::max(state.m, largest(scores, n));
  if (m == -std::numeric_limits<float>::infinity()) {
    std::fill_n(scores, n, 0.0f);
    return;
  }
  TilePart l = {}, ps = {};
  in_parts(scores, n, [&](float* part) {
    const TilePart below = load_part(part, 0) - m, e = exp_fast(below);
    l += e;
    ps += e * larger(below, TilePart{} - 86.0f);  // not 0 times infinity
    std::memcpy(part, &e, sizeof e);
  });
  const float scale = exp_fast(state.m - m), sum = sum_part(l);
  state = {m, state.l * scale + sum, state.ps * scale + (sum_part(ps) + m * sum)};
  if (scale != 1.0f)
    for (int i = 0; i < dim; ++i) o[i] *= scale;
}

void attend_exactly(SoftmaxState* states, float* o, const ExactWork& w, KvType type, int head_dim,
                    ExactScratch& s) {
  const int rows = w.n_tokens * w.group, dim = padded_dim(head_dim);
  const bool few = rows <= kFewRows;
  const int block = few ? kFewBlock : kExactBlock;
  unpack_queries(s, w, head_dim, dim);
  for (int first = w.begin; first < w.end; first += block) {
    const int n = std::min(block, w.end - first), n_padded = round_up(n, kTileCols);
    unpack_block(s, w, first, n, type, head_dim, dim);
    if (few)
      score_few(s, rows, n_padded, dim);
    else
      score_many(s, rows, n_padded, dim);
    for (int r = 0; r < rows; ++r) {
      float* scores = s.scores.data() + r * kExactBlock;
      const int token = r / w.group, seen = std::clamp(w.first_visible + token - first, 0, n);
      if (w.scores && token >= w.first_scored)
        std::copy_n(scores, seen,
                    w.scores + (token - w.first_scored) * w.score_token_stride +
                        r % w.group * w.score_head_stride + first);
      if (seen > 0) absorb_scores(states[r], o + r * dim, scores, seen, dim);
      std::fill(scores + seen, scores + n, 0.0f);
    }
    for (int i = 0; i < dim; i += kTileCols)
      tile_multiply(o + i, dim, s.scores.data(), kExactBlock, rows, s.values.data() + i, dim, n);
  }
}

}  // namespace thaw
