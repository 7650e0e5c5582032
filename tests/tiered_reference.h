// Decode over two tiers: a store in the middle of a step, and the definition of the answer in plain
// loops: hot tokens exactly, recalled ones exactly from the cold tier, ghosts of the rest, one
// softmax over all. Where a group's ghosts are all faint, their values are the mean.
//
// How close an answer must come. A score is a sum of head_dim products that are added in f32: of
// magnitude |q| |k| / sqrt(head_dim), here at most 40, with a rounding of 2^-24 of it an addition,
// which add up as a random walk: for 128 dimensions 3e-5, and a probability errs by as much of
// itself, once for its score and once for the normaliser. So 1e-4 (kError) of themselves for
// probabilities and sums of them, 1e-4 for scores and for entropy, a mean of scores; decisions are
// bound to the threshold but for 1e-4 of it. o averages errors of many tokens that are
// independent: 1e-5 of its norm; ghosts' weights have 8 bits, whose bound is Head::rounding.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "attention/attention.h"
#include "kvstore/ghost_code.h"
#include "kvstore/row.h"
#include "tests/compare.h"
#include "tests/tiny_model.h"

namespace thaw::testing {

struct TieredCase {
  int kv_len, n_kv_heads, group, head_dim;
  bool per_head = true;
  int key_bits = 3, value_bits = 2;
  KvType type = KvType::kF32;
  Policy policy = Policy::kThaw;
  int one_hot_in = 6;  // of the prompt; 0: none but those that always are
  int loud_every = 0;  // groups of tokens whose scores are `louder`; 0: none
  float louder = 10;
  float sharp = 1.5f;        // deviation of queries, and of how much scores of ghosts err by
  bool part_judges = false;  // ghosts of group 0 are loud for the first kJudges queries alone, of
                             // group 1 for the others; all else is faint, or the newest

  int n_heads() const { return n_kv_heads * group; }
};

struct TieredScene {
  TieredCase c;
  std::unique_ptr<KvStore> kv;
  std::vector<float> k, v, q;  // token x kv_dim, as given; n_heads x head_dim

  // A store in the middle of a decode step: some tokens are hot by their attention in the prompt.
  explicit TieredScene(const TieredCase& of, std::uint64_t seed = 5) : c(of) {
    Random random(seed);
    KvOptions o;
    o.policy.policy = c.policy;
    o.policy.per_head = c.per_head;
    o.policy.ghost_key_bits = c.key_bits;
    o.policy.ghost_value_bits = c.value_bits;
    o.policy.window = 3;
    o.policy.sinks = 2;
    o.centre_tokens = 16;
    KvShape shape{1, c.n_kv_heads, c.head_dim, 1536, c.type, {{}, c.group % 2 == 0}};
    for (int i = 0; i < c.head_dim / 2; ++i)
      shape.rope.inverse_frequencies.push_back(std::pow(0.7f, static_cast<float>(i)));
    kv = make_kv_store(shape, o);
    const int kv_dim = c.n_kv_heads * c.head_dim, prompt = c.kv_len - 1;
    const std::vector<float> mean = random.normals(kv_dim);
    k = random.normals(c.kv_len * kv_dim), v = random.normals(c.kv_len * kv_dim);
    for (int i = 0; i < c.kv_len * kv_dim; ++i) k[i] += mean[i % kv_dim], v[i] += mean[i % kv_dim];
    q = random.normals(c.n_heads() * c.head_dim, c.sharp);
    for (int t = 0; t < c.kv_len && c.loud_every > 0; ++t)
      if (t / kGhostGroup % c.loud_every == 0) raise_scores(&k[t * kv_dim], c.louder, 0, c.group);
    if (c.part_judges) part_judges();
    if (prompt > 0) {
      kv->begin(prompt, Phase::kPrefill);
      kv->append(0, k.data(), v.data(), prompt);
      AttentionStats stats;
      stats.n_rows = 1;
      stats.lanes.resize(c.policy == Policy::kThaw && c.per_head ? c.n_kv_heads : 1);
      for (AttentionStats::Lane& lane : stats.lanes)
        for (int t = 0; t < prompt; ++t) {
          const bool hot = c.one_hot_in > 0 && random.below(c.one_hot_in) == 0;
          lane.probability.push_back(hot ? 0.1f : 0.0f);
        }
      kv->settle(0, stats);
    }
    kv->begin(1, Phase::kDecode);
    kv->append(0, &k[prompt * kv_dim], &v[prompt * kv_dim], 1);
  }

