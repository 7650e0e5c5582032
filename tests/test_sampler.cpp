// Every filter against its definition, on distributions that can be worked out by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <vector>

#include "device/error.h"
#include "model/sampler.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

// Nothing filters, nothing is penalised: each test turns one thing on.
SamplerOptions plain() {
  SamplerOptions o;
  o.temperature = 1, o.top_k = 0, o.top_p = 1, o.min_p = 0;
  return o;
}

std::vector<float> log_of(const std::vector<double>& p) {
  std::vector<float> logits;
  for (double x : p) logits.push_back(static_cast<float>(std::log(x)) + 3.0f);  // any shift
  return logits;
}

std::vector<std::int32_t> kept(const SamplerOptions& o, const std::vector<float>& logits) {
  Sampler sampler(o);
  std::vector<std::int32_t> tokens;
  for (const auto& c : sampler.distribution(logits)) tokens.push_back(c.token);
  return tokens;
}

std::vector<double> probabilities(const SamplerOptions& o, const std::vector<float>& logits) {
  Sampler sampler(o);
  std::vector<double> p;
  for (const auto& c : sampler.distribution(logits)) p.push_back(c.p);
  return p;
}

using Tokens = std::vector<std::int32_t>;
const std::vector<double> kSkewed = {0.05, 0.4, 0.1, 0.25, 0.2};  // order: 1 3 4 2 0

TEST_CASE("sampler: without filters the distribution is the softmax") {
  CHECK(kept(plain(), log_of(kSkewed)) == Tokens{1, 3, 4, 2, 0});
  const std::vector<double> p = probabilities(plain(), log_of(kSkewed));
  const std::vector<double> expected = {0.4, 0.25, 0.2, 0.1, 0.05};
  for (int i = 0; i < 5; ++i) CHECK(p[i] == doctest::Approx(expected[i]).epsilon(1e-6));
}

TEST_CASE("sampler: temperature raises probabilities to 1/T") {
  SamplerOptions o = plain();
  o.temperature = 0.5f;  // squares: 0.01 : 0.04 : 0.25
  const std::vector<double> p = probabilities(o, log_of({0.1, 0.2, 0.5}));
  CHECK(p[0] == doctest::Approx(0.25 / 0.30).epsilon(1e-6));
  CHECK(p[1] == doctest::Approx(0.04 / 0.30).epsilon(1e-6));
  CHECK(p[2] == doctest::Approx(0.01 / 0.30).epsilon(1e-6));
}

TEST_CASE("sampler: extreme temperatures and logits stay finite") {
  SamplerOptions o = plain();
  o.temperature = 1e-30f;
  CHECK(probabilities(o, {1e30f, -1e30f, 1e30f}) == std::vector<double>{0.5, 0.5, 0});
  o.temperature = 1e30f;
  for (double p : probabilities(o, {50, -50, 0})) CHECK(p == doctest::Approx(1 / 3.0));
}

TEST_CASE("sampler: top-k keeps the k most probable and renormalises") {
  SamplerOptions o = plain();
  o.top_k = 2;
  CHECK(kept(o, log_of(kSkewed)) == Tokens{1, 3});
  CHECK(probabilities(o, log_of(kSkewed))[0] == doctest::Approx(0.4 / 0.65).epsilon(1e-6));
  o.top_k = 1;
  CHECK(kept(o, log_of(kSkewed)) == Tokens{1});
  for (int k : {5, 6, 1000000}) {
    o.top_k = k;
    CHECK(kept(o, log_of(kSkewed)) == Tokens{1, 3, 4, 2, 0});
  }
}

TEST_CASE("sampler: top-k breaks ties towards the lowest id") {
  SamplerOptions o = plain();
  o.top_k = 3;
  CHECK(kept(o, {1, 2, 1, 2, 1, 1}) == Tokens{1, 3, 0});
  CHECK(kept(o, std::vector<float>(100, 0.5f)) == Tokens{0, 1, 2});
}

