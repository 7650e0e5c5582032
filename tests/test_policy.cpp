// The policies: each formula by examples worked out by hand, and each rule on a made-up history of
// attention, through the store.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>

#include "kvstore/kvstore.h"
#include "kvstore/policy.h"
#include "tests/error_of.h"
#include "tests/told_store.h"

using namespace thaw;
using namespace thaw::testing;

TEST_CASE("policy: the window is always hot; of h2o half the room, of window all but the sinks") {
  PolicyParams p;
  p.policy = Policy::kThaw;
  p.sinks = 2, p.window = 3;
  CHECK(first_recent(p, 20, 12) == 17);
  p.policy = Policy::kH2o;
  CHECK(first_recent(p, 20, 12) == 14);
  CHECK(first_recent(p, 20, 5) == 17);  // half the room is less than the window
  p.sinks = 7;
  CHECK(first_recent(p, 20, 12) == 15);  // and here sinks leave less than half
  p.policy = Policy::kWindow;
  CHECK(first_recent(p, 20, 12) == 15);
  p.policy = Policy::kThaw;
  p.window = 0;
  CHECK(first_recent(p, 20, 12) == 20);
}

TEST_CASE("policy: hits keep hot for floor(kappa sqrt(c)) steps, low scores send to sleep") {
  PolicyParams p;
  p.stay = 2;
  const int stays[] = {0, 2, 2, 3, 4, 4, 4, 5, 5, 6};
  for (int hits = 0; hits < 10; ++hits) CHECK(stay_steps(p, hits) == stays[hits]);
  p.stay = 0.5f;
  CHECK(stay_steps(p, 3) == 0);
  CHECK(stay_steps(p, 4) == 1);
  p.softness = 2;
  for (int c = 0; c < 40; ++c)
    CHECK(sleep_steps(p, c) == (c < 4 ? 0 : c < 16 ? 1 : c < 36 ? 2 : 3));
  p.softness = 1;
  CHECK(sleep_steps(p, 9) == 3);
  p.stay = 255, p.softness = 0.01f;  // what the flags allow fits the timers' 16 bits
  CHECK(stay_steps(p, 65535) <= 65535);
  CHECK(sleep_steps(p, 65535) <= 65535);
}

TEST_CASE("policy: thaw restarts the timer on a hit, and counts it down otherwise") {
  PolicyParams p;
  p.stay = 2;
  std::uint16_t hits = 0, timer = 0;
  CHECK(thaw_stays(p, 0.01f, 0.01f, false, hits, timer));  // reaching epsilon is a hit
  CHECK(hits == 1);
  CHECK(timer == 2);
  CHECK(thaw_stays(p, 0.0099f, 0.01f, false, hits, timer));
  CHECK(timer == 1);
  CHECK_FALSE(thaw_stays(p, 0, 0.01f, false, hits, timer));
  CHECK(timer == 0);
  CHECK(thaw_stays(p, 0, 0.01f, true, hits, timer));
  CHECK(hits == 1);
  for (int i = 0; i < 3; ++i) thaw_stays(p, 1, 0.01f, false, hits, timer);
  CHECK(hits == 4);
  CHECK(timer == 4);
  hits = 0xffff;
  thaw_stays(p, 1, 0.01f, false, hits, timer);
  CHECK(hits == 0xffff);
}

TEST_CASE("policy: asr counts a score below tau outside the window, and nothing else") {
  PolicyParams p;
  p.softness = 1;
  std::uint16_t low = 0;
  CHECK(asr_sleep(p, 0.5f, 0.5f, false, low) == 0);
  CHECK(asr_sleep(p, 0.1f, 0.5f, true, low) == 0);
  CHECK(low == 0);
  for (const int steps : {1, 1, 1, 2, 2, 2, 2, 2, 3})
    CHECK(asr_sleep(p, 0.1f, 0.5f, false, low) == steps);
  CHECK(low == 9);
}

TEST_CASE("policy: the entropy score is p e^H, and a layer's share its part of all entropies") {
  CHECK(entropy_score(0.25f, 1) == 0.25f);
  CHECK(entropy_score(0.01f, 100) == doctest::Approx(1));
  CHECK(layer_share(1, 4) == 0.25f);
  CHECK(layer_share(3, 4) == 0.75f);
}