  // For queries [first, last) of each k/v head. Of many dimensions, they are all but orthogonal.
  void raise_scores(float* key, float louder, int first, int last) const {
    for (int head = 0; head < c.n_heads(); ++head) {
      if (head % c.group < first || head % c.group >= last) continue;
      const float* of = &q[head * c.head_dim];
      float power = 0;
      for (int i = 0; i < c.head_dim; ++i) power += of[i] * of[i];
      const float by = louder * std::sqrt(static_cast<float>(c.head_dim)) / power;
      for (int i = 0; i < c.head_dim; ++i) key[head / c.group * c.head_dim + i] += by * of[i];
    }
  }

  void part_judges() {
    for (int i = 0; i < c.n_heads() * c.head_dim; ++i)  // to each dimensions of its own
      if (i % c.head_dim % c.group != i / c.head_dim % c.group) q[i] = 0;
    const int kv_dim = c.n_kv_heads * c.head_dim;
    for (int t = 0; t < kGhostGroup; ++t) {
      raise_scores(&k[t * kv_dim], 2, 0, kJudges);
      raise_scores(&k[(kGhostGroup + t) * kv_dim], 2, kJudges, c.group);
    }
    raise_scores(&k[(c.kv_len - 1) * kv_dim], 10, 0, c.group);
  }