TEST_CASE("sampler: top-k of a large vocabulary equals a full sort") {
  testing::Random random(7);
  std::vector<float> logits = random.normals(20000);
  for (int i = 0; i < 5000; ++i) logits[random.below(20000)] = 2.5f;  // many ties
  std::vector<std::int32_t> order(logits.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int32_t a, std::int32_t b) { return logits[a] > logits[b]; });
  for (int k : {1, 40, 1000, 19999}) {
    SamplerOptions o = plain();
    o.top_k = k;
    CHECK(kept(o, logits) == Tokens(order.begin(), order.begin() + k));
  }
}

TEST_CASE("sampler: top-p keeps the smallest set that reaches p") {
  SamplerOptions o = plain();
  const std::vector<float> halves = log_of({0.125, 0.5, 0.125, 0.25});
  const std::map<float, Tokens> expected = {
      {1e-6f, {1}},       {0.49f, {1}},       {0.51f, {1, 3}},       {0.74f, {1, 3}},
      {0.76f, {1, 3, 0}}, {0.87f, {1, 3, 0}}, {0.88f, {1, 3, 0, 2}}, {1.0f, {1, 3, 0, 2}}};
  for (const auto& [p, tokens] : expected) {
    CAPTURE(p);
    o.top_p = p;
    CHECK(kept(o, halves) == tokens);
  }
}

TEST_CASE("sampler: top-p that is reached exactly keeps no more") {
  SamplerOptions o = plain();
  o.top_p = 0.5f;
  CHECK(kept(o, {0, 0, 0, 0}) == Tokens{0, 1});  // 1/4 each, exact in binary
}

TEST_CASE("sampler: top-p measures what top-k left") {
  SamplerOptions o = plain();
  o.top_k = 2, o.top_p = 0.6f;  // 0.4 / 0.65 = 0.615 reaches it; 0.4 alone would not
  CHECK(kept(o, log_of(kSkewed)) == Tokens{1});
}

TEST_CASE("sampler: min-p keeps those within a share of the most probable") {
  SamplerOptions o = plain();
  const std::map<float, Tokens> expected = {{0.0f, {1, 3, 4, 2, 0}}, {0.12f, {1, 3, 4, 2, 0}},
                                            {0.13f, {1, 3, 4, 2}},   {0.26f, {1, 3, 4}},
                                            {0.6f, {1, 3}},          {0.99f, {1}}};
  for (const auto& [p, tokens] : expected) {
    CAPTURE(p);
    o.min_p = p;
    CHECK(kept(o, log_of(kSkewed)) == tokens);
  }
  o.min_p = 1;
  CHECK(kept(o, {2, 3, 3, 1}) == Tokens{1, 2});  // ties with the largest stay
}

TEST_CASE("sampler: what survives sums to 1") {
  testing::Random random(3);
  SamplerOptions o;  // every default filter
  o.temperature = 1.5f;
  Sampler sampler(o);
  double sum = 0;
  for (const auto& c : sampler.distribution(random.normals(5000, 2))) sum += c.p;
  CHECK(sum == doctest::Approx(1).epsilon(1e-12));
}

TEST_CASE("sampler: temperature 0 takes the largest logit, lowest id on a tie") {
  SamplerOptions o;
  o.temperature = 0;
  Sampler sampler(o);
  CHECK(sampler.sample(std::vector<float>{-1, 4, 3, 4}) == 1);
  CHECK(sampler.sample(std::vector<float>{-kInf, -5, -kInf}) == 1);
  CHECK(sampler.distribution(std::vector<float>{-1, 4, 3, 4}).size() == 1);
}

TEST_CASE("sampler: repetition penalty divides positive and multiplies negative logits") {
  SamplerOptions o = plain();
  o.repeat_penalty = 2;
  Sampler sampler(o);
  sampler.accept(0), sampler.accept(1), sampler.accept(1);  // how often does not matter
  for (const auto& c : sampler.distribution(std::vector<float>{3, -3, 5})) {
    CHECK(c.logit == std::vector<float>{1.5f, -6, 5}[c.token]);
  }
}

TEST_CASE("sampler: presence counts once, frequency every time") {
  SamplerOptions o = plain();
  o.presence_penalty = 0.5f, o.frequency_penalty = 0.25f;
  Sampler sampler(o);
  sampler.accept(2), sampler.accept(0), sampler.accept(2), sampler.accept(2);
  for (const auto& c : sampler.distribution(std::vector<float>{1, 1, 1})) {
    CHECK(c.logit == std::vector<float>{0.25f, 1, -0.25f}[c.token]);
  }
}

