// The alarm's statistics, the ladder, and what a rewalk does to a generation.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "kvstore/recovery.h"
#include "model/generate.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

TEST_CASE("recovery: statistics are plain mean and variance of the first 64 values") {
  RollingStatistics s;
  for (float x : {2.0f, 4.0f, 4.0f, 4.0f, 5.0f, 5.0f, 7.0f, 9.0f}) s.add(x);
  CHECK(s.mean() == doctest::Approx(5));
  CHECK(s.sd() == doctest::Approx(2));  // 32 / 8 = 4
  CHECK(s.count() == 8);
}

TEST_CASE("recovery: statistics forget the past by 1/64 a value") {
  RollingStatistics s;
  for (int i = 0; i < 64; ++i) s.add(1);
  s.add(65);  // d = 64: mean 1 + 64 / 64, variance 63 / 64 * 64 * 64 / 64
  CHECK(s.mean() == doctest::Approx(2));
  CHECK(s.sd() == doctest::Approx(std::sqrt(63.0)));
  for (int i = 0; i < 640; ++i) s.add(1);
  CHECK(s.mean() == doctest::Approx(1 + std::pow(63.0 / 64, 640)).epsilon(1e-4));
}

TEST_CASE("recovery: the entropy of a distribution, in nats") {
  CHECK(softmax_entropy(std::vector<float>(8, 3.5f)) == doctest::Approx(std::log(8)));
  CHECK(softmax_entropy(std::vector<float>{0, std::log(3.0f)}) ==
        doctest::Approx(-0.25 * std::log(0.25) - 0.75 * std::log(0.75)));
  const float inf = std::numeric_limits<float>::infinity();
  CHECK(softmax_entropy(std::vector<float>{-inf, 5, -inf}) == doctest::Approx(0));
  CHECK(softmax_entropy(std::vector<float>{1000, 0, -1000}) == doctest::Approx(0));
}

RecoveryParams up_to(Rung highest) {
  RecoveryParams p;
  p.highest = highest, p.z = 4;
  return p;
}

// A text whose signals are 1.0 +- 0.1 nats and 0.2 +- 0.02, with spikes where the caller wants.
struct Text {
  Recovery recovery;
  int position = 100;
  explicit Text(const RecoveryParams& params) : recovery(params) {}
  Rung step(float entropy, float mass, bool can_rewalk = true) {
    return recovery.observe(position++, entropy, mass, can_rewalk);
  }
  void calm(int steps) {
    for (int i = 0; i < steps; ++i) {
      CHECK(step(position % 2 ? 1.1f : 0.9f, position % 2 ? 0.18f : 0.22f) == Rung::kNone);
    }
  }
  Rung spike(bool can_rewalk = true) { return step(2.5f, 0.2f, can_rewalk); }
};

TEST_CASE("recovery: a spike of either signal fires, and the report says which and where") {
  Text text(up_to(Rung::kRewalk));
  text.calm(40);
  CHECK(text.step(1.3f, 0.2f) == Rung::kNone);  // 3 sd
  CHECK(text.step(2.5f, 0.2f) == Rung::kSoft);
  text.calm(40);
  CHECK(text.step(1.0f, 0.6f) == Rung::kWindow);
  const auto& firings = text.recovery.firings();
  REQUIRE(firings.size() == 2);
  CHECK(firings[0].position == 141);
  CHECK(firings[0].signal == Recovery::Signal::kEntropy);
  CHECK(firings[0].value == 2.5f);
  CHECK(firings[0].mean == doctest::Approx(1.0f).epsilon(0.02));
  CHECK(firings[0].sd == doctest::Approx(0.1f).epsilon(0.2).scale(0));
  CHECK(firings[1].position == 182);
  CHECK(firings[1].signal == Recovery::Signal::kGhostMass);
  CHECK(firings[1].value == 0.6f);
  CHECK(text.recovery.count(Rung::kSoft) == 1);
  CHECK(text.recovery.count(Rung::kWindow) == 1);
  CHECK(text.recovery.count(Rung::kFull) == 0);
}

