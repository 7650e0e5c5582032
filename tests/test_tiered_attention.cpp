// Decode over two tiers against its definition in plain loops: hot tokens exactly, recalled ones
// exactly from the cold tier, ghosts of the rest, one softmax over all.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention/attention.h"
#include "kvstore/row.h"
#include "tests/compare.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

struct Case {
  int kv_len, n_kv_heads, group, head_dim;
  bool per_head = true;
  int key_bits = 3, value_bits = 2;
  KvType type = KvType::kF32;
  Policy policy = Policy::kThaw;

  int n_heads() const { return n_kv_heads * group; }
};

struct Scene {
  Case c;
  std::unique_ptr<KvStore> kv;
  std::vector<float> k, v, q;  // token x kv_dim, as given; n_heads x head_dim

  // A store in the middle of a decode step: some tokens are hot by their attention in the prompt.
  explicit Scene(const Case& of, std::uint64_t seed = 5) : c(of) {
    testing::Random random(seed);
    KvOptions o;
    o.policy.policy = c.policy;
    o.policy.per_head = c.per_head;
    o.policy.ghost_key_bits = c.key_bits;
    o.policy.ghost_value_bits = c.value_bits;
    o.policy.window = 3;
    o.policy.sinks = 2;
    o.centre_tokens = 16;
    KvShape shape{1, c.n_kv_heads, c.head_dim, 1024, c.type, {{}, c.group % 2 == 0}};
    for (int i = 0; i < c.head_dim / 2; ++i)
      shape.rope.inverse_frequencies.push_back(std::pow(0.7f, static_cast<float>(i)));
    kv = make_kv_store(shape, o);
    const int kv_dim = c.n_kv_heads * c.head_dim, prompt = c.kv_len - 1;
    const std::vector<float> mean = random.normals(kv_dim);
    k = random.normals(c.kv_len * kv_dim), v = random.normals(c.kv_len * kv_dim);
    for (int i = 0; i < c.kv_len * kv_dim; ++i) k[i] += mean[i % kv_dim], v[i] += mean[i % kv_dim];
    q = random.normals(c.n_heads() * c.head_dim, 1.5f);
    if (prompt > 0) {
      kv->begin(prompt, Phase::kPrefill);
      kv->append(0, k.data(), v.data(), prompt);
      AttentionStats stats;
      stats.n_rows = 1;
      stats.lanes.resize(c.policy == Policy::kThaw && c.per_head ? c.n_kv_heads : 1);
      for (AttentionStats::Lane& lane : stats.lanes)
        for (int t = 0; t < prompt; ++t)
          lane.probability.push_back(random.below(6) == 0 ? 0.1f : 0.0f);
      kv->settle(0, stats);
    }
    kv->begin(1, Phase::kDecode);
    kv->append(0, &k[prompt * kv_dim], &v[prompt * kv_dim], 1);
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

Row load(const std::byte* from, const KvView& view) {
  std::vector<float> x(static_cast<std::size_t>(view.head_dim));
  load_row(x.data(), from, view.head_dim, view.type);
  return {x.begin(), x.end()};
}

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

bool is_hot(const LaneView& lane, int token) {
  return std::find(lane.tokens.begin(), lane.tokens.end(), token) != lane.tokens.end();
}

// A query as ghosts see it: 8-bit codes in rotated space.
Row ghost_query(const GhostQuery& q, int dim) {
  Row out;
  for (int i = 0; i < dim; ++i)
    out.push_back(q.scale * static_cast<std::int8_t>(q.pairs[i / 2] >> i % 2 * 8 & 0xff));
  return out;
}

// One query head: how each token is seen, and what that adds up to.
struct Head {
  std::vector<double> estimate, exact;  // per token: scores, -infinity where it is mute
  double max = -INFINITY, l = 0;        // of the estimated softmax, which recalls go by
  Row o;
  double rounding = 0;  // bound of |o|'s error that 8-bit weights of ghosts cause
  std::vector<double> p;
  double entropy = 0, ghost_mass = 0;
};

Head score(const Scene& s, const KvView& view, int head) {
  const int kv_head = head / s.c.group, dim = view.head_dim;
  const LaneView& lane = view.lanes[static_cast<std::size_t>(kv_head / view.lane_heads)];
  const double scale = 1 / std::sqrt(dim);
  Row q(s.q.begin() + head * dim, s.q.begin() + (head + 1) * dim);
  for (double& x : q) x *= scale;
  const std::vector<float> scaled(q.begin(), q.end());
  GhostQuery ghost;
  Row rotated;
  if (view.ghosts.present()) {
    prepare_query(ghost, scaled.data(), view.ghosts.centres[kv_head].key_mean, *view.ghosts.rope,
                  view.ghosts.format);
    rotated = ghost_query(ghost, dim);
  }
  Head h;
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

// The answer, given who was recalled.
void answer(Head& h, const Scene& s, const KvView& view, int head,
            const std::vector<int>& recalled) {
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
      unit[t / kGhostGroup] = std::fmax(unit[t / kGhostGroup], h.p[t] * largest);
      rotate_back(ghost.data(), dim);
      for (int i = 0; i < dim; ++i) value[i] = double{ghost[i]} + centre.value_mean[i];
    }
    for (int i = 0; i < dim; ++i) h.o[i] += h.p[t] * value[i];
  }
  // A weight errs by at most 1/510 of the largest, w s, of its group, and codes are as large as the
  // largest: so each of 32 values errs by at most |largest value| w / 510 a dimension.
  for (const double u : unit) h.rounding += kGhostGroup * u / 510 * std::sqrt(dim);
}

void check_lane(const Scene& s, const KvView& view, const AttentionStats::Lane& stats,
                std::size_t index, const std::vector<float>& o) {
  const LaneView& lane = view.lanes[index];
  const int queries = view.lane_heads * s.c.group, first = static_cast<int>(index) * queries;
  std::vector<int> recalled;
  for (const AttentionStats::Recall& r : stats.recalled) recalled.push_back(r.token);
  CHECK(std::is_sorted(recalled.begin(), recalled.end()));
  std::vector<double> estimate(static_cast<std::size_t>(view.kv_len)), p = estimate, relevance = p;
  double entropy = 0, ghost_mass = 0;
  for (int head = first; head < first + queries; ++head) {
    Head h = score(s, view, head);
    answer(h, s, view, head, recalled);
    double error = 0, power = 0;
    for (int i = 0; i < view.head_dim; ++i) {
      error += std::pow(o[static_cast<std::size_t>(head * view.head_dim + i)] - h.o[i], 2);
      power += h.o[i] * h.o[i];
    }
    CHECK(std::sqrt(error) <= 1e-5 * std::sqrt(power) + h.rounding);
    for (int t = 0; t < view.kv_len; ++t) {
      estimate[t] += std::exp(h.estimate[t] - h.max) / h.l / queries;
      p[t] += h.p[t] / queries;
      relevance[t] += std::fabs(h.exact[t]) / queries;
    }
    entropy += h.entropy / queries;
    ghost_mass += h.ghost_mass / queries;
  }
  REQUIRE(stats.probability.size() == lane.tokens.size());
  for (std::size_t row = 0; row < lane.tokens.size(); ++row) {
    const std::size_t t = static_cast<std::size_t>(lane.tokens[row]);
    CHECK(stats.probability[row] == doctest::Approx(p[t]).epsilon(1e-4));
    CHECK(stats.relevance[row] == doctest::Approx(relevance[t]).epsilon(1e-4));
  }
  for (const AttentionStats::Recall& r : stats.recalled)
    CHECK(r.probability == doctest::Approx(p[static_cast<std::size_t>(r.token)]).epsilon(1e-4));
  int wrong = 0;  // unless so close to the threshold that rounding decides
  for (int t = 0; t < view.kv_len; ++t) {
    const bool is = std::binary_search(recalled.begin(), recalled.end(), t);
    const bool frozen = !is_hot(lane, t) && view.ghosts.present();
    wrong += is && (!frozen || estimate[t] < view.recall * 0.9999);
    wrong += !is && frozen && estimate[t] > view.recall * 1.0001;
  }
  CHECK(wrong == 0);
  CHECK(stats.entropy == doctest::Approx(entropy).epsilon(1e-4));
  CHECK(stats.ghost_mass == doctest::Approx(ghost_mass).epsilon(1e-4));
}

void check_case(const Case& c, float recall) {
  CAPTURE(c.kv_len);
  CAPTURE(c.n_kv_heads);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  CAPTURE(c.per_head);
  CAPTURE(c.key_bits);
  CAPTURE(c.value_bits);
  CAPTURE(recall);
  const Scene s(c);
  KvView view = s.kv->view(0);
  view.recall = recall;
  std::vector<float> o;
  const AttentionStats stats = s.attend(o, view);
  REQUIRE(stats.lanes.size() == view.lanes.size());
  CHECK(stats.n_rows == 1);
  for (std::size_t i = 0; i < view.lanes.size(); ++i) check_lane(s, view, stats.lanes[i], i, o);
}

constexpr int kLengths[] = {1, 2, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1000};

}  // namespace

