// Who is hot on the device against who is hot in host memory, step by step, on the same statistics.
#include "tests/sanitized.h"
#include "tests/simt/both_stores.h"

using namespace thaw;
using testing::BothStores;
using testing::Mood;

namespace {

KvOptions options_of(Policy policy) {
  KvOptions o = testing::thaw_options();
  o.policy.policy = policy;
  o.policy.softness = 0.5f;
  return o;
}

const int kLayers = simt::kIsSlow ? 1 : 2;

constexpr Policy kPolicies[] = {Policy::kThaw, Policy::kWindow, Policy::kH2o, Policy::kBudget,
                                Policy::kAsr};

// A prompt, steps of every mood, cuts into the prompt and to nothing, and prompts after steps.
void live(BothStores& both) {
  const auto decode = [&](int n_steps, Mood mood) {
    both.decode(simt::kIsSlow ? 1 : n_steps, mood);
  };
  both.prefill(45, Mood::kPlain);
  decode(12, Mood::kPlain);
  decode(6, Mood::kTies);
  both.rewind(both.cpu->length() - 4);
  decode(3, Mood::kAllHit);
  decode(6, Mood::kNoneHit);
  both.prefill(9, Mood::kTies);
  decode(8, Mood::kPlain);
  both.rewind(10);
  decode(12, Mood::kTies);
  both.rewind(0);
  decode(3, Mood::kPlain);
  both.prefill(40, Mood::kTies);
  decode(10, Mood::kTies);
}

}  // namespace

TEST_CASE("cuda residency: every policy, per head and per layer, decides as on the CPU") {
  for (const Policy policy : kPolicies)
    for (const bool per_head : {true, false}) {
      if (policy != Policy::kThaw && per_head) continue;
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CAPTURE(per_head);
      KvOptions options = options_of(policy);
      options.policy.per_head = per_head;
      BothStores both({kLayers, 2, 8, 200, KvType::kF16, {}}, options, 7);
      live(both);
      CHECK((both.n_compared > 400 || simt::kIsSlow));
    }
}

TEST_CASE("cuda residency: pages go from layer to layer with their budgets, as on the CPU") {
  const KvShape shape = {2, 2, 8, 400, KvType::kF16, {}};
  KvOptions options = options_of(Policy::kBudget);
  options.hot_bytes = 40 * shape.bytes_per_token();
  options.check = true;
  BothStores both(shape, options, 11);
  for (const int n : {20, 20, 40, 80, 160}) {  // each draws other entropies, for half of all rows
    both.prefill(n, Mood::kPlain);
    both.decode(1, Mood::kPlain);
  }
  both.cuda->check();
}

TEST_CASE("cuda residency: batches, rewinds and budgets in pages take turns, as on the CPU") {
  const KvShape shape = {2, 2, 8, 400, KvType::kF16, {}};
  KvOptions options = options_of(Policy::kBudget);
  options.hot_bytes = 40 * shape.bytes_per_token();
  options.check = true;
  BothStores both(shape, options, 11);
  for (const int n : {20, 20, 40, 80, 160}) {
    both.prefill(n, Mood::kPlain);
    both.rewind(both.cpu->length() - n / 2 - 5);
    both.decode(9, Mood::kPlain);
  }
  both.cuda->check();
}

TEST_CASE("cuda residency: help of recovery lasts and ends when it is told to, as on the CPU") {
  BothStores both({kLayers, 2, 8, 200, KvType::kF16, {}}, options_of(Policy::kThaw), 7);
  both.prefill(45, Mood::kPlain);
  both.decode(2, Mood::kNoneHit);
  for (const int steps : {3, 20}) {
    both.reset(Rung::kFull, steps);
    both.decode(simt::kIsSlow ? 4 : steps + 1, Mood::kTies);
    CHECK((both.cuda->ghost_mass().has_value() || simt::kIsSlow));
  }
  for (const Rung rung : {Rung::kSoft, Rung::kFull}) {
    both.reset(rung, 20);
    both.reset(Rung::kNone, 0);
    both.decode(2, Mood::kPlain);
    CHECK(both.cuda->ghost_mass().has_value());
  }
}