TEST_CASE("sampler: penalties come before the greedy choice, repetition before the others") {
  SamplerOptions o;
  o.temperature = 0, o.repeat_penalty = 2, o.presence_penalty = 1;
  Sampler sampler(o);
  sampler.accept(0);
  // 8 / 2 - 1 = 3, not (8 - 1) / 2 = 3.5
  CHECK(sampler.sample(std::vector<float>{8, 3.25f}) == 1);
  CHECK(sampler.sample(std::vector<float>{8, 2.75f}) == 0);
}

TEST_CASE("sampler: the lead is between the two largest logits, penalties included") {
  SamplerOptions o;
  o.temperature = 0, o.presence_penalty = 1;
  Sampler sampler(o);
  CHECK(sampler.lead(std::vector<float>{1, 4, -2, 3.5f}) == 0.5f);
  CHECK(sampler.lead(std::vector<float>{4, 1, 4}) == 0);
  CHECK(sampler.lead(std::vector<float>{-kInf, 4, -kInf}) == kInf);
  sampler.accept(1);
  CHECK(sampler.lead(std::vector<float>{1, 4, -2, 3.5f}) == 0.5f);  // now of token 3
  CHECK(sampler.lead(std::vector<float>{1, 6, -2, 3.5f}) == 1.5f);
  o.temperature = 0.1f;
  CHECK(Sampler(o).lead(std::vector<float>{4, 1, 4}) == kInf);
}

TEST_CASE("sampler: tokens leave the penalty window") {
  SamplerOptions o = plain();
  o.frequency_penalty = 1, o.penalty_window = 2;
  const auto logit_of_0 = [&](int window) {
    o.penalty_window = window;
    Sampler sampler(o);
    for (std::int32_t token : {0, 0, 1, 0, 1}) sampler.accept(token);
    for (const auto& c : sampler.distribution(std::vector<float>{0, 0})) {
      if (c.token == 0) return c.logit;
    }
    return kInf;
  };
  CHECK(logit_of_0(0) == 0);
  CHECK(logit_of_0(1) == 0);
  CHECK(logit_of_0(2) == -1);
  CHECK(logit_of_0(4) == -2);
  CHECK(logit_of_0(5) == -3);
  CHECK(logit_of_0(64) == -3);
  CHECK(logit_of_0(-1) == -3);
}

TEST_CASE("sampler: what is forgotten was never seen, and what had left the window is back") {
  for (int window : {-1, 1, 3, 8}) {
    SamplerOptions o = plain();
    o.presence_penalty = 0.5f, o.frequency_penalty = 0.25f, o.penalty_window = window;
    const std::vector<std::int32_t> tokens = {1, 2, 1, 3, 1, 0, 2, 2};
    for (std::size_t kept = 0; kept <= tokens.size(); ++kept) {
      Sampler rewound(o), fresh(o);
      for (std::int32_t token : tokens) rewound.accept(token);
      rewound.forget(tokens.size() - kept);
      for (std::size_t i = 0; i < kept; ++i) fresh.accept(tokens[i]);
      const std::vector<float> logits = {1, 1.5f, 2, 2.5f, 3};
      for (Sampler* s : {&rewound, &fresh}) s->accept(3);
      const auto a = rewound.distribution(logits), b = fresh.distribution(logits);
      REQUIRE(a.size() == b.size());
      for (std::size_t i = 0; i < a.size(); ++i) {
        CHECK(a[i].token == b[i].token);
        CHECK(a[i].logit == b[i].logit);
      }
    }
  }
}

TEST_CASE("sampler: draws follow the stated formula") {
  SamplerOptions o = plain();
  o.seed = 42;
  Sampler sampler(o);
  std::mt19937_64 engine(42);
  const std::vector<float> logits = {0, 0, 0, 0};  // running sums 1/4, 2/4, 3/4, 1
  for (int i = 0; i < 1000; ++i) CHECK(sampler.sample(logits) == static_cast<int>(engine() >> 62));
}

