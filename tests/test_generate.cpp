#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "device/error.h"
#include "model/generate.h"
#include "tests/compare.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

using Tokens = std::vector<std::int32_t>;
const Tokens kPrompt = {5, 17, 200, 3, 99, 41, 7};

// A tiny model with everything a generation needs.
struct Engine {
  testing::TinyModel tiny = testing::make_tiny_model();
  Transformer transformer;
  std::unique_ptr<KvStore> kv;
  Sampler sampler;

  explicit Engine(int capacity = 64, float temperature = 0, int max_rows = 512)
      : transformer(tiny.model, 1, max_rows), sampler(options(temperature)) {
    const Config& c = tiny.model.config;
    kv = make_kv_store(kv_shape(c, capacity, KvType::kF32));
  }
  static SamplerOptions options(float temperature) {
    SamplerOptions o;
    o.temperature = temperature;
    return o;
  }
  Generation run(const GenerateOptions& o, const Tokens& prompt = kPrompt) {
    return generate(transformer, *kv, sampler, prompt, o);
  }
};

GenerateOptions at_most(int n) {
  GenerateOptions o;
  o.max_tokens = n;
  return o;
}

// The definition: the whole sequence through an empty store for every token.
Tokens greedy(int n) {
  Tokens all = kPrompt;
  for (int i = 0; i < n; ++i) {
    Engine fresh(200);
    const auto logits = fresh.transformer.forward(all, *fresh.kv, 1);
    all.push_back(
        static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
  }
  return Tokens(all.begin() + std::ssize(kPrompt), all.end());
}

TEST_CASE("generate: greedy tokens are those of the model run afresh on the whole text") {
  Engine engine;
  const Generation g = engine.run(at_most(12));
  CHECK(g.tokens == greedy(12));
  CHECK(g.finish == Finish::kLength);
  CHECK(g.prompt_tokens == 7);
  CHECK(g.decode_steps == 11);
  CHECK(g.context_tokens == 18);  // the last token has not been through the model
  CHECK(g.usage.full == 18 * engine.kv->shape().bytes_per_token());
}

TEST_CASE("generate: a prompt longer than a batch gives the same tokens") {
  Engine engine(64, 0, 3);
  std::vector<int> progress;
  GenerateOptions o = at_most(12);
  o.on_prefill = [&](int done, int total) { progress.push_back(done * 100 + total); };
  CHECK(engine.run(o).tokens == greedy(12));
  CHECK(progress == std::vector<int>{307, 607, 707});
}

TEST_CASE("generate: a prompt is read in batches as far as wanted, then token by token") {
  Engine engine(64, 0, 3);
  std::vector<int> progress;
  GenerateOptions o = at_most(12);
  o.prefill = 4;
  o.on_prefill = [&](int done, int) { progress.push_back(done); };
  CHECK(engine.run(o).tokens == greedy(12));
  CHECK(progress == std::vector<int>{3, 4, 5, 6});  // the last is a step like those after it
}

TEST_CASE("generate: the text ends at the model's end token, which is not part of it") {
  const Tokens all = greedy(12);
  Engine engine;
  GenerateOptions o = at_most(12);
  o.is_end = [&](std::int32_t token) { return token == all[4]; };
  const auto first = std::find(all.begin(), all.end(), all[4]);
  const Generation g = engine.run(o);
  CHECK(g.finish == Finish::kEnd);
  CHECK(g.tokens == Tokens(all.begin(), first));
}

TEST_CASE("generate: on_token sees each token and can stop after any") {
  Engine engine;
  GenerateOptions o = at_most(12);
  Tokens seen;
  o.on_token = [&](std::int32_t token) { return seen.push_back(token), seen.size() < 5; };
  const Generation g = engine.run(o);
  CHECK(g.finish == Finish::kStopped);
  CHECK(g.tokens.size() == 5);
  CHECK(g.tokens == seen);
}

TEST_CASE("generate: no limit means until the context is full, to the last token that fits") {
  Engine engine(16);
  const Generation g = engine.run(at_most(-1));
  CHECK(g.finish == Finish::kContext);
  CHECK(g.tokens == greedy(10));  // 16 - 7 in the store, and one that needs no room
  CHECK(g.context_tokens == 16);
}

TEST_CASE("generate: a prompt that just fits gives one token, a longer one is an error") {
  Engine engine(7);
  CHECK(engine.run(at_most(-1)).tokens.size() == 1);
  Engine smaller(6);
  CHECK_THROWS_WITH_AS(
      smaller.run(at_most(-1)),
      "prompt: expected at most 6 tokens, which is what the context has room for, found 7", Error);
  CHECK(smaller.kv->length() == 0);
  CHECK_THROWS_AS(smaller.run(at_most(1), {}), Error);
}

TEST_CASE("generate: no tokens asked, none made") {
  Engine engine;
  const Generation g = engine.run(at_most(0));
  CHECK(g.tokens.empty());
  CHECK(g.finish == Finish::kLength);
  CHECK(g.context_tokens == 7);
  CHECK(g.first_token_seconds == 0);
}

TEST_CASE(
    "generate: an interruption ends it between tokens, and in a long prompt between batches") {
  std::atomic<bool> flag = false;
  Engine engine;
  GenerateOptions o = at_most(12);
  o.interrupted = &flag;
  int tokens = 0;
  o.on_token = [&](std::int32_t) { return flag = ++tokens == 3, true; };
  const Generation g = engine.run(o);
  CHECK(g.finish == Finish::kInterrupted);
  CHECK(g.tokens.size() == 3);

  Engine batches(64, 0, 2);
  flag = false;
  o.on_prefill = [&](int done, int) { flag = done == 4; };
  const Generation early = batches.run(o);
  CHECK(early.finish == Finish::kInterrupted);
  CHECK(early.tokens.empty());
  CHECK(early.prompt_tokens == 4);
  CHECK(early.context_tokens == 4);
}

TEST_CASE("generate: only ids below n_vocab are sampled") {
  Engine engine(64, 1.5f);
  GenerateOptions o = at_most(40);
  o.n_vocab = 3;
  for (std::int32_t token : engine.run(o).tokens) CHECK(token < 3);
}

TEST_CASE("generate: penalties see the prompt") {
  SamplerOptions s = Engine::options(0);
  s.presence_penalty = 1e6f, s.penalty_window = -1;
  Engine engine;
  engine.sampler = Sampler(s);
  Tokens all = kPrompt;
  for (std::int32_t token : engine.run(at_most(20)).tokens) {
    CHECK(std::find(all.begin(), all.end(), token) == all.end());
    all.push_back(token);
  }
}

TEST_CASE("generate: a second prompt continues where the first ended") {
  Engine engine, whole;
  engine.run(at_most(0), {5, 17, 200});
  const Generation g = engine.run(at_most(8), {3, 99, 41, 7});
  CHECK(g.tokens == whole.run(at_most(8)).tokens);
  CHECK(g.prompt_tokens == 4);
}

TEST_CASE("generate: the fingerprint is FNV-1a over the words of all sampled logits") {
  Engine engine, again;
  GenerateOptions o = at_most(2);
  o.fingerprint = true;
  const Generation g = engine.run(o);
  std::uint64_t expected = 14695981039346656037u;
  for (int step = 0; step < 2; ++step) {
    const Tokens input = step == 0 ? kPrompt : Tokens{g.tokens[0]};
    for (float logit : again.transformer.forward(input, *again.kv, 1)) {
      std::uint32_t word;
      std::memcpy(&word, &logit, 4);
      expected = (expected ^ word) * 1099511628211u;
    }
  }
  CHECK(g.fingerprint == expected);
  CHECK(Engine().run(at_most(2)).fingerprint == 0);
}

std::vector<float> forced(Engine& engine, ForcedRows rows, std::vector<int>* starts = nullptr) {
  std::vector<float> all;
  teacher_force(engine.transformer, *engine.kv, kPrompt, rows,
                [&](int row, std::span<const float> logits) {
                  if (starts) starts->push_back(row);
                  all.insert(all.end(), logits.begin(), logits.end());
                  return true;
                });
  return all;
}

TEST_CASE("teacher forcing: batches, then one at a time, cover every row once") {
  Engine reference, engine(64, 0, 2);
  const auto expected = reference.transformer.forward(kPrompt, *reference.kv, 7);
  std::vector<int> starts;
  const std::vector<float> found = forced(engine, {.prefill = 3}, &starts);
  CHECK(starts == std::vector<int>{0, 2, 3, 4, 5, 6});
  CHECK(testing::n_beyond(found, expected, testing::kTinyLogitError) == 0);
  CHECK(engine.kv->length() == 7);
}

TEST_CASE("teacher forcing: only rows from the first wanted one have logits") {
  Engine all, some(64, 0, 4);
  const std::vector<float> expected = forced(all, {});
  const std::vector<float> found = forced(some, {.first = 2});
  REQUIRE(expected.size() == 7 * 288);
  CHECK(testing::n_beyond(found, std::span(expected).subspan(2 * 288), testing::kTinyLogitError) ==
        0);
}

TEST_CASE("teacher forcing: stops when told") {
  Engine engine(64, 0, 2);
  int calls = 0;
  CHECK_FALSE(teacher_force(engine.transformer, *engine.kv, kPrompt, {},
                            [&](int, std::span<const float>) { return ++calls < 2; }));
  CHECK(calls == 2);
  CHECK(engine.kv->length() == 4);
}

}  // namespace
}  // namespace thaw