// Rungs between steps, alone, one after the other and in the middle of what an earlier one began.
void recover(BothStores& both) {
  both.reset(Rung::kWindow);
  both.prefill(45, Mood::kPlain);
  both.reset(Rung::kWindow);
  for (const Rung rung : {Rung::kSoft, Rung::kWindow, Rung::kFull, Rung::kRewalk}) {
    if (simt::kIsSlow && rung == Rung::kRewalk) continue;
    CAPTURE(kRungNames[static_cast<int>(rung)]);
    both.decode(simt::kIsSlow ? 1 : 5, Mood::kNoneHit);
    both.reset(rung);
    both.decode(simt::kIsSlow ? 2 : 18, Mood::kTies);
    both.reset(rung);
    both.decode(2, Mood::kPlain);
    both.reset(Rung::kWindow);
    both.reset(Rung::kSoft);
    both.rewind(both.cpu->length() - 3);
    both.decode(simt::kIsSlow ? 1 : 3, Mood::kPlain);
    both.prefill(1, Mood::kTies);
    both.reset(Rung::kFull);
    both.decode(simt::kIsSlow ? 1 : 18, Mood::kTies);
    both.cuda->check();
  }
  both.reset(Rung::kFull);
  both.rewind(0);
  both.decode(2, Mood::kTies);
}

TEST_CASE("cuda residency: every rung of recovery wakes whom it wakes on the CPU") {
  for (const Policy policy : kPolicies) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    double n_woken = 0;
    for (const int bound : {0, 13, 60}) {
      if (simt::kIsSlow && bound != 0) continue;
      CAPTURE(bound);
      KvOptions options = options_of(policy);
      options.hot_tokens = bound;
      options.check = bound == 60;
      BothStores both({kLayers, 2, 8, 300, KvType::kF16, {}}, options, 3);
      recover(both);
      n_woken += both.n_woken;
    }
    const bool timed = policy == Policy::kThaw || policy == Policy::kAsr;
    CHECK((n_woken > 0 || !timed));
  }
}

TEST_CASE("cuda residency: a recorder is told of each decision, as by the CPU and in that order") {
  std::size_t n_events[6] = {};
  for (const Policy policy : kPolicies)
    for (const int bound : {0, 24}) {
      if (simt::kIsSlow && bound == 0) continue;
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CAPTURE(bound);
      KvOptions options = options_of(policy);
      options.hot_tokens = bound;
      BothStores both({kLayers, 2, 8, 300, KvType::kF16, {}}, options, 5, true);
      live(both);
      both.cpu->clear(), both.cuda->clear();
      recover(both);
      for (std::size_t kind = 0; kind < 6; ++kind) n_events[kind] += both.n_events[kind];
    }
  for (const std::size_t n : n_events) CHECK((n > 20 || simt::kIsSlow));
}

TEST_CASE("cuda residency: invariants hold after every step") {
  for (const Policy policy : kPolicies) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    KvOptions options = options_of(policy);
    options.check = true;
    options.hot_tokens = 20;
    BothStores both({1, 2, 8, 200, KvType::kF16, {}}, options, 5);
    both.prefill(30, Mood::kPlain);
    both.decode(6, Mood::kTies);
    both.rewind(25);
    both.decode(4, Mood::kPlain);
    both.cuda->check();
  }
}

TEST_CASE("cuda residency: and where room is short, down to the least") {
  for (const Policy policy : kPolicies)
    for (const int bound : {0, 1, 2, 3}) {
      if (simt::kIsSlow && bound > 1) continue;
      if (policy == Policy::kWindow && bound < 2) continue;
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CAPTURE(bound);
      KvOptions options = options_of(policy);
      if (bound == 0) options.hot_tokens = 2 + 6 + 1;
      if (bound == 1) options.hot_tokens = 17;
      if (bound == 2) options.hot_fraction = 0.4;
      if (bound == 3) options.hot_bytes = kLayers * 2 * 2 * 16 * 24 + 1;  // layers, heads, k and v
      BothStores both({kLayers, 2, 8, 200, KvType::kF16, {}}, options, 11 + bound);
      const int most = simt::kIsSlow ? 1 : 6;
      both.prefill(40, Mood::kPlain);
      both.decode(most, Mood::kPlain);
      both.decode(most, Mood::kTies);
      both.rewind(39 + most);
      both.decode(most / 2, Mood::kAllHit);
      both.prefill(9, Mood::kTies);
      both.decode(most, Mood::kPlain);
      CHECK((options.hot_bytes == 0 || both.cuda->usage().hot <= options.hot_bytes));
    }
}