  AttentionStats attend(std::vector<float>& o, const KvView& view, int n_threads = 2) const {
    ThreadPool pool(n_threads);
    AttentionStats stats;
    o.assign(q.size(), NAN);
    make_cpu_attention(pool)->attend(o.data(), q.data(), 1, c.n_heads(), view, stats, 1);
    return stats;
  }
};

using Row = std::vector<double>;

inline constexpr double kError = 1e-4;

inline Row load(const std::byte* from, const KvView& view) {
  std::vector<float> x(static_cast<std::size_t>(view.head_dim));
  load_row(x.data(), from, view.head_dim, view.type);
  return {x.begin(), x.end()};
}

inline double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

inline bool is_hot(const LaneView& lane, int token) {
  return std::find(lane.tokens.begin(), lane.tokens.end(), token) != lane.tokens.end();
}

// A query as ghosts see it: 8-bit codes in rotated space.
inline Row ghost_query(const GhostQuery& q, int dim) {
  Row out;
  for (int i = 0; i < dim; ++i)
    out.push_back(q.scale * static_cast<std::int8_t>(q.pairs[i / 2] >> i % 2 * 8 & 0xff));
  return out;
}

// One query head: how each token is seen, and what that adds up to.
struct Head {
  std::vector<double> estimate, exact;  // per token: scores, -infinity where it is mute
  double max = -INFINITY, l = 0;        // of the estimated softmax, which recalls go by
  double doubt = 1;                     // what estimates are multiplied by for that
  Row o;
  double rounding = 0;  // bound of |o|'s error that 8-bit weights of ghosts cause
  std::vector<double> p;
  double entropy = 0, ghost_mass = 0;
};

inline Head score(const TieredScene& s, const KvView& view, int head) {
  const int kv_head = head / s.c.group, dim = view.head_dim;
  const LaneView& lane = view.lanes[static_cast<std::size_t>(kv_head / view.lane_heads)];
  const double scale = 1 / std::sqrt(dim);
  Row q(s.q.begin() + head * dim, s.q.begin() + (head + 1) * dim);
  for (double& x : q) x *= scale;
  const std::vector<float> scaled(q.begin(), q.end());
  GhostQuery ghost;
  Row rotated;
  Head h;
  if (view.ghosts.present()) {
    prepare_query(ghost, scaled.data(), view.ghosts.centres[kv_head].key_mean, *view.ghosts.rope,
                  view.ghosts.format);
    rotated = ghost_query(ghost, dim);
    const double sigma = ghost_noise(s.c.key_bits) * std::sqrt(dot(q, q)) *
                         double{view.ghosts.centres[kv_head].key_unit};
    const Caution& c = view.caution;
    h.doubt = std::exp(std::fmax(0.0, double{c.z} * (sigma - double{Caution::kUsualNoise})));
    h.doubt = std::fmax(1.0, std::fmin(h.doubt, double{view.recall} / double{c.least}));
  }
  for (int t = 0; t < view.kv_len; ++t) {
    h.exact.push_back(dot(q, load(view.cold.key(kv_head, t), view)));
    double estimate = is_hot(lane, t) ? h.exact.back() : -INFINITY;
    if (!is_hot(lane, t) && view.ghosts.present()) {
      std::vector<float> key(static_cast<std::size_t>(dim));
      read_ghost_key(key.data(), view.ghosts.group(kv_head, t / kGhostGroup), view.ghosts.format,
                     t % kGhostGroup, view.ghosts.centres[kv_head]);
      constexpr int kSpan = GhostRope::kSpan;
      float centre[kSpan];  // tests/test_ghost_rope.cpp holds it to its definition
      view.ghosts.rope->score_centre(centre, kSpan, &ghost, 1, t / kSpan, 1);
      estimate = centre[t % kSpan] + dot(rotated, {key.begin(), key.end()});
    }
    h.estimate.push_back(estimate);
    h.max = std::fmax(h.max, estimate);
  }
  for (const double e : h.estimate) h.l += std::exp(e - h.max);
  return h;
}

// By group of ghosts, the largest probability of one that is not recalled, for any of n queries.
inline std::vector<double> loudest(const std::vector<Head>& heads, int first, int n,
                                   const LaneView& lane, const std::vector<int>& recalled) {
  std::vector<double> most(heads[first].estimate.size() / kGhostGroup + 1);
  for (int i = first; i < first + n; ++i)
    for (std::size_t t = 0; t < heads[i].estimate.size(); ++t) {
      const int token = static_cast<int>(t);
      if (is_hot(lane, token) || std::binary_search(recalled.begin(), recalled.end(), token))
        continue;
      double& of_group = most[t / kGhostGroup];
      of_group = std::fmax(of_group, std::exp(heads[i].estimate[t] - heads[i].max) / heads[i].l);
    }
  return most;
}

// The answer, given who was recalled and how loud groups are.
inline void answer(Head& h, const TieredScene& s, const KvView& view, int head,
                   const std::vector<int>& recalled, const std::vector<double>& loudest) {
  const int kv_head = head / s.c.group, dim = view.head_dim;
  const LaneView& lane = view.lanes[static_cast<std::size_t>(kv_head / view.lane_heads)];
  const auto is_exact = [&](int t) {
    return is_hot(lane, t) || std::binary_search(recalled.begin(), recalled.end(), t);
  };
  double max = -INFINITY, l = 0;
  for (int t = 0; t < view.kv_len; ++t) {
    h.p.push_back(is_exact(t) ? h.exact[t] : h.estimate[t]);
    max = std::fmax(max, h.p[t]);
  }
  for (double& x : h.p) l += x = std::exp(x - max);
  h.o.assign(static_cast<std::size_t>(dim), 0.0);
  std::vector<double> unit(static_cast<std::size_t>(view.kv_len / kGhostGroup + 1));
  for (int t = 0; t < view.kv_len; ++t) {
    h.p[t] /= l;
    if (h.p[t] > 0) h.entropy -= h.p[t] * std::log(h.p[t]);
    if (!is_hot(lane, t)) h.ghost_mass += h.p[t];
    if (h.p[t] == 0) continue;
    Row value = load(view.cold.value(kv_head, t), view);
    if (!is_exact(t)) {
      const GhostCentre& centre = view.ghosts.centres[kv_head];
      std::vector<float> ghost(static_cast<std::size_t>(dim));
      read_ghost_value(ghost.data(), view.ghosts.group(kv_head, t / kGhostGroup),
                       view.ghosts.format, t % kGhostGroup, centre);
      double largest = 0;
      for (const float x : ghost) largest = std::fmax(largest, std::fabs(x));
      rotate_back(ghost.data(), dim);
      const double loud = loudest[t / kGhostGroup] / faintest(view.recall, view.kv_len);
      double power = 0;
      for (const float x : ghost) power += double{x} * x;
      if (std::fabs(loud - 1) < kError) h.rounding += h.p[t] * std::sqrt(power);  // it may speak
      if (loud <= 1)
        std::fill(ghost.begin(), ghost.end(), 0.0f);
      else
        unit[t / kGhostGroup] = std::fmax(unit[t / kGhostGroup], h.p[t] * largest);
      for (int i = 0; i < dim; ++i) value[i] = double{ghost[i]} + centre.value_mean[i];
    }
    for (int i = 0; i < dim; ++i) h.o[i] += h.p[t] * value[i];
  }
  // A weight errs by at most 1/510 of the largest, w s, of its group, and codes are as large as the
  // largest: so each of 32 values errs by at most |largest value| w / 510 a dimension.
  for (const double u : unit) h.rounding += kGhostGroup * u / 510 * std::sqrt(dim);
}

inline void check_lane(const TieredScene& s, const KvView& view, const AttentionStats::Lane& stats,
                       std::size_t index, const std::vector<float>& o) {
  const LaneView& lane = view.lanes[index];
  const int queries = view.lane_heads * s.c.group, first = static_cast<int>(index) * queries;
  std::vector<int> recalled;
  for (const AttentionStats::Recall& r : stats.recalled) recalled.push_back(r.token);
  CHECK(std::is_sorted(recalled.begin(), recalled.end()));
  std::vector<double> estimate(static_cast<std::size_t>(view.kv_len)), p = estimate, relevance = p;
  double entropy = 0, ghost_mass = 0;
  std::vector<Head> heads;
  for (int head = first; head < first + queries; ++head) heads.push_back(score(s, view, head));
  for (int head = first; head < first + queries; ++head) {
    Head& h = heads[head - first];
    const int of_group = (head - first) % s.c.group, judge = head - first - of_group % kJudges;
    const int n = std::min(kJudges, s.c.group - of_group / kJudges * kJudges);
    answer(h, s, view, head, recalled, loudest(heads, judge, n, lane, recalled));
    double error = 0, power = 0;
    for (int i = 0; i < view.head_dim; ++i) {
      error += std::pow(o[static_cast<std::size_t>(head * view.head_dim + i)] - h.o[i], 2);
      power += h.o[i] * h.o[i];
    }
    CHECK(std::sqrt(error) <= 1e-5 * std::sqrt(power) + h.rounding);
    for (int t = 0; t < view.kv_len; ++t) {
      estimate[t] += h.doubt * std::exp(h.estimate[t] - h.max) / h.l / queries;
      p[t] += h.p[t] / queries;
      relevance[t] += std::fabs(h.exact[t]) / queries;
    }
    entropy += h.entropy / queries;
    ghost_mass += h.ghost_mass / queries;
  }
  REQUIRE(stats.probability.size() == lane.tokens.size());
  for (std::size_t row = 0; row < lane.tokens.size(); ++row) {
    const std::size_t t = static_cast<std::size_t>(lane.tokens[row]);
    CHECK(within(stats.probability[row], p[t], kError));
    CHECK(std::fabs(stats.relevance[row] - relevance[t]) <= kError);
  }
  for (const AttentionStats::Recall& r : stats.recalled)
    CHECK(within(r.probability, p[static_cast<std::size_t>(r.token)], kError));
  int wrong = 0;  // unless so close to the threshold that rounding decides
  for (int t = 0; t < view.kv_len; ++t) {
    const bool is = std::binary_search(recalled.begin(), recalled.end(), t);
    const bool frozen = !is_hot(lane, t) && view.ghosts.present();
    wrong += is && (!frozen || estimate[t] < view.recall * (1 - kError));
    wrong += !is && frozen && estimate[t] > view.recall * (1 + kError);
  }
  CHECK(wrong == 0);
  CHECK(std::fabs(stats.entropy - entropy) <= kError);
  CHECK(within(stats.ghost_mass, ghost_mass, kError));
}

}  // namespace thaw::testing