TEST_CASE("tiered attention: every context length, lanes of a head and of the layer") {
  for (const int kv_len : kLengths)
    for (const bool per_head : {true, false}) check_case({kv_len, 2, 3, 16, per_head}, 2e-3f);
}

TEST_CASE("tiered attention: groups of query heads, head sizes, stored types") {
  for (const int group : {1, 3, 4, 8})
    for (const int head_dim : {2, 6, 16, 24, 64, 80, 96})
      check_case({97, 2, group, head_dim, group % 2 == 0}, 1e-2f);
  check_case({300, 3, 3, 64, true, 3, 2, KvType::kF16}, 5e-3f);
  check_case({300, 1, 8, 96, true, 3, 2, KvType::kQ8_0}, 5e-3f);
  check_case({300, 3, 1, 32, false, 3, 2, KvType::kQ4_0}, 5e-3f);
  check_case({300, 3, 1, 80, false, 3, 2, KvType::kBF16}, 5e-3f);
}

TEST_CASE("tiered attention: ghosts of all bits") {
  for (const int key_bits : {1, 2, 3, 4})
    for (const int value_bits : {0, 1, 2, 4})
      check_case({130, 2, 3, 64, true, key_bits, value_bits}, 1e-2f);
}

TEST_CASE("tiered attention: with every frozen token recalled it is exact attention") {
  for (const int kv_len : kLengths) {
    const Case c{kv_len, 2, 4, 64};
    const Scene s(c);
    KvView view = s.kv->view(0);
    view.recall = std::numeric_limits<float>::min();
    std::vector<float> o;
    const AttentionStats stats = s.attend(o, view);
    reference::Matrix k, v;
    for (int t = 0; t < kv_len; ++t) {
      k.emplace_back(s.k.begin() + t * 128, s.k.begin() + (t + 1) * 128);
      v.emplace_back(s.v.begin() + t * 128, s.v.begin() + (t + 1) * 128);
    }
    const auto exact = reference::attend(s.q, k, v, kv_len, c.n_heads(), 2, 64);
    CHECK(testing::nmse(o, exact.o) < 1e-10);
    CHECK((stats.lanes[0].entropy + stats.lanes[1].entropy) / 2 ==
          doctest::Approx(exact.entropy).epsilon(1e-4));
    for (std::size_t i = 0; i < 2; ++i)
      CHECK(stats.lanes[i].recalled.size() + view.lanes[i].tokens.size() ==
            static_cast<std::size_t>(kv_len));
  }
}

