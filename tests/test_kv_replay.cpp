// The same seed gives the same history of freezes, thaws and recalls, whatever the threads.
#include <doctest/doctest.h>

#include <algorithm>

#include "device/error.h"
#include "model/forward.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

// Every event and step, as one text. Without bytes held, which clear() keeps.
class Log final : public KvRecorder {
 public:
  void event(const KvEvent& e) override {
    text_ += join(static_cast<int>(e.kind), ' ', e.step, ' ', e.layer, ' ', e.head, ' ', e.token,
                  ' ', e.probability, ' ', e.hits, ' ', e.timer, '\n');
    ++counts_[e.kind];
  }
  void step(const KvStep& s) override {
    text_ += join("step ", s.step, ' ', s.length, ' ', s.cold_bytes_read);
    for (const KvStep::Layer& l : s.layers)
      text_ += join(' ', l.entropy, ' ', l.ghost_mass, ' ', l.threshold, ' ', l.hot, ' ', l.budget,
                    ' ', l.recalled, ' ', l.thawed, ' ', l.frozen);
    text_ += '\n';
  }
  const std::string& text() const { return text_; }
  int count(KvEvent::Kind kind) const { return counts_[kind]; }

 private:
  std::string text_;
  int counts_[KvEvent::kRewind + 1] = {};
};

KvOptions options(Policy policy) {
  KvOptions o;
  o.policy.policy = policy;
  o.policy.window = 8;
  o.policy.sinks = 2;
  o.policy.epsilon = 0.01f;
  o.policy.softness = 0.5f;
  o.centre_tokens = 16;
  o.check = true;
  if (policy == Policy::kH2o || policy == Policy::kBudget) o.hot_tokens = 24;
  return o;
}

// Greedy decoding with a rewind, a second prompt and a reset on the way.
void live(Transformer& transformer, KvStore& kv) {
  std::vector<std::int32_t> prompt;
  for (int i = 0; i < 90; ++i) prompt.push_back(i * 7 % 251);
  const auto decode = [&](std::span<const float> logits, int n) {
    for (; n > 0; --n) {
      const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      const std::int32_t token = static_cast<std::int32_t>(best);
      logits = transformer.forward({&token, 1}, kv, 1, Phase::kDecode);
    }
  };
  decode(transformer.prefill(prompt, kv), 50);
  kv.rewind(120);
  decode(transformer.prefill(std::span(prompt).first(20), kv), 20);
  kv.reset(Rung::kWindow);
  decode(transformer.prefill(std::span(prompt).first(1), kv), 20);
}

std::string history(const testing::TinyModel& tiny, Policy policy, int n_threads, Log& log) {
  const Config& c = tiny.model.config;
  Transformer transformer(tiny.model, n_threads);
  auto kv = transformer.backend().make_kv_store(kv_shape(c, 256), options(policy));
  kv->record(&log);
  live(transformer, *kv);
  return log.text();
}

}  // namespace

TEST_CASE("kv store: every policy replays the same history, on any number of threads") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  for (const Policy policy :
       {Policy::kWindow, Policy::kH2o, Policy::kBudget, Policy::kAsr, Policy::kThaw}) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    Log first;
    const std::string expected = history(tiny, policy, 1, first);
    for (const int n_threads : {1, 2, 3}) {
      Log log;
      CHECK((history(tiny, policy, n_threads, log) == expected));
    }
    CHECK(first.count(KvEvent::kFreeze) > 50);
    CHECK(first.count(KvEvent::kRewind) == 1);
    if (policy == Policy::kThaw) CHECK(first.count(KvEvent::kRecall) > 10);
    if (policy == Policy::kAsr) CHECK(first.count(KvEvent::kThaw) > 50);
  }
}

TEST_CASE("kv store: a cleared store lives as a new one does") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const Config& c = tiny.model.config;
  Transformer transformer(tiny.model, 1);
  for (const Policy policy :
       {Policy::kWindow, Policy::kH2o, Policy::kBudget, Policy::kAsr, Policy::kThaw}) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    auto kv = make_kv_store(kv_shape(c, 256), options(policy));
    Log first, second;
    // Straight from an empty store, then a life.
    const auto from_nothing = [&] {
      for (std::int32_t token = 1; token < 40; ++token)
        transformer.forward({&token, 1}, *kv, 1, Phase::kDecode);
      kv->rewind(0);
      live(transformer, *kv);
    };
    kv->record(&first);
    from_nothing();
    kv->reset(Rung::kFull);
    kv->record(nullptr);
    kv->clear();
    CHECK(kv->counters().steps == 0);
    kv->record(&second);
    from_nothing();
    CHECK((first.text() == second.text()));
  }
}