TEST_CASE("full: everything is attended exactly, and nothing is asked of attention") {
  Told full(options(Policy::kFull, 2, 1));
  full.prefill(10, nobody);
  full.decode(nobody);
  CHECK(full.kv().view(0).lanes.empty());
  CHECK(full.kv().view(0).kv_len == 11);
  CHECK(full.kv().stats_rows(5) == 0);
  CHECK(full.kv().counters().attended == 11);
}

TEST_CASE("thaw: caution grows with what scores err by, and ends where its room does") {
  PolicyParams p;
  p.epsilon = 0.01f, p.caution = 2;
  const Caution c = caution_of(p);
  CHECK(c.least == doctest::Approx(0.01 / 16).scale(0));
  CHECK(c.factor(0.4f, 0.01f) == 1);
  CHECK(c.factor(0, 0.01f) == 1);
  CHECK(c.factor(0.9f, 0.01f) == doctest::Approx(std::exp(2 * (0.9 - 0.4))));
  CHECK(c.factor(5, 0.01f) == doctest::Approx(16));
  CHECK(c.factor(1e30f, 0.01f) == doctest::Approx(16));
  CHECK(c.factor(5, 0.0025f) == doctest::Approx(4));  // an alarm
  CHECK(c.factor(5, c.least) == 1);                   // who has room at all
  p.caution = 0;
  CHECK(caution_of(p).factor(5, 0.01f) == 1);
}

TEST_CASE("window: sinks and the window stay, whatever attention says; both are parameters") {
  for (const int window : {3, 5}) {
    for (const int sinks : {0, 2}) {
      Told w(options(Policy::kWindow, window, sinks));
      w.prefill(20, nobody);
      for (int n = 21; n < 30; ++n) {
        w.decode([](int, int token) { return token == 10 ? 1.0f : 0.0f; });
        // The window, and the newest token.
        CHECK(w.hot() == joined(range(0, sinks), range(n - window - 1, n)));
      }
    }
  }
  KvOptions bounded = options(Policy::kWindow, 3, 2);
  bounded.hot_tokens = 9;  // a bound widens the window
  Told w(bounded);
  w.prefill(20, nobody);
  w.decode(nobody);
  CHECK(w.hot() == std::vector<int>{0, 1, 14, 15, 16, 17, 18, 19, 20});
}

TEST_CASE("h2o: heavy hitters and the recent half stay, and who has left never comes back") {
  KvOptions o = options(Policy::kH2o, 2, 1);
  o.hot_tokens = 8;
  Told h2o(o);
  // By accumulated attention over 20 rows: 7, 5, 9 are the heaviest.
  const auto prompt = [](int, int token) {
    return token == 7 ? 0.3f : token == 5 ? 0.2f : token == 9 ? 0.05f : 0.01f;
  };
  h2o.prefill(20, prompt);
  h2o.decode([](int, int token) { return token == 5 ? 0.5f : 0.0f; });
  // At most 8: a sink, the recent half (17 to 20), and 3 by weight; the ties of .01 lose.
  CHECK(h2o.hot() == std::vector<int>{0, 5, 7, 9, 17, 18, 19, 20});
  std::vector<int> left = range(1, 17);
  std::erase_if(left, [](int t) { return t == 5 || t == 7 || t == 9; });
  // Token 18 becomes heavier than 9: 9 leaves when 18 is no longer recent.
  for (int n = 0; n < 12; ++n) {
    h2o.decode([](int, int token) { return token == 18 ? 0.9f : 0.0f; });
    for (const int token : left) CHECK_FALSE(h2o.is_hot(token));
    CHECK(h2o.hot().size() == 8);
  }
  CHECK(h2o.is_hot(18));
  CHECK(h2o.is_hot(7));
  CHECK(h2o.kv().counters().thawed == 0);
}

TEST_CASE("h2o: a prompt's attention counts once for each of its rows") {
  KvOptions o = options(Policy::kH2o, 2, 1);
  o.hot_tokens = 6;  // a sink, the recent three, and two by weight
  Told h2o(o);
  // Over 20 rows token 9 gathers 1.0, which 18 does not reach with 0.2 and 0.05 a step.
  h2o.prefill(20, [](int, int token) { return token == 7 ? 0.3f : token == 9 ? 0.05f : 0.01f; });
  for (int n = 0; n < 6; ++n) h2o.decode([](int, int token) { return token == 18 ? 0.05f : 0.0f; });
  CHECK(h2o.hot() == std::vector<int>{0, 7, 9, 23, 24, 25});
}

