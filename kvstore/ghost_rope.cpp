#include "kvstore/ghost_rope.h"

#include <algorithm>
#include <cmath>

#include "device/error.h"
#include "device/tile_cpu.h"
#include "kvstore/ghost.h"

namespace thaw {
namespace {

constexpr int kQueries = 6;
constexpr double kMiddle = (kGhostGroup - 1) / 2.0;
// Pairs whose angle changes by less from the middle of a group to its ends are cubics there: off by
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
  rows_.resize(static_cast<std::size_t>(n_rows()) * kGhostGroup);
  for (int i = 0; i < half; ++i) {
    const double theta = pairs_[i].frequency;
    for (const double c : {theta, theta * theta / 2, theta * theta * theta / 6})
      cubic_.push_back(static_cast<float>(c));
    for (int j = 0; j < kGhostGroup; ++j)
      within_.push_back(static_cast<float>(std::cos(theta * (j - kMiddle))));
    for (int j = 0; j < kGhostGroup; ++j)
      within_.push_back(static_cast<float>(std::sin(theta * (j - kMiddle))));
  }
  for (int i = 0; i < n_fast_; ++i) {
    std::copy_n(&within_[2 * i * kGhostGroup], kGhostGroup, &rows_[i * kGhostGroup]);
    std::copy_n(&within_[(2 * i + 1) * kGhostGroup], kGhostGroup,
                &rows_[(n_fast_ + i) * kGhostGroup]);
  }
  for (int power = 0; power < 4; ++power)
    for (int j = 0; j < kGhostGroup; ++j)
      rows_[(2 * n_fast_ + power) * kGhostGroup + j] =
          static_cast<float>(std::pow(j - kMiddle, power));
}

void GhostRope::grow(int n_tokens) {
  const int n_groups = (n_tokens + kGhostGroup - 1) / kGhostGroup;
  for (int group = static_cast<int>(middle_.size()) / std::max(1, 2 * n_pairs()); group < n_groups;
       ++group) {
    const double position = group * kGhostGroup + kMiddle;
    for (const Pair& p : pairs_)
      middle_.push_back(static_cast<float>(std::cos(p.frequency * position)));
    for (const Pair& p : pairs_)
      middle_.push_back(static_cast<float>(std::sin(p.frequency * position)));
  }
}

// direction: 1 or -1.
void GhostRope::turn_by(float* out, const float* x, int token, float direction) const {
  const float* cosine = &middle_[static_cast<std::size_t>(token / kGhostGroup) * 2 * n_pairs()];
  const float *sine = cosine + n_pairs(), *within = &within_[token % kGhostGroup];
  for (int i = 0; i < n_pairs(); ++i) {
    const float c = within[2 * i * kGhostGroup], s = within[(2 * i + 1) * kGhostGroup];
    const float cos = cosine[i] * c - sine[i] * s;
    const float sin = direction * (sine[i] * c + cosine[i] * s);
    const Pair& p = pairs_[i];
    const float a = x[p.first], b = x[p.second];
    out[p.first] = a * cos - b * sin;
    out[p.second] = b * cos + a * sin;
  }
}

void GhostRope::turn(float* out, const float* x, int token) const { turn_by(out, x, token, 1); }

void GhostRope::turn_back(float* out, const float* x, int token) const {
  turn_by(out, x, token, -1);
}

// A pair of the centre, (a, b), turned by phi, meets a pair of the query, (c, d), as
// (ca + db) cos phi + (da - cb) sin phi.
void GhostRope::prepare(GhostQuery& query, const float* q, const float* centre) const {
  for (int i = 0; i < n_pairs(); ++i) {
    const Pair& p = pairs_[i];
    query.along[i] = q[p.first] * centre[p.first] + q[p.second] * centre[p.second];
    query.across[i] = q[p.second] * centre[p.first] - q[p.first] * centre[p.second];
  }
}

// phi is the angle of the group's middle, plus theta s with s the place from there: both terms
// above, turned by the former, meet cos theta s and sin theta s, or their cubics.
void GhostRope::score_centre(float* scores, std::size_t stride, const GhostQuery* queries,
                             int n_queries, int group) const {
  constexpr int kMost = GhostQuery::kMaxDim + 4;
  if (n_queries > kQueries) {
    score_centre(scores + kQueries * stride, stride, queries + kQueries, n_queries - kQueries,
                 group);
    n_queries = kQueries;
  }
  float turned[kQueries * kMost];
  const float* cosine = &middle_[static_cast<std::size_t>(group) * 2 * n_pairs()];
  const float* sine = cosine + n_pairs();
  for (int h = 0; h < n_queries; ++h) {
    const float *along = queries[h].along, *across = queries[h].across;
    float* rows = turned + h * kMost;
    for (int i = 0; i < n_fast_; ++i) {
      rows[i] = along[i] * cosine[i] + across[i] * sine[i];
      rows[n_fast_ + i] = across[i] * cosine[i] - along[i] * sine[i];
    }
    float c0 = 0, c1 = 0, c2 = 0, c3 = 0;
#pragma omp simd reduction(+ : c0, c1, c2, c3)
    for (int i = n_fast_; i < n_pairs(); ++i) {
      const float a = along[i] * cosine[i] + across[i] * sine[i];
      const float b = across[i] * cosine[i] - along[i] * sine[i];
      c0 += a;
      c1 += b * cubic_[3 * i];
      c2 -= a * cubic_[3 * i + 1];
      c3 -= b * cubic_[3 * i + 2];
    }
    float* cubic = rows + 2 * n_fast_;
    cubic[0] = c0, cubic[1] = c1, cubic[2] = c2, cubic[3] = c3;
    std::fill_n(scores + h * stride, kGhostGroup, 0.0f);
  }
  for (int j = 0; j < kGhostGroup; j += kTileCols)
    tile_multiply(scores + j, static_cast<std::int64_t>(stride), turned, kMost, n_queries,
                  &rows_[j], kGhostGroup, n_rows());
}

std::int64_t GhostRope::bytes() const {
  return static_cast<std::int64_t>(
      (cubic_.capacity() + within_.capacity() + rows_.capacity() + middle_.capacity()) *
      sizeof(float));
}

}  // namespace thaw
