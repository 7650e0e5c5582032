// Tokens that were written under a policy run again, exactly: near ties, and all of them.
//
// Tolerance on logits, NMSE: keys, values and weights are f32, so a batch differs from single steps
// in the order of its sums alone. A product of up to 96 terms errs by (2^-24 sqrt(96))^2 = 3.4e-13
// of the power, 15 of them and 4 sums of attention by less than 1e-11.
#include <doctest/doctest.h>

#include <algorithm>
#include <vector>

#include "device/error.h"
#include "model/generate.h"
#include "tests/compare.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

using Tokens = std::vector<std::int32_t>;
const Tokens kPrompt = {5, 17, 200, 3, 99, 41, 7, 23, 150, 12, 80, 9};
constexpr float kAlways = 1e9f;  // nats

// A tiny model on a store in which hardly anybody stays hot.
struct Writer {
  testing::TinyModel tiny = testing::make_tiny_model();
  Transformer transformer;
  std::unique_ptr<KvStore> kv;
  Sampler sampler;
  GenerateOptions options;
  Tokens seen;
  std::vector<float> leads;                // of the sampler, a draw
  std::vector<std::vector<float>> logits;  // of each draw

  explicit Writer(Policy policy, float temperature = 0, int capacity = 96, int max_rows = 512,
                  int ghost_bits = 1)
      : transformer(tiny.model, 1, max_rows), sampler(sampling(temperature)) {
    KvOptions o;
    o.policy.policy = policy;
    o.policy.epsilon = 0.5f;  // few tokens have half of the attention, most a thirty-second
    o.policy.stay = 0;
    o.policy.window = 4, o.policy.sinks = 1;
    o.policy.ghost_key_bits = o.policy.ghost_value_bits = ghost_bits;
    o.centre_tokens = 4;
    if (policy != Policy::kFull && policy != Policy::kThaw) o.hot_tokens = 6;
    o.check = true;
    kv = make_kv_store(kv_shape(tiny.model.config, capacity, KvType::kF32), o);
    options.max_tokens = 40;
    options.on_token = [this](std::int32_t token) { return seen.push_back(token), true; };
    options.on_logits = [this](std::span<const float> values) {
      leads.push_back(sampler.lead(values));
      logits.emplace_back(values.begin(), values.end());
    };
  }
  static SamplerOptions sampling(float temperature) {
    SamplerOptions o;
    o.temperature = temperature, o.seed = 3;
    o.repeat_penalty = 1.1f;
    return o;
  }
  Generation run(const Tokens& prompt = kPrompt) {
    return generate(transformer, *kv, sampler, prompt, options);
  }
  Generation verified(int verify, const Tokens& prompt = kPrompt) {
    options.verify = verify;
    return run(prompt);
  }
};

const Policy kDrafting[] = {Policy::kThaw, Policy::kWindow, Policy::kH2o};

TEST_CASE("verify: whoever drafts, the text is that of full, drawn or greedy") {
  int corrected = 0;
  for (const float temperature : {0.0f, 1.0f}) {
    const Tokens full = Writer(Policy::kFull, temperature).run().tokens;
    for (const Policy policy : kDrafting) {
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CHECK(Writer(policy, temperature).run().tokens != full);
      for (const int verify : {1, 3, 8, 100}) {
        CAPTURE(verify);
        for (const int max_rows : {512, 5}) {
          Writer writer(policy, temperature, 96, max_rows);
          const Generation g = writer.verified(verify);
          CHECK(g.tokens == full);
          CHECK(writer.seen == full);
          CHECK(g.finish == Finish::kLength);
          CHECK(g.context_tokens == 12 + 39);
          CHECK(g.decode_steps == 39);
          if (verify == 1) CHECK(g.checks >= 35);
          if (verify == 8 && max_rows == 512) CHECK(g.checks >= 5);
          corrected += g.corrected;
        }
      }
    }
  }
  CHECK(corrected > 40);
}

TEST_CASE("verify: without ghosts nobody knows what a step missed, so all of it is looked at") {
  const Tokens full = Writer(Policy::kFull).run().tokens;
  CHECK(Writer(Policy::kThaw, 0, 96, 512, 0).run().tokens != full);
  Writer mute(Policy::kThaw, 0, 96, 512, 0);
  const Generation g = mute.verified(8);
  CHECK(g.tokens == full);
  CHECK(g.corrected > 0);
}