TEST_CASE("h2o: sinks have precedence over the recent half, and both over the bound") {
  KvOptions o = options(Policy::kH2o, 2, 8);
  o.hot_tokens = 11;
  Told h2o(o);
  h2o.prefill(30, nobody);
  h2o.decode(nobody);
  CHECK(h2o.hot() == joined(range(0, 8), {28, 29, 30}));
}

TEST_CASE("budget: layers of more entropy keep more, the total is kept, one set a layer") {
  KvOptions o = options(Policy::kBudget, 2, 1);
  o.hot_tokens = 12;
  Told b(o, 3);
  b.entropies({1, 2, 3});
  b.prefill(60, [](int, int token) { return 1.0f / static_cast<float>(token + 1); });
  b.decode(nobody);
  CHECK(b.hot(0).size() == 6);
  CHECK(b.hot(1).size() == 12);
  CHECK(b.hot(2).size() == 18);
  CHECK(b.hot(1) == joined(range(0, 10), {59, 60}));  // the most attended, and the newest
}

TEST_CASE("budget: the entropy is that of all rows of the prompt, however they were batched") {
  KvOptions o = options(Policy::kBudget, 2, 1);
  o.hot_tokens = 12;
  Told b(o, 3);
  const auto first = [](int, int token) { return 1.0f / static_cast<float>(token + 1); };
  b.entropies({1, 2, 3});
  b.prefill(45, first);
  b.entropies({5, 2, 7});  // a quarter of the rows: 2, 2, 4
  b.prefill(15, first);
  b.decode(nobody);
  CHECK(b.hot(0).size() == 9);
  CHECK(b.hot(1).size() == 9);
  CHECK(b.hot(2).size() == 18);
  b.entropies({9, 1, 1});
  b.kv().reset(Rung::kFull, 2);  // exact steps of the answer are no prompt
  for (int step = 0; step < 3; ++step) b.decode(nobody);
  CHECK(b.hot(2).size() == 18);
}

TEST_CASE("budget: a promise in bytes that holds the whole context freezes nobody") {
  KvOptions o = options(Policy::kBudget, 4, 2);
  o.hot_bytes = 104 * 3 * 2 * kDim * 4;  // 13 pages of each layer
  Told b(o, 3);
  b.entropies({0.1f, 2, 3});
  b.prefill(100, nobody);
  b.decode(nobody);
  for (int layer = 0; layer < 3; ++layer) CHECK(b.hot(layer).size() == 101);
}

TEST_CASE("budget: a layer keeps its sinks and window, and needs no more than there is") {
  KvOptions o = options(Policy::kBudget, 4, 2);
  o.hot_tokens = 20;
  Told b(o, 3);
  b.entropies({1e-5f, 1, 3});
  b.prefill(30, nobody);
  b.decode(nobody);
  CHECK(b.hot(0).size() == 7);                    // sinks, window, and the newest
  CHECK(b.hot(2).size() == 31);                   // everything
  CHECK(b.hot(1).size() == 60 - 7 - 31);          // the rest
  for (int n = 0; n < 60; ++n) b.decode(nobody);  // there is more now: by entropy again
  CHECK(b.hot(0).size() == 7);
  CHECK(b.hot(1).size() == 13);
  CHECK(b.hot(2).size() == 39);
}

TEST_CASE("budget: a promise in bytes holds however entropies differ") {
  KvOptions o = options(Policy::kBudget, 4, 2);
  const std::int64_t token = 3 * 2 * kDim * 4;  // bytes over all layers
  o.hot_bytes = 24 * token;
  Told b(o, 3);
  b.entropies({0.1f, 2, 3});
  b.prefill(100, nobody);
  for (int n = 0; n < 40; ++n) b.decode(nobody);
  CHECK(b.kv().usage().hot <= o.hot_bytes);
  CHECK(b.hot(0).size() <= b.hot(1).size());
  CHECK(b.hot(1).size() <= b.hot(2).size());
  CHECK(b.hot(0).size() + b.hot(1).size() + b.hot(2).size() >= 64);
}