TEST_CASE("recovery: off does nothing, and nothing fires before the warm-up is over") {
  Text off(up_to(Rung::kNone));
  off.calm(40);
  CHECK(off.spike() == Rung::kNone);
  CHECK(off.recovery.firings().empty());
  Text early(up_to(Rung::kRewalk)), late(up_to(Rung::kRewalk));
  early.calm(15);
  CHECK(early.spike() == Rung::kNone);
  late.calm(16);
  CHECK(late.spike() == Rung::kSoft);
}

TEST_CASE("recovery: the noise of a constant signal is no spike") {
  Recovery recovery(up_to(Rung::kRewalk));
  for (int i = 0; i < 100; ++i) CHECK(recovery.observe(i, 0.5f, 0, true) == Rung::kNone);
  CHECK(recovery.observe(100, 0.53f, 0, true) == Rung::kNone);
  CHECK(recovery.observe(101, 0.6f, 0, true) == Rung::kSoft);
}

// Spikes as soon as the cooldown allows, each far above what the ones before made of the mean.
std::vector<Rung> climb(Text& text, int spikes, bool can_rewalk = true) {
  std::vector<Rung> rungs;
  for (int i = 0; i < spikes; ++i) {
    text.calm(20);
    rungs.push_back(text.step(std::pow(10.0f, static_cast<float>(i + 1)), 0.2f, can_rewalk));
  }
  return rungs;
}

TEST_CASE("recovery: spikes climb rung by rung to the highest allowed") {
  using enum Rung;
  Text all(up_to(kRewalk)), window(up_to(kWindow)), forced(up_to(kRewalk));
  CHECK(climb(all, 5) == std::vector<Rung>{kSoft, kWindow, kFull, kRewalk, kRewalk});
  CHECK(climb(window, 3) == std::vector<Rung>{kSoft, kWindow, kWindow});
  CHECK(climb(forced, 4, false) == std::vector<Rung>{kSoft, kWindow, kFull, kFull});
  CHECK(forced.recovery.count(kFull) == 2);
  CHECK(forced.recovery.count(kRewalk) == 0);
}

TEST_CASE("recovery: calm leads down, a rung for every 64 positions") {
  using enum Rung;
  const auto after = [](int calm) {
    Text text(up_to(kRewalk));
    climb(text, 2);  // the next would be kFull
    text.calm(calm);
    return text.step(1e6f, 0.2f);
  };
  CHECK(after(62) == kFull);
  CHECK(after(63) == kWindow);  // 64 positions after the firing
  CHECK(after(127) == kSoft);
  CHECK(after(1000) == kSoft);
}

TEST_CASE("recovery: after a firing the cooldown holds, also when positions go back") {
  RecoveryParams params = up_to(Rung::kRewalk);
  params.cooldown = 10;
  Text text(params);
  text.calm(40);
  CHECK(text.step(10, 0.2f) == Rung::kSoft);
  const int fired = text.position - 1;
  text.position = fired - 8;  // a rewalk
  float spike = 10;
  while (text.position < fired + 10) CHECK(text.step(spike *= 4, 0.2f) == Rung::kNone);
  CHECK(text.step(spike * 4, 0.2f) == Rung::kWindow);
}

// A store that passes all on to another, but raises the alarm where the test wants it, and hands
// attention turned keys until a full reset: what is generated before and after one differs.
class Troubled : public KvStore {
 public:
  Troubled(std::unique_ptr<KvStore> inner, std::map<int, float> masses, bool turned)
      : inner_(std::move(inner)), masses_(std::move(masses)), turned_(turned) {}

  std::vector<Rung> resets;
  int exact_steps_asked = 0;  // of the last one