TEST_CASE("tiered attention: a threshold beyond 1 recalls nothing, one of 0 no hot token") {
  for (const int kv_len : {33, 513}) {
    const float never = std::numeric_limits<float>::infinity();
    check_case({kv_len, 2, 3, 64}, never);
    const Scene s({kv_len, 2, 3, 64});
    KvView view = s.kv->view(0);
    std::vector<float> o;
    view.recall = never;
    for (const AttentionStats::Lane& lane : s.attend(o, view).lanes) CHECK(lane.recalled.empty());
    view.recall = 0;
    const AttentionStats stats = s.attend(o, view);
    for (std::size_t i = 0; i < stats.lanes.size(); ++i)
      for (const AttentionStats::Recall& r : stats.lanes[i].recalled)
        CHECK_FALSE(is_hot(view.lanes[i], r.token));
  }
}

TEST_CASE("tiered attention: without ghosts frozen tokens are mute") {
  for (const int kv_len : {1, 5, 33, 513}) {
    check_case({kv_len, 2, 3, 64, false, 3, 2, KvType::kF16, Policy::kWindow}, 1e-3f);
    check_case({kv_len, 2, 3, 64, true, 0, 0}, 1e-3f);
    const Scene s({kv_len, 2, 3, 64, true, 0, 0});
    std::vector<float> o;
    for (const AttentionStats::Lane& lane : s.attend(o, s.kv->view(0)).lanes) {
      CHECK(lane.ghost_mass == 0);
      CHECK(lane.recalled.empty());
    }
  }
}

TEST_CASE("tiered attention: threads do not change a bit") {
  for (const int kv_len : {33, 1000}) {
    const Scene s({kv_len, 3, 3, 64});
    std::vector<float> one, other;
    const AttentionStats expected = s.attend(one, s.kv->view(0), 1);
    for (const int n_threads : {2, 5}) {
      const AttentionStats stats = s.attend(other, s.kv->view(0), n_threads);
      CHECK(one == other);
      for (std::size_t i = 0; i < stats.lanes.size(); ++i) {
        CHECK(stats.lanes[i].probability == expected.lanes[i].probability);
        CHECK(stats.lanes[i].recalled.size() == expected.lanes[i].recalled.size());
        CHECK(stats.lanes[i].entropy == expected.lanes[i].entropy);
      }
    }
  }
}