TEST_CASE("budget: a layer whose share grows takes the pages of one whose share falls") {
  KvOptions o = options(Policy::kBudget, 4, 2);
  o.hot_bytes = 16 * 2 * 2 * kDim * 4;  // 16 tokens of both layers
  Told b(o, 2);
  b.entropies({0.1f, 4});
  b.prefill(40, nobody);
  b.decode(nobody);
  CHECK(b.hot(0).size() == 8);
  CHECK(b.hot(1).size() == 24);
  b.entropies({40, 0.1f});  // another turn, a third of the rows
  b.prefill(20, nobody);
  b.decode(nobody);
  CHECK(b.hot(0).size() == 24);
  CHECK(b.hot(1).size() == 8);
}

TEST_CASE("asr: a low score is followed by floor(sqrt(c) / k) steps of sleep and another look") {
  KvOptions o = options(Policy::kAsr, 4, 0);
  o.policy.softness = 0.5f;  // 2 sqrt(c): 2, 2, 3, 4 ... steps
  Told asr(o);
  // tau is the median of the prompt's relevances, 0 to 19: 10.
  const auto relevance = [](int, int token) {
    return token < 20 ? static_cast<float>(token) : 1000.0f;
  };
  asr.prefill(20, nobody, relevance);
  asr.decode(nobody, relevance);
  CHECK(asr.hot() == range(10, 21));  // below tau sleeps: they were judged in this step
  std::vector<bool> awake;
  for (int step = 0; step < 14; ++step) {
    asr.decode(nobody, relevance);
    awake.push_back(asr.is_hot(3));
    CHECK(asr.is_hot(10));
  }
  // c = 1: asleep for 2 steps, of which the first is over in the first step here; in the step that
  // wakes it, it is not attended; the next one judges it. c = 2: 2 steps, c = 3: 3, c = 4: 4.
  const std::vector<bool> expected = {false, true, false, false, true,  false, false,
                                      false, true, false, false, false, false, true};
  CHECK(std::vector<bool>(awake.begin(), awake.end()) == expected);
}

TEST_CASE("asr: a woken token that has become relevant stays awake") {
  KvOptions o = options(Policy::kAsr, 4, 0);
  o.policy.softness = 0.5f;
  Told asr(o);
  const auto relevance = [](int, int token) { return static_cast<float>(token); };
  asr.prefill(20, nobody, relevance);
  asr.decode(nobody, relevance);
  CHECK_FALSE(asr.is_hot(3));
  for (int step = 0; step < 10; ++step)
    asr.decode(nobody, [](int, int token) { return token == 3 ? 99.0f : 0.0f; });
  CHECK(asr.is_hot(3));
}

TEST_CASE("asr: softness and the quantile of tau are parameters, and a bound puts more to sleep") {
  const auto relevance = [](int, int token) { return static_cast<float>(token); };
  const auto hot_after = [&](float softness, float quantile, int bound) {
    KvOptions o = options(Policy::kAsr, 4, 0);
    o.policy.softness = softness;
    o.policy.quantile = quantile;
    o.hot_tokens = bound;
    Told asr(o);
    asr.prefill(40, nobody, relevance);
    asr.decode(nobody, relevance);
    return asr.hot().size();
  };
  CHECK(hot_after(0.5f, 0.5f, 0) == 21);
  CHECK(hot_after(0.5f, 0.25f, 0) == 31);
  CHECK(hot_after(0.5f, 1.0f, 0) == 4);   // tau is the largest relevance of the prompt
  CHECK(hot_after(2.0f, 0.5f, 0) == 41);  // a first low score sleeps floor(1 / 2) steps
  CHECK(hot_after(2.0f, 0.5f, 12) == 12);
}

TEST_CASE("thaw: the prompt's attention decides who starts hot, for kappa steps") {
  KvOptions o = options(Policy::kThaw, 2, 1);
  o.policy.epsilon = 0.1f;
  o.policy.stay = 2;
  Told thaw(o);
  thaw.prefill(20, [](int, int token) { return token == 8 ? 0.1f : 0.05f; });
  thaw.decode(nobody);  // stay_steps(1) = 2: one is left
  CHECK(thaw.hot() == std::vector<int>{0, 8, 19, 20});
  thaw.decode(nobody);
  CHECK(thaw.hot() == std::vector<int>{0, 20, 21});
}