  void begin(int n_tokens, Phase phase) override { inner_->begin(n_tokens, phase); }
  void append(int layer, const float* k, const float* v, int n_tokens) override {
    std::vector<float> keys(k, k + n_tokens * shape().n_kv_heads * shape().head_dim);
    if (turned_)
      for (float& x : keys) x = -x;
    inner_->append(layer, keys.data(), v, n_tokens);
  }
  double reset(Rung rung, int exact_steps) override {
    resets.push_back(rung);
    exact_steps_asked = exact_steps;
    if (rung == Rung::kFull) turned_ = false;
    return inner_->reset(rung, exact_steps);
  }
  std::optional<float> ghost_mass() const override {
    const auto at = masses_.find(length());
    return at == masses_.end() ? 0.1f : at->second;
  }
  KvView view(int layer) const override { return inner_->view(layer); }
  void read(int layer, int first, int n_tokens, std::byte* rows) const override {
    inner_->read(layer, first, n_tokens, rows);
  }
  int stats_rows(int n_tokens) const override { return inner_->stats_rows(n_tokens); }
  void settle(int layer, const AttentionStats& stats) override { inner_->settle(layer, stats); }
  void rewind(int position) override { inner_->rewind(position); }
  void clear() override { inner_->clear(); }
  void check() const override { inner_->check(); }
  void record(KvRecorder* recorder) override { inner_->record(recorder); }
  int length() const override { return inner_->length(); }
  const KvShape& shape() const override { return inner_->shape(); }
  const KvOptions& options() const override { return inner_->options(); }
  KvUsage usage() const override { return inner_->usage(); }
  const KvCounters& counters() const override { return inner_->counters(); }

 private:
  std::unique_ptr<KvStore> inner_;
  std::map<int, float> masses_;  // at lengths
  bool turned_;
};

using Tokens = std::vector<std::int32_t>;
const Tokens kPrompt = {5, 17, 200, 3, 99, 41, 7};

// Spikes at four lengths, of which the last is `last`, climb to a rewalk there.
std::map<int, float> rewalk_at(int last) {
  return {{last - 3, 1e2f}, {last - 2, 1e4f}, {last - 1, 1e6f}, {last, 1e8f}};
}

struct Engine {
  testing::TinyModel tiny = testing::make_tiny_model();
  Transformer transformer{tiny.model, 1, 64};
  std::unique_ptr<Troubled> kv;
  Sampler sampler{greedy()};
  std::unique_ptr<Recovery> recovery;
  GenerateOptions options;

  explicit Engine(std::map<int, float> masses, bool turned = true, int capacity = 200) {
    const Config& c = tiny.model.config;
    kv = std::make_unique<Troubled>(make_kv_store(kv_shape(c, capacity, KvType::kF32)),
                                    std::move(masses), turned);
    RecoveryParams params = up_to(Rung::kRewalk);
    params.z = 50, params.warmup = 2, params.cooldown = 1, params.rewalk_tokens = 4;
    recovery = std::make_unique<Recovery>(params);
    options.recovery = recovery.get();
    options.max_tokens = 16;
  }
  static SamplerOptions greedy() {
    SamplerOptions o;
    o.temperature = 0, o.presence_penalty = 1e6f, o.penalty_window = -1;  // no token twice
    return o;
  }
  Generation run() { return generate(transformer, *kv, sampler, kPrompt, options); }
};

// What a model says that has first read `turned` of the tokens with turned keys.
Tokens continued(const Tokens& text, std::size_t turned, int n) {
  Engine engine({});
  engine.transformer.forward(std::span(text).first(turned), *engine.kv, 0, Phase::kPrefill);
  engine.kv->reset(Rung::kFull, kAlarmSteps);
  for (std::size_t i = 0; i < turned; ++i) engine.sampler.accept(text[i]);
  engine.options.max_tokens = n;
  engine.options.recovery = nullptr;
  return generate(engine.transformer, *engine.kv, engine.sampler, std::span(text).subspan(turned),
                  engine.options)
      .tokens;
}

TEST_CASE("rewalk: the last tokens are made again after a full reset, and only those are seen") {
  using enum Rung;
  Engine troubled({});
  const Tokens wrong = troubled.run().tokens;

  // At length 17 ten tokens are made, of which six were shown. The newest four are taken back, and
  // the one before them is run again.
  Engine engine(rewalk_at(17));
  Tokens seen;
  engine.options.on_token = [&](std::int32_t token) { return seen.push_back(token), true; };
  const Generation g = engine.run();
  CHECK(engine.kv->resets == std::vector<Rung>{kSoft, kWindow, kFull, kFull});
  CHECK(engine.recovery->count(kRewalk) == 1);

  Tokens text = kPrompt;
  text.insert(text.end(), wrong.begin(), wrong.begin() + 6);
  Tokens expected(wrong.begin(), wrong.begin() + 6);
  // The third rung ended the turning at length 16 already; what came before 12 keeps its keys.
  for (std::int32_t token : continued(text, 12, 10)) expected.push_back(token);
  CHECK(g.tokens == expected);
  CHECK(g.tokens != wrong);
  CHECK(seen == g.tokens);
  CHECK(g.finish == Finish::kLength);
  CHECK(g.context_tokens == 7 + 15);
}