TEST_CASE("verify: full drafts nothing, and neither does who has frozen nobody") {
  Writer full(Policy::kFull);
  CHECK(full.verified(3).checks == 0);
  Writer thaw(Policy::kThaw);
  thaw.options.max_tokens = 3;
  CHECK(thaw.verified(1, {5, 17}).checks == 0);
  thaw.options.max_tokens = 40;
  CHECK(thaw.verified(1, {7}).checks > 30);
}

TEST_CASE("verify: nobody is told of a token that is taken back, whatever ends the text") {
  const Tokens full = Writer(Policy::kFull).run().tokens;
  const Tokens drafted = Writer(Policy::kWindow).run().tokens;
  const auto differs = std::mismatch(full.begin(), full.end(), drafted.begin());
  REQUIRE(differs.first != full.end());
  const std::int32_t never = *differs.second;  // drafted where full goes on
  Writer draft_ends(Policy::kWindow);
  draft_ends.options.is_end = [&](std::int32_t token) { return token == never; };
  const auto first_end = std::find(full.begin(), full.end(), never);
  CHECK(draft_ends.verified(8).tokens == Tokens(full.begin(), first_end));
  for (const int n : {1, 7, 23}) {
    CAPTURE(n);
    const Tokens first(full.begin(), full.begin() + n);
    Writer ends(Policy::kWindow), stops(Policy::kWindow), fills(Policy::kWindow, 0, 12 + n - 1);
    const auto where = std::find(full.begin(), full.end(), full[static_cast<std::size_t>(n)]);
    ends.options.is_end = [&](std::int32_t token) {
      return token == full[static_cast<std::size_t>(n)];
    };
    const Generation ended = ends.verified(8);
    CHECK(ended.finish == Finish::kEnd);
    CHECK(ended.tokens == Tokens(full.begin(), where));
    stops.options.on_token = [&](std::int32_t token) {
      return stops.seen.push_back(token), std::ssize(stops.seen) < n;
    };
    const Generation stopped = stops.verified(8);
    CHECK(stopped.finish == Finish::kStopped);
    CHECK(stopped.tokens == first);
    CHECK(stops.seen == first);
    fills.options.max_tokens = -1;
    const Generation filled = fills.verified(8);
    CHECK(filled.finish == Finish::kContext);
    CHECK(filled.tokens == first);
    CHECK(fills.seen == first);
  }
}

TEST_CASE("verify: an interrupted text keeps what was verified, and another turn goes on from it") {
  const Tokens full = Writer(Policy::kFull).run().tokens;
  for (const int steps : {1, 3, 6, 9, 17}) {
    CAPTURE(steps);
    std::atomic<bool> flag = false;
    Writer writer(Policy::kH2o), whole(Policy::kFull);
    writer.options.interrupted = &flag;
    writer.options.on_logits = [&, n = 0](std::span<const float>) mutable { flag = ++n == steps; };
    const Generation g = writer.verified(4);
    CHECK(g.finish == Finish::kInterrupted);
    CHECK(writer.seen == g.tokens);
    REQUIRE(g.tokens.size() <= full.size());
    CHECK(std::equal(g.tokens.begin(), g.tokens.end(), full.begin()));
    flag = false;
    writer.options.on_logits = {};
    Tokens next = {88, 14};
    whole.options.max_tokens = static_cast<int>(g.tokens.size());
    whole.run();
    if (!g.tokens.empty()) next.insert(next.begin(), g.tokens.back());  // not in the store yet
    REQUIRE(whole.kv->length() == writer.kv->length());
    whole.options.max_tokens = 40;
    CHECK(writer.verified(4, next).tokens == whole.run(next).tokens);
  }
}

