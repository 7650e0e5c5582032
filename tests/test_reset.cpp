// What each rung of recovery thaws in a store, and for how long it helps.
#include <doctest/doctest.h>

#include <algorithm>

#include "kvstore/recovery.h"
#include "tests/told_store.h"

using namespace thaw;
using namespace thaw::testing;

TEST_CASE("reset: each rung wakes what it names") {
  KvOptions o = options(Policy::kAsr, 4, 0);
  o.policy.softness = 0.1f;  // 10 steps
  const auto low = [](int, int token) { return token < 20 ? static_cast<float>(token) : 99.0f; };
  for (const Rung rung : {Rung::kSoft, Rung::kWindow, Rung::kFull, Rung::kRewalk}) {
    Told asr(o);
    asr.prefill(20, nobody, low);
    asr.decode(nobody, low);
    CHECK(asr.hot().size() == 11);
    const double thawed = asr.kv().reset(rung);
    asr.kv().check();
    if (rung <= Rung::kWindow) {
      CHECK(thawed == 10);
      CHECK(asr.hot() == range(0, 21));
    } else {  // everything is attended for a while, and then all are awake
      CHECK(asr.kv().view(0).lanes.empty());
      for (int step = 0; step < 16; ++step) asr.decode(nobody, low);
      asr.kv().begin(1, Phase::kDecode);
      CHECK(asr.kv().usage().hot > 0);
      CHECK_FALSE(asr.kv().view(0).lanes.empty());
      CHECK(asr.kv().view(0).lanes[0].hot.n_rows == 37);
    }
  }
  Told thaw(options(Policy::kThaw, 2, 1));
  thaw.prefill(20, [](int, int token) { return token == 8 ? 0.1f : 0.0f; });
  for (int step = 0; step < 3; ++step) thaw.decode(nobody);
  CHECK_FALSE(thaw.is_hot(8));
  CHECK(thaw.kv().reset(Rung::kNone) == 0);
  CHECK(thaw.kv().reset(Rung::kWindow) > 0);
  CHECK(thaw.is_hot(8));
  thaw.kv().check();
}

TEST_CASE("reset: when room is short the newest of those that froze lately are woken") {
  KvOptions o = options(Policy::kThaw, 2, 1);
  o.hot_tokens = 6;
  Told thaw(o);
  const auto on = [](std::vector<int> tokens) {
    return [=](int, int token) {
      return std::count(tokens.begin(), tokens.end(), token) > 0 ? 0.1f : 0.0f;
    };
  };
  thaw.prefill(20, on({5, 8, 11}));
  thaw.decode(nobody);
  CHECK(thaw.hot() == std::vector<int>{0, 19, 20});
  thaw.kv().reset(Rung::kWindow);  // 18, 11, 8 and 5 froze, and three fit
  CHECK(thaw.hot() == std::vector<int>{0, 8, 11, 18, 19, 20});
}

TEST_CASE("reset: what froze long ago stays frozen") {
  Told thaw(options(Policy::kThaw, 2, 1));
  thaw.prefill(20, [](int, int token) { return token == 8 ? 0.1f : 0.0f; });
  for (int step = 0; step < 65; ++step) thaw.decode(nobody);
  CHECK(thaw.kv().reset(Rung::kWindow) == 64);  // 8 and 18 froze in step 0, 19 to 82 since
  CHECK(thaw.hot() == joined({0}, range(19, 85)));
}

TEST_CASE("reset: a milder rung does not shorten the help of a stronger one") {
  KvOptions o = options(Policy::kH2o, 2, 1);
  o.hot_tokens = 6;
  Told h2o(o);
  h2o.prefill(20, nobody);
  h2o.decode(nobody);
  h2o.kv().reset(Rung::kFull);
  h2o.kv().reset(Rung::kSoft);
  for (int step = 0; step < 16; ++step) {
    CHECK(h2o.kv().view(0).lanes.empty());
    h2o.decode(nobody);
  }
  CHECK(h2o.kv().view(0).lanes.size() == 1);
}

TEST_CASE("reset: help outlives a rewind, and ends with the text or when it is told to") {
  Told thaw(options(Policy::kThaw, 2, 1));
  const auto alarm = [&] {
    thaw.prefill(20, nobody);
    thaw.decode(nobody);
    const float usual = thaw.kv().view(0).recall;
    thaw.kv().reset(Rung::kSoft);
    CHECK(thaw.kv().view(0).recall == kAlarmEpsilon * usual);
    return usual;
  };
  const float usual = alarm();
  for (const int position : {10, 0}) {
    thaw.kv().rewind(position);
    CHECK(thaw.kv().view(0).recall == kAlarmEpsilon * usual);
  }
  thaw.kv().reset(Rung::kNone);
  CHECK(thaw.kv().view(0).recall == usual);
  alarm();
  thaw.kv().clear();
  CHECK(thaw.kv().view(0).recall == usual);
}

TEST_CASE("reset: a full reset lasts as long as it is asked to") {
  Told thaw(options(Policy::kThaw, 2, 1));
  thaw.prefill(20, nobody);
  thaw.decode(nobody);
  thaw.kv().reset(Rung::kFull, 30);
  for (int step = 0; step < 30; ++step) {
    CHECK(thaw.kv().view(0).lanes.empty());
    thaw.decode(nobody);
  }
  CHECK(thaw.kv().view(0).lanes.size() == 1);
}

TEST_CASE("ghost mass: a step that attends every token exactly has none, not that of one before") {
  Told thaw(options(Policy::kThaw, 2, 1));
  thaw.ghost_mass(0.25f);
  CHECK_FALSE(thaw.kv().ghost_mass());
  thaw.prefill(20, nobody);
  CHECK_FALSE(thaw.kv().ghost_mass());
  thaw.decode(nobody);
  CHECK(thaw.kv().ghost_mass() == 0.25f);
  thaw.kv().reset(Rung::kFull, 1);
  thaw.decode(nobody);
  CHECK_FALSE(thaw.kv().ghost_mass());
  thaw.decode(nobody);
  CHECK(thaw.kv().ghost_mass() == 0.25f);
}