TEST_CASE("sampler: what top-k keeps is drawn from in the order of distribution()") {
  SamplerOptions o = plain();
  o.seed = 42, o.top_k = 4;
  Sampler sampler(o);
  std::mt19937_64 engine(42);
  const std::vector<float> logits = {1, 3, 0, 3, 3, 2, 3};
  const Tokens order = {1, 3, 4, 6};
  for (int i = 0; i < 100; ++i) CHECK(sampler.sample(logits) == order[engine() >> 62]);
}

TEST_CASE("sampler: frequencies match probabilities") {
  SamplerOptions o = plain();
  o.seed = 1;
  Sampler sampler(o);
  const std::vector<float> logits = log_of(kSkewed);
  std::vector<double> seen(5);
  constexpr int kDraws = 50000;
  for (int i = 0; i < kDraws; ++i) seen[sampler.sample(logits)] += 1;
  double chi_square = 0;
  for (int i = 0; i < 5; ++i) {
    const double expected = kSkewed[i] * kDraws;
    chi_square += (seen[i] - expected) * (seen[i] - expected) / expected;
  }
  CHECK(chi_square < 28.5);  // 4 degrees of freedom: exceeded with probability 1e-5
}

TEST_CASE("sampler: filtered tokens are never drawn") {
  SamplerOptions o = plain();
  o.top_k = 3, o.top_p = 0.8f;  // 0.4, 0.25, 0.2 of 0.85: the first two reach 0.76, all three 1
  o.min_p = 0.55f;              // drops 0.2 / 0.4
  Sampler sampler(o);
  std::vector<float> logits = log_of(kSkewed);
  logits.push_back(-kInf);
  std::map<std::int32_t, int> seen;
  for (int i = 0; i < 2000; ++i) ++seen[sampler.sample(logits)];
  CHECK(seen.size() == 2);
  CHECK(seen.count(1) == 1);
  CHECK(seen.count(3) == 1);
}

TEST_CASE("sampler: a seed decides the tokens") {
  testing::Random random(5);
  const std::vector<float> logits = random.normals(1000);
  const auto draw = [&](std::uint64_t seed) {
    SamplerOptions o;
    o.seed = seed;
    Sampler sampler(o);
    Tokens tokens;
    for (int i = 0; i < 50; ++i)
      tokens.push_back(sampler.sample(logits)), sampler.accept(tokens[i]);
    return tokens;
  };
  CHECK(draw(9) == draw(9));
  CHECK(draw(9) != draw(10));
}

TEST_CASE("sampler: logits that are no distribution are errors that say which") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float temperature : {0.0f, 1.0f}) {
    for (int k : {0, 1, 2}) {
      SamplerOptions o = plain();
      o.temperature = temperature, o.top_k = k;
      Sampler sampler(o);
      CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{1, 0, nan, 0}),
                           "logits: token 2: expected a finite number, found nan", Error);
      CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{1, 0, 0, kInf}),
                           "logits: token 3: expected a finite number, found inf", Error);
      CHECK_THROWS_WITH_AS(sampler.sample(std::vector<float>{-kInf, -kInf}),
                           "logits: expected at least one finite number, found none", Error);
      CHECK_THROWS_AS(sampler.sample(std::vector<float>{}), Error);
    }
  }
}

TEST_CASE("sampler: options out of range are usage errors") {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const auto rejects = [](auto SamplerOptions::*field, auto value) {
    SamplerOptions o;
    o.*field = value;
    CAPTURE(value);
    CHECK_THROWS_AS(Sampler{o}, UsageError);
  };
  for (float x : {-0.1f, nan, kInf}) rejects(&SamplerOptions::temperature, x);
  for (float x : {0.0f, -1.0f, 1.01f, nan}) rejects(&SamplerOptions::top_p, x);
  for (float x : {-0.1f, 1.01f, nan}) rejects(&SamplerOptions::min_p, x);
  for (float x : {0.0f, -1.0f, nan, kInf}) rejects(&SamplerOptions::repeat_penalty, x);
  for (float x : {nan, kInf}) rejects(&SamplerOptions::presence_penalty, x);
  for (float x : {nan, -kInf}) rejects(&SamplerOptions::frequency_penalty, x);
  rejects(&SamplerOptions::top_k, -1);
  rejects(&SamplerOptions::penalty_window, -2);
  CHECK_THROWS_AS(Sampler(SamplerOptions{}).accept(-1), Error);
}

}  // namespace
}  // namespace thaw
