// A context that is too short to freeze: all of it is attended exactly, as full does, to the bit.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "model/forward.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr int kFrom = 60;

KvOptions options(int freeze_from, Policy policy = Policy::kThaw) {
  KvOptions o;
  o.policy.policy = policy;
  o.policy.window = 4;
  o.policy.sinks = 2;
  o.policy.epsilon = 0.05f;
  o.centre_tokens = 16;
  o.freeze_from = freeze_from;
  o.check = true;
  return o;
}

struct Engine {
  testing::TinyModel tiny = testing::make_tiny_model();
  Transformer transformer{tiny.model, 1};

  std::unique_ptr<KvStore> store(const KvOptions& o) {
    return transformer.backend().make_kv_store(kv_shape(tiny.model.config, 256), o);
  }
  std::vector<float> decode(KvStore& kv, std::int32_t token) {
    const auto logits = transformer.forward({&token, 1}, kv, 1, Phase::kDecode);
    return {logits.begin(), logits.end()};
  }
  void prefill(KvStore& kv, int n) {
    std::vector<std::int32_t> tokens;
    for (int i = 0; i < n; ++i) tokens.push_back(i * 7 % 251);
    transformer.prefill(tokens, kv);
  }
};

struct LastStep final : KvRecorder {
  void event(const KvEvent&) override { ++n_events; }
  void step(const KvStep& told) override { step_ = told; }
  KvStep step_ = {};
  int n_events = 0;
};

}  // namespace

TEST_CASE("freeze from: a shorter context is full's to the bit, and holds nothing else") {
  Engine engine;
  const auto full = engine.store(options(0, Policy::kFull)), kv = engine.store(options(kFrom));
  LastStep told;
  kv->record(&told);
  for (KvStore* store : {full.get(), kv.get()}) engine.prefill(*store, 30);
  for (int round = 0; round < 2; ++round) {  // the second is behind a rewind
    int n_other = 0;
    for (std::int32_t t = 30; t < kFrom + 40; ++t) {
      CAPTURE(t);
      const bool same = engine.decode(*kv, t) == engine.decode(*full, t);
      const int kv_len = t + 1;
      if (kv_len >= kFrom) {
        n_other += !same;
        CHECK(kv->ghost_mass().has_value());
        CHECK(!told.step_.all_hot);
        continue;
      }
      CHECK(same);
      CHECK(!kv->ghost_mass());
      CHECK(told.step_.all_hot);
      CHECK(told.step_.layers[0].hot == kv_len);
      CHECK(told.step_.cold_bytes_read == 0);
      const KvUsage used = kv->usage();
      CHECK(used.awake_until == kFrom);
      if (round == 0) CHECK(used.resident == used.full);
      if (round == 0) CHECK(told.n_events == 0);
    }
    CHECK(n_other > 20);  // it does freeze
    CHECK(kv->usage().ghosts > 0);
    CHECK(kv->usage().awake_until == 0);
    for (KvStore* store : {full.get(), kv.get()}) store->rewind(30);
  }
}

TEST_CASE("freeze from: hot tokens are chosen by the last step that attended all") {
  const KvShape shape = {1, 1, 8, 64, KvType::kF32, {{1, 1, 1, 1}}};
  KvOptions o = options(40);
  const auto kv = make_kv_store(shape, o);
  const std::vector<float> x(8 * 37, 1.0f);
  kv->begin(37, Phase::kPrefill);
  kv->append(0, x.data(), x.data(), 37);
  CHECK(kv->stats_rows(37) == 0);  // two more steps see everything
  kv->settle(0, {});
  AttentionStats stats;
  stats.lanes.resize(1);
  for (int kv_len = 38; kv_len < 40; ++kv_len) {
    kv->begin(1, Phase::kDecode);
    kv->append(0, x.data(), x.data(), 1);
    CHECK(kv->view(0).lanes.empty());
    stats.n_rows = kv->stats_rows(1);
    CHECK(stats.n_rows == (kv_len == 39 ? 1 : 0));
    stats.lanes[0].probability.assign(static_cast<std::size_t>(kv_len), 0.001f);
    stats.lanes[0].probability[static_cast<std::size_t>(kv_len == 39 ? 23 : 9)] = 0.5f;
    kv->settle(0, stats.n_rows > 0 ? stats : AttentionStats{});
  }
  kv->begin(1, Phase::kDecode);
  kv->append(0, x.data(), x.data(), 1);
  const KvView view = kv->view(0);
  REQUIRE(view.lanes.size() == 1);
  CHECK(view.ghosts.present());
  std::vector<std::int32_t> hot(view.lanes[0].tokens.begin(), view.lanes[0].tokens.end());
  std::sort(hot.begin(), hot.end());
  CHECK(hot == std::vector<std::int32_t>{0, 1, 23, 35, 36, 37, 38, 39});
}

TEST_CASE("freeze from: a promise of fewer tokens goes first, and a share at once") {
  Engine engine;
  KvOptions tokens = options(kFrom), bytes = tokens, share = tokens;
  tokens.hot_tokens = 24;
  bytes.hot_bytes = 24 * kv_shape(engine.tiny.model.config, 256).bytes_per_token();
  share.hot_fraction = 0.5;
  for (const auto& [o, from] : {std::pair(tokens, 24), {bytes, 24}, {share, 0}}) {
    CAPTURE(from);
    const auto kv = engine.store(o);
    engine.prefill(*kv, 10);
    CHECK(kv->usage().awake_until == from);
    for (std::int32_t t = 10; t < 40; ++t) {
      engine.decode(*kv, t);
      CHECK(kv->ghost_mass().has_value() == (t + 1 >= from));
    }
  }
}