TEST_CASE("thaw: a recalled token stays for kappa sqrt(hits) steps after each time it is needed") {
  for (const float stay : {1.0f, 2.0f, 3.0f}) {
    KvOptions o = options(Policy::kThaw, 2, 1);
    o.policy.epsilon = 0.1f;
    o.policy.stay = stay;
    Told thaw(o);
    thaw.prefill(20, nobody);
    thaw.decode(nobody);
    for (int hits = 1; hits <= 10; ++hits) {
      CAPTURE(hits);
      CHECK_FALSE(thaw.is_hot(5));
      thaw.decode(nobody, {}, {{5, 0.2f}});
      const int steps = stay_steps(o.policy, hits);
      for (int step = 0; step < steps; ++step) {
        CHECK(thaw.is_hot(5));
        thaw.decode(nobody);
      }
    }
    CHECK(thaw.kv().counters().recalled == 10);
    CHECK(thaw.kv().counters().thawed == 10);
  }
}

TEST_CASE("thaw: a token recalled in vain, or with kappa 0, is read and stays frozen") {
  KvOptions o = options(Policy::kThaw, 2, 1);
  o.policy.epsilon = 0.1f;
  Told thaw(o);
  thaw.prefill(20, nobody);
  thaw.decode(nobody, {}, {{5, 0.09f}});  // the ghost promised more than the token held
  CHECK_FALSE(thaw.is_hot(5));
  o.policy.stay = 0;
  Told reads(o);
  reads.prefill(20, nobody);
  reads.decode(nobody, {}, {{5, 0.9f}});
  CHECK(reads.hot() == std::vector<int>{0, 19, 20});
  CHECK(reads.kv().counters().recalled == 1);
}

TEST_CASE("thaw: when room is short, the token of the least p e^H makes room") {
  KvOptions o = options(Policy::kThaw, 2, 1);
  o.policy.epsilon = 0.01f;
  o.policy.stay = 50;
  o.hot_tokens = 5;
  Told thaw(o);
  thaw.entropies({2});
  thaw.prefill(20, nobody);
  thaw.decode(nobody, {}, {{5, 0.3f}, {6, 0.2f}});
  CHECK(thaw.hot() == std::vector<int>{0, 5, 6, 19, 20});
  // 19 has left the window, and ranks lowest; 7 ranks above 6; 8 below all.
  const auto attention = [](int, int token) {
    return token == 5 ? 0.3f : token == 6 ? 0.2f : 0.0f;
  };
  thaw.decode(attention, {}, {{7, 0.25f}, {8, 0.02f}});
  CHECK(thaw.hot() == std::vector<int>{0, 5, 7, 20, 21});
  thaw.decode([](int, int token) { return token == 5   ? 0.1f
                                          : token == 7 ? 0.3f
                                                       : 0.0f; }, {},
              {{6, 0.2f}});  // what counts is this step
  CHECK(thaw.hot() == std::vector<int>{0, 6, 7, 21, 22});
}

TEST_CASE("thaw: epsilon decides who is recalled and seeded, and a soft alarm divides it by 4") {
  KvOptions o = options(Policy::kThaw, 2, 1);
  o.policy.epsilon = 0.04f;
  Told thaw(o);
  thaw.prefill(20, nobody);
  thaw.decode(nobody);
  CHECK(thaw.kv().view(0).recall == 0.04f);
  thaw.kv().reset(Rung::kSoft);
  CHECK(thaw.kv().view(0).recall == 0.01f);
  for (int step = 0; step < 16; ++step) thaw.decode(nobody);
  CHECK(thaw.kv().view(0).recall == 0.04f);
}

TEST_CASE("thaw: heads decide for themselves, or together; ghosts have as many bits as asked") {
  for (const bool per_head : {true, false}) {
    KvOptions o = options(Policy::kThaw, 2, 1);
    o.policy.per_head = per_head;
    o.policy.ghost_key_bits = 2;
    o.policy.ghost_value_bits = 4;
    auto kv = make_kv_store({1, 3, kDim, 64, KvType::kF32}, o);
    const std::vector<float> x(3 * kDim * 8, 1.0f);
    kv->begin(8, Phase::kPrefill);
    kv->append(0, x.data(), x.data(), 8);
    kv->settle(0, {});
    kv->begin(1, Phase::kDecode);
    kv->append(0, x.data(), x.data(), 1);
    const KvView view = kv->view(0);
    CHECK(view.lanes.size() == (per_head ? 3u : 1u));
    CHECK(view.lane_heads == (per_head ? 1 : 3));
    CHECK(view.ghosts.format.key_bits == 2);
    CHECK(view.ghosts.format.value_bits == 4);
  }
}