TEST_CASE("rewalk: all that runs again sees every token, and is counted once") {
  Engine engine(rewalk_at(60));
  RecoveryParams params = engine.recovery->params();
  params.rewalk_tokens = 30;
  Recovery recovery(params);
  engine.options.recovery = &recovery;
  engine.options.max_tokens = 70;
  engine.options.on_token = [n = 0](std::int32_t) mutable { return ++n < 50; };
  const Generation g = engine.run();
  CHECK(recovery.count(Rung::kRewalk) == 1);
  CHECK(engine.kv->exact_steps_asked == 31);
  CHECK(g.tokens.size() == 50);
  CHECK(g.decode_steps == 49);
}

TEST_CASE("alarm: a step that says nothing of ghosts neither rings nor changes what is usual") {
  RecoveryParams params = up_to(Rung::kFull);
  params.warmup = 2, params.cooldown = 1;
  Recovery with(params), without(params);
  for (int position = 0; position < 40; ++position) {
    const float mass = position % 2 == 0 ? 0.1f : 0.2f;
    CHECK(with.observe(3 * position, 1, mass, false) == Rung::kNone);
    CHECK(without.observe(3 * position, 1, mass, false) == Rung::kNone);
    CHECK(with.observe(3 * position + 1, 1, {}, false) == Rung::kNone);
  }
  CHECK(with.observe(200, 1, 0.9f, false) == Rung::kSoft);
  CHECK(without.observe(200, 1, 0.9f, false) == Rung::kSoft);
  CHECK(with.firings()[0].mean == without.firings()[0].mean);
  CHECK(with.firings()[0].sd == without.firings()[0].sd);
}

TEST_CASE("rewalk: tokens are held back while they may be taken back, and none without a rewalk") {
  const auto made_when_first_seen = [](Rung highest) {
    Engine engine({}, false);
    RecoveryParams params = up_to(highest);
    params.rewalk_tokens = 4;
    Recovery recovery(params);
    engine.options.recovery = highest == Rung::kNone ? nullptr : &recovery;
    int made = 0, first = 0;
    engine.options.on_logits = [&](std::span<const float>) { ++made; };
    engine.options.on_token = [&](std::int32_t) { return first = first ? first : made, true; };
    CHECK(engine.run().tokens.size() == 16);
    return first;
  };
  CHECK(made_when_first_seen(Rung::kNone) == 1);
  CHECK(made_when_first_seen(Rung::kFull) == 1);
  CHECK(made_when_first_seen(Rung::kRewalk) == 5);
}

TEST_CASE("rewalk: the same trouble again does not loop") {
  std::map<int, float> masses;
  for (int length = 8; length < 60; ++length) masses[length] = 1e3f * static_cast<float>(length);
  Engine engine(masses, false);
  Engine plain({}, false);
  CHECK(engine.run().tokens == plain.run().tokens);  // nothing was wrong: the same tokens again
}

TEST_CASE("rewalk: who stops, stops at that token, as if nothing had been made after it") {
  Engine engine({}, false), plain({}, false);
  plain.options.recovery = nullptr;
  Tokens seen;
  for (Engine* e : {&engine, &plain}) {
    seen.clear();
    e->options.on_token = [&](std::int32_t token) {
      return seen.push_back(token), seen.size() < 6;
    };
    const Generation g = e->run();
    CHECK(g.finish == Finish::kStopped);
    CHECK(g.tokens == seen);
    CHECK(g.tokens.size() == 6);
    CHECK(g.context_tokens == 12);
  }
  // Both go on with the same penalties: a token is drawn unless it was seen.
  for (std::int32_t token = 0; token < 288; ++token) {
    std::vector<float> logits(288, 0.0f);
    logits[token] = 5e5f;
    CHECK(engine.sampler.sample(logits) == plain.sampler.sample(logits));
  }
}

