#include "kvstore/ghost_rope.h"

#include <algorithm>
#include <cmath>

#include "device/error.h"
#include "device/half.h"
#include "device/tile_cpu.h"
#include "kvstore/ghost.h"
#include "kvstore/ghost_code.h"

namespace thaw {
namespace {

constexpr double kMiddle = (GhostRope::kSpan - 1) / 2.0;
// Pairs whose angle changes by less from the middle of a span to its ends are cubics there: off by
// at most 0.35^4 / 24 = 6e-4 of their size.
constexpr double kSlow = 0.35;

}  // namespace

GhostRope::GhostRope(const KvRope& rope, int head_dim) {
  const int half = head_dim / 2;
  const auto& frequencies = rope.inverse_frequencies;
  require(frequencies.empty() || std::ssize(frequencies) == half, "KV store: RoPE: expected ", half,
          " frequencies, found ", frequencies.size());
  for (int i = 0; i < half; ++i) {
    const double frequency = frequencies.empty() ? 0.0 : double{frequencies[i]};
    pairs_.push_back(rope.interleaved ? Pair{2 * i, 2 * i + 1, frequency}
                                      : Pair{i, i + half, frequency});
  }
  const auto slow = std::stable_partition(
      pairs_.begin(), pairs_.end(), [](const Pair& p) { return p.frequency * kMiddle > kSlow; });
  n_fast_ = static_cast<int>(slow - pairs_.begin());
  cubic_.resize(static_cast<std::size_t>(4 * half));
  for (int i = n_fast_; i < half; ++i) {
    const double theta = pairs_[i].frequency;
    const double terms[] = {1, theta, theta * theta / 2, theta * theta * theta / 6};
    for (int power = 0; power < 4; ++power)
      cubic_[power * half + i] = static_cast<float>(terms[power]);
  }
  for (int place = 0; place < kSpan; ++place) add_angles(within_, place - kMiddle);
  rows_.resize(static_cast<std::size_t>(n_rows()) * kSpan);
  for (int place = 0; place < kSpan; ++place) {
    const float* angles = &within_[static_cast<std::size_t>(2 * half) * place];
    for (int i = 0; i < n_fast_; ++i) {
      rows_[i * kSpan + place] = angles[i];
      rows_[(n_rows() / 2 + i) * kSpan + place] = angles[half + i];
    }
    for (int power = 0; power < 4; ++power)
      rows_[(power % 2 * n_rows() / 2 + n_fast_ + power / 2) * kSpan + place] =
          static_cast<float>(std::pow(place - kMiddle, power));
  }
}

// Cosines of all pairs' angles after so many tokens, then sines.
void GhostRope::add_angles(std::vector<float>& out, double tokens) const {
  for (const Pair& p : pairs_) out.push_back(static_cast<float>(std::cos(p.frequency * tokens)));
  for (const Pair& p : pairs_) out.push_back(static_cast<float>(std::sin(p.frequency * tokens)));
}

void GhostRope::grow(int n_tokens) {
  for (; n_spans_ * kSpan < n_tokens; ++n_spans_) add_angles(middle_, n_spans_ * kSpan + kMiddle);
}

// direction: 1 or -1.
void GhostRope::turn_by(float* out, const float* x, int token, float direction) const {
  const auto n = static_cast<std::size_t>(n_pairs());
  const float *cosine = &middle_[token / kSpan * 2 * n], *sine = cosine + n;
  const float *within_cos = &within_[token % kSpan * 2 * n], *within_sin = within_cos + n;
  for (int i = 0; i < n_pairs(); ++i) {
    Angle by = sum_of_angles({cosine[i], sine[i]}, {within_cos[i], within_sin[i]});
    by.sine *= direction;
    const Pair& p = pairs_[i];
    const TurnedPair turned = turn_pair(x[p.first], x[p.second], by);
    out[p.first] = turned.first;
    out[p.second] = turned.second;
  }
}

void GhostRope::turn(float* out, const float* x, int token) const { turn_by(out, x, token, 1); }

void GhostRope::turn_back(float* out, const float* x, int token) const {
  turn_by(out, x, token, -1);
}

// A pair of the centre, (a, b), turned by phi, meets a pair of the query, (c, d), as
// (ca + db) cos phi + (da - cb) sin phi.
void GhostRope::prepare(GhostQuery& query, const float* q, const float* centre) const {
  float along[GhostQuery::kMaxDim / 2], across[GhostQuery::kMaxDim / 2];
  for (int i = 0; i < n_pairs(); ++i) {
    const Pair& p = pairs_[i];
    along[i] = q[p.first] * centre[p.first] + q[p.second] * centre[p.second];
    across[i] = q[p.second] * centre[p.first] - q[p.first] * centre[p.second];
  }
  std::copy_n(along, n_pairs(), query.along);
  std::copy_n(across, n_pairs(), query.across);
}

// phi is the angle of the middle of a span, plus theta s with s the place from there: both terms
// above, turned by the former, meet cos theta s and sin theta s, or their cubics. Terms that are
// even in s, then those that are odd.
void GhostRope::turn_query(float* row, const GhostQuery& query, int span) const {
  const int n = n_pairs();
  const float* cosine = &middle_[static_cast<std::size_t>(span) * 2 * n];
  const float *sine = cosine + n, *along = query.along, *across = query.across;
  const float *unit = cubic_.data(), *linear = unit + n, *square = linear + n, *cube = square + n;
  float even[GhostQuery::kMaxDim / 2], odd[GhostQuery::kMaxDim / 2];
  f32x8 c[8] = {};  // four are used
  int i = 0;
  for (; i + 8 <= n; i += 8) {
    const f32x8 cosines = load8(cosine + i), sines = load8(sine + i);
    const f32x8 a = load8(along + i) * cosines + load8(across + i) * sines;
    const f32x8 b = load8(across + i) * cosines - load8(along + i) * sines;
    store8(even + i, a), store8(odd + i, b);
    c[0] += a * load8(unit + i), c[1] += b * load8(linear + i);
    c[2] -= a * load8(square + i), c[3] -= b * load8(cube + i);
  }
  for (; i < n; ++i) {
    const float a = even[i] = along[i] * cosine[i] + across[i] * sine[i];
    const float b = odd[i] = across[i] * cosine[i] - along[i] * sine[i];
    c[0][0] += a * unit[i], c[1][0] += b * linear[i];
    c[2][0] -= a * square[i], c[3][0] -= b * cube[i];
  }
  const f32x8 powers = sums8(c);
  std::copy_n(even, n_fast_, row);
  row += n_fast_;
  row[0] = powers[0], row[1] = powers[2];
  std::copy_n(odd, n_fast_, row + 2);
  row += 2 + n_fast_;
  row[0] = powers[1], row[1] = powers[3];
}

// Places as far before the middle as behind it share both halves of their sums: even terms are the
// same there, odd ones the opposite.
void GhostRope::score_centre(float* scores, std::size_t stride, const GhostQuery* queries,
                             int n_queries, int first_span, int n_spans) const {
  constexpr int kMost = GhostQuery::kMaxDim + 4, kHalf = kSpan / 2;
  const int n_terms = n_rows() / 2;
  float turned[kTileRows * kMost], sums[2][kTileRows * kHalf];
  for (int first = 0; first < n_spans * n_queries; first += kTileRows) {
    const int n = std::min(kTileRows, n_spans * n_queries - first);
    for (int r = 0; r < n; ++r)
      turn_query(turned + r * kMost, queries[(first + r) % n_queries],
                 first_span + (first + r) / n_queries);
    for (int odd = 0; odd < 2; ++odd) {
      std::fill_n(sums[odd], n * kHalf, 0.0f);
      for (int j = 0; j < kHalf; j += kTileCols)
        tile_multiply(sums[odd] + j, kHalf, turned + odd * n_terms, kMost, n,
                      &rows_[odd * n_terms * kSpan + kHalf + j], kSpan, n_terms);
    }
    for (int r = 0; r < n; ++r) {
      const float *even = sums[0] + r * kHalf, *odd = sums[1] + r * kHalf;
      float* middle =
          scores + (first + r) % n_queries * stride + (first + r) / n_queries * kSpan + kHalf;
#pragma omp simd
      for (int j = 0; j < kHalf; ++j) middle[j] = even[j] + odd[j];
#pragma omp simd
      for (int j = 0; j < kHalf; ++j) middle[-1 - j] = even[j] - odd[j];
    }
  }
}

std::int64_t GhostRope::bytes() const {
  return static_cast<std::int64_t>(
      (cubic_.capacity() + within_.capacity() + rows_.capacity() + middle_.capacity()) *
      sizeof(float));
}

std::vector<std::uint16_t> SplitRope::of(const GhostRope::Tables& tables) {
  const int n_fast = tables.n_fast, n_rows = SplitRope::n_rows(n_fast);
  std::vector<std::uint16_t> split(std::size_t{2} * n_rows * kStride);
  for (int row = 0; row < 2 * n_fast + 4; ++row) {
    const int from = row / 2 + row % 2 * (n_fast + 2), power = std::max(row - 2 * n_fast, 0);
    for (int place = 0; place < GhostRope::kSpan; ++place) {
      const float x = tables.rows[static_cast<std::size_t>(from * GhostRope::kSpan + place)] /
                      power_scale(power);
      const int to = row * kStride + place / 16 * 16 + place % 2 * 8 + place % 16 / 2;
      const std::uint16_t high = f32_to_f16(x);
      split[static_cast<std::size_t>(to)] = high;
      split[static_cast<std::size_t>(n_rows * kStride + to)] = f32_to_f16(x - f16_to_f32(high));
    }
  }
  return split;
}

}  // namespace thaw
