// The centre of ghosts, turned by RoPE, against plain trigonometry in f64.
#include <doctest/doctest.h>

#include <cmath>

#include "device/error.h"
#include "kvstore/ghost.h"
#include "kvstore/kvstore.h"
#include "tests/error_of.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

KvRope rope_of(int head_dim, double theta, bool interleaved) {
  KvRope rope{{}, interleaved};
  for (int i = 0; i < head_dim / 2; ++i)
    rope.inverse_frequencies.push_back(static_cast<float>(std::pow(theta, -2.0 * i / head_dim)));
  return rope;
}

// x turned to `token`'s position (RoFormer, 2104.09864, eq. 34).
std::vector<double> turned(const KvRope& rope, const float* x, int head_dim, int token) {
  std::vector<double> out(static_cast<std::size_t>(head_dim));
  for (int i = 0; i < head_dim / 2; ++i) {
    const int a = rope.interleaved ? 2 * i : i, b = rope.interleaved ? 2 * i + 1 : i + head_dim / 2;
    const double angle = double{rope.inverse_frequencies[i]} * token;
    out[a] = x[a] * std::cos(angle) - x[b] * std::sin(angle);
    out[b] = x[b] * std::cos(angle) + x[a] * std::sin(angle);
  }
  return out;
}

constexpr int kTokens[] = {0, 1, 15, 16, 31, 32, 33, 100, 1000, 8191, 100000};

}  // namespace

// Angles are products of two rounded cosines and sines: 4 roundings of 2^-24.
TEST_CASE("ghost rope: a vector turns as RoPE turns it, and back") {
  testing::Random random(1);
  for (const int dim : {2, 6, 64, 80, 128}) {
    for (const bool interleaved : {false, true}) {
      const KvRope description = rope_of(dim, 10000, interleaved);
      GhostRope rope(description, dim);
      rope.grow(100001);
      for (const int token : kTokens) {
        const std::vector<float> x = random.normals(dim);
        const std::vector<double> expected = turned(description, x.data(), dim, token);
        std::vector<float> out(x.size());
        rope.turn(out.data(), x.data(), token);
        for (int i = 0; i < dim; ++i) CHECK(std::fabs(out[i] - expected[i]) < 8 * 0x1p-24 * 8);
        rope.turn_back(out.data(), out.data(), token);  // in place
        for (int i = 0; i < dim; ++i) CHECK(std::fabs(out[i] - x[i]) < 16 * 0x1p-24 * 8);
      }
    }
  }
}

// Of a slow pair's share of a score the cubic leaves out at most 0.35^4 / 24 of |q| |mu|.
TEST_CASE("ghost rope: scores of the turned centre, for any number of queries and any spans") {
  testing::Random random(2);
  for (const int dim : {2, 6, 64, 80, 128, 256}) {
    for (const double theta : {1.0, 10000.0, 500000.0}) {
      const KvRope description = rope_of(dim, theta, dim % 4 == 0);
      GhostRope rope(description, dim);
      rope.grow(40000);
      const GhostFormat format{3, 2, dim};
      for (const int n_queries : {1, 3, 6, 7, 16}) {
        const std::vector<float> centre = random.normals(dim), q = random.normals(n_queries * dim);
        std::vector<GhostQuery> queries(static_cast<std::size_t>(n_queries));
        for (int h = 0; h < n_queries; ++h)
          prepare_query(queries[h], &q[h * dim], centre.data(), rope, format);
        const int n_spans = 1 + random.below(3), n_tokens = n_spans * GhostRope::kSpan;
        const int span = random.below(300), stride = 3 * GhostRope::kSpan + 3;
        std::vector<float> scores(static_cast<std::size_t>(n_queries * stride), -7.0f);
        rope.score_centre(scores.data(), stride, queries.data(), n_queries, span, n_spans);
        for (int h = 0; h < n_queries; ++h) {
          double bound = 0;  // sum over pairs of |q| |mu|
          for (int i = 0; i < dim / 2; ++i) {
            const int a = description.interleaved ? 2 * i : i;
            const int b = description.interleaved ? 2 * i + 1 : i + dim / 2;
            bound += std::hypot(q[h * dim + a], q[h * dim + b]) * std::hypot(centre[a], centre[b]);
          }
          for (int j = 0; j < stride; ++j) {
            if (j >= n_tokens) {
              CHECK(scores[h * stride + j] == -7.0f);
              continue;
            }
            const auto mu = turned(description, centre.data(), dim, span * GhostRope::kSpan + j);
            double expected = 0;
            for (int i = 0; i < dim; ++i) expected += q[h * dim + i] * mu[i];
            CHECK(std::fabs(scores[h * stride + j] - expected) <=
                  (std::pow(0.35, 4) / 24 + 0x1p-20) * bound);
          }
        }
      }
    }
  }
}

// Keys that are one vector, turned, and a little noise: a centre that did not turn with them would
// leave most of it to the ghost.
TEST_CASE("ghost rope: the store's ghosts are relative to the turned centre") {
  constexpr int kDim = 64, kLength = 1000;
  testing::Random random(3);
  for (const bool interleaved : {false, true}) {
    const KvShape shape{1, 1, kDim, kLength + 1, KvType::kF32, rope_of(kDim, 10000, interleaved)};
    KvOptions o;
    o.policy.policy = Policy::kThaw;
    o.check = true;
    auto kv = make_kv_store(shape, o);
    const std::vector<float> centre = random.normals(kDim, 5), zero(kDim);
    kv->begin(kLength, Phase::kPrefill);
    std::vector<float> k, v(kLength * kDim);
    for (int t = 0; t < kLength; ++t)
      for (const double x : turned(shape.rope, centre.data(), kDim, t))
        k.push_back(static_cast<float>(x) + 0.1f * random.normal());
    kv->append(0, k.data(), v.data(), kLength);
    kv->settle(0, {});
    kv->begin(1, Phase::kDecode);
    kv->append(0, k.data(), v.data(), 1);
    const GhostView ghosts = kv->view(0).ghosts;
    REQUIRE(ghosts.present());
    double left = 0;
    for (int t = 0; t < kLength - 1; ++t) {
      std::vector<float> y(kDim);
      read_ghost_key(y.data(), ghosts.group(0, t / kGhostGroup), ghosts.format, t % kGhostGroup,
                     ghosts.centres[0]);
      for (const float x : y) left += x * x / (kLength * kDim);
    }
    CHECK(left == doctest::Approx(0.01).epsilon(0.1).scale(0));
  }
}

TEST_CASE("ghost rope: frequencies that are not half of head_dim are refused") {
  const KvShape shape{1, 1, 64, 10, KvType::kF16, rope_of(32, 10000, false)};
  CHECK(testing::error_of([&] { make_kv_store(shape); }) ==
        "KV store: RoPE: expected 32 frequencies, found 16");
}