TEST_CASE("rewalk: at its end a generation shows all that it holds back") {
  Engine plain({}, false);
  plain.options.recovery = nullptr;
  const Tokens all = plain.run().tokens;
  Tokens seen;
  const auto see = [&](Engine& engine) {
    seen.clear();
    engine.options.on_token = [&](std::int32_t token) { return seen.push_back(token), true; };
    return engine.run();
  };
  Engine length({}, false);
  CHECK(see(length).finish == Finish::kLength);
  CHECK(seen == all);

  Engine ended({}, false);
  ended.options.is_end = [&](std::int32_t token) { return token == all[9]; };
  CHECK(see(ended).finish == Finish::kEnd);
  CHECK(seen == Tokens(all.begin(), all.begin() + 9));

  Engine full({}, false, 12);
  CHECK(see(full).finish == Finish::kContext);
  CHECK(seen == Tokens(all.begin(), all.begin() + 6));

  Engine stopped({}, false);
  std::atomic<bool> flag = false;
  int made = 0;
  stopped.options.interrupted = &flag;
  stopped.options.on_logits = [&](std::span<const float>) { flag = ++made == 3; };
  CHECK(see(stopped).finish == Finish::kInterrupted);
  CHECK(seen == Tokens(all.begin(), all.begin() + 3));
}

TEST_CASE("rewalk: at the first token what was decoded of the prompt is run again") {
  Engine engine(rewalk_at(7));
  engine.options.prefill = 1;
  const Generation g = engine.run();
  CHECK(engine.recovery->count(Rung::kRewalk) == 1);
  CHECK(g.tokens == continued(kPrompt, 3, 16));  // the newest four of seven are run again
  CHECK(g.prompt_tokens == 7);
}

TEST_CASE("teacher forcing: recovery resets the store, and a rewalk is a full reset") {
  using enum Rung;
  Engine engine(rewalk_at(7), false);
  std::vector<int> rows;
  std::vector<std::size_t> sizes;
  const auto on_logits = [&](int row, std::span<const float> logits) {
    rows.push_back(row);
    sizes.push_back(logits.size());
    return true;
  };
  teacher_force(engine.transformer, *engine.kv, kPrompt, {.prefill = 1, .first = 6}, on_logits,
                engine.recovery.get());
  CHECK(rows == std::vector<int>{1, 2, 3, 4, 5, 6, 6});
  CHECK(sizes == std::vector<std::size_t>{0, 0, 0, 0, 0, 0, 288});
  CHECK(engine.kv->resets == std::vector<Rung>{kSoft, kWindow, kFull, kFull});
  CHECK(engine.recovery->count(kFull) == 2);
}

TEST_CASE("recovery: generate reports each rung, and where it fired") {
  std::vector<std::string> args = {"generate",   "-m",           testing::TinyCli::get().model(),
                                   "-p",         "Once",         "-n",
                                   "200",        "--ignore-eos", "--seed",
                                   "3",          "--policy",     "asr",
                                   "--recovery", "window",       "--recovery-z",
                                   "0.5"};
  const testing::RunResult text = testing::run_thaw(args);
  args.insert(args.end(), {"--json", "-q"});
  const testing::RunResult document = testing::run_thaw(args);
  REQUIRE(document.exit_code == 0);
  const nlohmann::json j = nlohmann::json::parse(document.out)["recovery"];
  CHECK(j["highest"] == "window");
  CHECK(j["soft"] > 0);
  CHECK(j["window"] > 0);
  CHECK(j["full"] == 0);
  REQUIRE(j["fired"].size() == j["soft"].get<std::size_t>() + j["window"].get<std::size_t>());
  const nlohmann::json& first = j["fired"][0];
  CHECK(first["rung"] == "soft");
  CHECK(first["value"].get<double>() > first["mean"].get<double>());
  CHECK(text.err.find("recovery soft " + j["soft"].dump() + " (at " + first["token"].dump()) !=
        std::string::npos);
  *std::find(args.begin(), args.end(), "asr") = "full";  // freezes nothing: nothing to recover
  CHECK(testing::run_thaw(args).exit_code == 2);
}

}  // namespace
}  // namespace thaw