TEST_CASE("verify: a text that is forced has the keys and values of full") {
  Tokens text = kPrompt;
  for (int i = 0; i < 50; ++i) text.push_back((i * 37) % 256);
  Writer full(Policy::kFull);
  full.transformer.prefill(text, *full.kv);
  const Tokens expected = full.run().tokens;
  for (const int verify : {0, 1, 7, 64}) {
    Writer writer(Policy::kWindow);
    int rows = 0;
    teacher_force(writer.transformer, *writer.kv, text, {6, 0, verify},
                  [&](int row, std::span<const float> logits) {
                    CHECK(row == rows);
                    rows += static_cast<int>(logits.size()) / 288;
                    return true;
                  });
    CHECK(rows == std::ssize(text));
    CHECK((writer.verified(4).tokens == expected) == (verify > 0));
  }
}

TEST_CASE("verify: not with recovery") {
  RecoveryParams params;
  params.highest = Rung::kSoft;
  Recovery recovery(params);
  Writer writer(Policy::kThaw);
  writer.options.recovery = &recovery;
  CHECK_THROWS_WITH_AS(writer.verified(4), "verify: expected no recovery beside it", Error);
  CHECK(writer.kv->length() == 0);
}

TEST_CASE(
    "second look: a greedy step that decides by less runs again, with what is not exact yet") {
  Writer once(Policy::kThaw);
  CHECK(once.run().checks == 0);
  REQUIRE(once.leads.size() == 40);
  const float least = *std::min_element(once.leads.begin() + 1, once.leads.end());
  const auto at = std::find(once.leads.begin(), once.leads.end(), least) - once.leads.begin();
  REQUIRE(at > 5);
  Writer twice(Policy::kThaw);
  twice.options.max_tokens = static_cast<int>(at) + 1;
  twice.options.second_look = least + 1e-4f;
  const Generation g = twice.run();
  CHECK(g.checks == 1);
  CHECK(g.decode_steps == at);
  CHECK(g.counters.steps == at);
  REQUIRE(std::equal(twice.seen.begin(), twice.seen.begin() + at, once.seen.begin()));
  // What full says of the same tokens.
  Writer full(Policy::kFull);
  Tokens text = kPrompt;
  text.insert(text.end(), once.seen.begin(), once.seen.begin() + at);
  const auto expected = full.transformer.forward(text, *full.kv, 1);
  CHECK(testing::nmse(twice.logits.back(), expected) <= 1e-11);
  CHECK(testing::nmse(once.logits[at], expected) > 1e-4);
  Writer some(Policy::kThaw, 0, 96, 5);  // no more than one pass
  some.options.max_tokens = twice.options.max_tokens;
  some.options.second_look = twice.options.second_look;
  CHECK(some.run().checks == 1);
  CHECK(some.kv->length() == twice.kv->length());
}

// The mean of leads is 2 nats before the first draw, and the newest counts a sixteenth.
TEST_CASE("second look: where leads are long, a longer one hesitates") {
  const auto sharp = [](float second_look, int max_tokens) {
    Writer writer(Policy::kThaw);
    for (float& x : writer.tiny.model.weights.final_norm) x *= 20;
    writer.options.second_look = second_look, writer.options.max_tokens = max_tokens;
    const int checks = writer.run().checks;
    return std::pair(checks, writer.leads);
  };
  const std::vector<float> leads = sharp(0, 40).second;
  const float least = 0.99f * *std::min_element(leads.begin() + 1, leads.end());
  float mean = 2;
  int first = 0;
  for (; first < 40 && (first == 0 || leads[first] >= least * std::max(1.0f, mean / 2)); ++first)
    mean += (leads[first] - mean) / 16;
  REQUIRE(first > 1);
  REQUIRE(first < 40);  // though none is below the least
  CHECK(sharp(least, first).first == 0);
  CHECK(sharp(least, first + 1).first == 1);
}

TEST_CASE("second look: none where nothing is chosen greedily, or no ghost answered") {
  const auto checks = [](Policy policy, float temperature) {
    Writer writer(policy, temperature);
    writer.options.second_look = kAlways;
    return writer.run().checks;
  };
  CHECK(checks(Policy::kThaw, 0) == 39);
  CHECK(checks(Policy::kThaw, 0.5f) == 0);
  for (const Policy policy : {Policy::kFull, Policy::kWindow, Policy::kAsr})
    CHECK(checks(policy, 0) == 0);
}

}  // namespace
}  // namespace thaw
