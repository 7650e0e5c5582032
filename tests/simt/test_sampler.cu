// Sampling on the device against Sampler on the same logits: the same tokens.
//
// Both find a token by where u falls among sums of probabilities. The device's exponential is of
// f32 and off by some 2^-23, so its borders are off by as much; a u falls between a border of the
// one and of the other once in 2^23 / (candidates near it), which the fixed seeds here do not.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kvstore/recovery.h"
#include "model/generate.h"
#include "model/sampler_cuda.h"
#include "tests/sanitized.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

using Logits = std::vector<float>;
using Tokens = std::vector<std::int32_t>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const int kDraws = simt::kIsSlow ? 3 : 12;

// Draws of both, one after the other, and what one of the device said last.
class Both {
 public:
  explicit Both(const SamplerOptions& options) : host_(options), device_(options) {}

  // False when the device had no answer.
  bool draw(const Logits& logits, int n_vocab) {
    const DeviceBuffer<float> there(logits.size(), "test");
    copy_to_device(there.data(), logits.data(), logits.size(), stream_);
    prediction_ = cuda_.draw(there.data(), static_cast<int>(logits.size()), n_vocab, device_);
    if (!prediction_) return false;
    const auto choices = std::span(logits).first(n_vocab);
    const float lead = host_.lead(choices), entropy = softmax_entropy(logits);
    CHECK((prediction_->lead == lead));
    // Sums of n terms, in two orders.
    CHECK(prediction_->entropy == doctest::Approx(entropy).epsilon(1e-5));
    const std::int32_t found = device_.take(*prediction_), expected = host_.sample(choices);
    CHECK(found == expected);
    CHECK(device_.next_draw() == host_.next_draw());  // both have drawn, or neither
    host_.accept(found), device_.accept(found);
    return true;
  }
  const Prediction& last() const { return *prediction_; }

 private:
  const Stream stream_;
  CudaSampler cuda_{stream_};
  Sampler host_, device_;
  std::optional<Prediction> prediction_;
};

SamplerOptions options(float temperature, int top_k, float top_p, float min_p) {
  SamplerOptions o;
  o.temperature = temperature, o.top_k = top_k, o.top_p = top_p, o.min_p = min_p;
  o.seed = 11;
  return o;
}

Logits random_logits(int n, float scale, std::uint64_t seed) {
  testing::Random random(seed);
  return random.normals(static_cast<std::size_t>(n), scale);
}

}  // namespace

TEST_CASE("cuda sampler: greedy takes the largest logit, of the lowest id, as far as ids go") {
  for (int n : {1, 2, 255, 1024, 1025, 5000}) {
    CAPTURE(n);
    Both both(options(0, 40, 0.9f, 0.1f));
    Logits logits = random_logits(n, 3, 5);
    CHECK(both.draw(logits, n));
    CHECK(both.draw(logits, (n + 1) / 2));
    logits[n / 2] = logits[n - 1] = 50, logits[0] = -50;
    CHECK(both.draw(logits, n));
    CHECK(both.last().token == n / 2);
    CHECK(!both.last().drawn);
  }
}

TEST_CASE("cuda sampler: every filter, and all together, draw what the host draws") {
  const SamplerOptions all[] = {options(1, 0, 1, 0),
                                options(0.8f, 40, 0.95f, 0.05f),
                                options(0.7f, 5, 1, 0),
                                options(1.5f, 0, 0.9f, 0),
                                options(1, 0, 1, 0.2f),
                                options(3, 700, 0.5f, 0.001f),
                                options(1, 1, 1, 0),
                                options(1, 100000, 1, 0),
                                options(1e-3f, 40, 0.95f, 0.05f),
                                options(1, 0, 1e-6f, 0),
                                options(1, 0, 1, 1),
                                options(30, 300, 0.99f, 0)};
  for (const SamplerOptions& o : all) {
    CAPTURE(o.temperature);
    CAPTURE(o.top_k);
    CAPTURE(o.top_p);
    CAPTURE(o.min_p);
    Both both(o);
    for (int i = 0; i < kDraws; ++i) CHECK(both.draw(random_logits(3000, 4, 100 + i), 2900));
  }
}

TEST_CASE("cuda sampler: tokens of the same logit are taken by their ids") {
  Logits logits = random_logits(2000, 1, 9);
  for (int i = 0; i < 2000; i += 3) logits[i] = 2.5f;
  for (int i = 1; i < 300; i += 3) logits[i] = 4;
  for (const SamplerOptions& o : {options(1, 150, 1, 0), options(1, 0, 0.5f, 0),
                                  options(0.5f, 300, 0.7f, 0.3f), options(1, 0, 1, 1)}) {
    CAPTURE(o.top_k);
    CAPTURE(o.top_p);
    Both both(o);
    for (int i = 0; i < kDraws; ++i) CHECK(both.draw(logits, 2000));
  }
  Both half(options(1, 0, 0.5f, 0));  // which two of four are, exactly
  for (int i = 0; i < kDraws; ++i) CHECK(half.draw({0, 0, 0, 0}, 4));
}

TEST_CASE("cuda sampler: penalties count what was seen") {
  for (float temperature : {0.0f, 0.9f}) {
    SamplerOptions o = options(temperature, 20, 0.95f, 0);
    o.repeat_penalty = 1.3f, o.presence_penalty = 0.4f, o.frequency_penalty = 0.7f;
    o.penalty_window = 7;
    Both both(o);
    const Logits logits = random_logits(1500, 2, 21);  // the same again and again
    Tokens tokens;
    for (int i = 0; i < kDraws; ++i) {
      CHECK(both.draw(logits, 1400));
      tokens.push_back(both.last().token);
    }
    CHECK(std::count(tokens.begin(), tokens.end(), tokens[0]) < std::ssize(tokens));
  }
}

TEST_CASE("cuda sampler: what is not finite, or too much alike, is left to the host") {
  Both greedy(options(0, 0, 1, 0)), drawn(options(1, 40, 0.9f, 0));
  for (float bad : {kInfinity, -kInfinity, std::nanf("")}) {
    Logits logits = random_logits(3000, 1, 3);
    logits[2950] = bad;  // beyond those that count, too
    CHECK(!greedy.draw(logits, 2900));
    CHECK(!drawn.draw(logits, 2900));
  }
  CHECK(greedy.draw(Logits(3000, 1.0f), 3000));
  CHECK(!drawn.draw(Logits(3000, 1.0f), 3000));  // where top-k ends, 3,000 are alike
  CHECK(drawn.draw(Logits(1024, 1.0f), 1024));   // 1,024 can be listed
  CHECK(drawn.draw(random_logits(3000, 1, 4), 3000));

  SamplerOptions o = options(0, 0, 1, 0);
  o.repeat_penalty = 1e-39f;  // makes infinity of what was seen
  Both penalized(o);
  const Logits logits = random_logits(100, 1, 3);
  CHECK(penalized.draw(logits, 100));
  CHECK(!penalized.draw(logits, 100));
}

TEST_CASE("cuda sampler: generation draws as on the CPU") {
  testing::TinyOptions tiny_options{.type = DType::kF32, .dim = 64, .n_layers = 2};
  tiny_options.vocab_size = 96;
  const testing::TinyModel tiny = testing::make_tiny_model(tiny_options);
  const auto run = [&](std::unique_ptr<Backend> backend, const SamplerOptions& o, bool shown) {
    Transformer transformer(tiny.model, std::move(backend), 16);
    const auto kv = transformer.backend().make_kv_store(
        kv_shape(tiny.model.config, 100, KvType::kF32), KvOptions{});
    Sampler sampler(o);
    GenerateOptions go;
    go.max_tokens = simt::kIsSlow ? 4 : 30, go.n_vocab = 90;
    int n_checked = 0;
    go.check_logits = [&](std::span<const float>) { ++n_checked; };
    if (shown) go.on_logits = [](std::span<const float>) {};
    const bool is_cuda = transformer.backend().name() != "cpu";
    const Tokens tokens = generate(transformer, *kv, sampler, Tokens{3, 1, 4, 1, 5}, go).tokens;
    CHECK(n_checked == (is_cuda && !shown ? 1 : go.max_tokens));  // the prompt's are on the host
    return tokens;
  };
  SamplerOptions penalized = options(1, 40, 0.95f, 0.01f);
  penalized.repeat_penalty = 1.2f;
  for (const SamplerOptions& o : {options(0, 40, 1, 0), options(1, 0, 1, 0), penalized}) {
    const Tokens expected = run(make_cpu_backend(tiny.model, 1), o, false);
    CHECK(run(make_cuda_backend(tiny.model, 1), o, false) == expected);
    if (simt::kIsSlow) continue;
    CHECK(run(make_cuda_backend(tiny.model, 1), o, true) == expected);
    CHECK(run(make_checked_backend(tiny.model, 1), o, false) == expected);
  }
}

TEST_CASE("cuda sampler: what the device drafts and the host repeats is the text of full") {
  testing::TinyOptions tiny_options{.type = DType::kF32, .dim = 64, .n_layers = 2};
  tiny_options.vocab_size = 96;
  const testing::TinyModel tiny = testing::make_tiny_model(tiny_options);
  const auto run = [&](std::unique_ptr<Backend> backend, Policy policy, float temperature) {
    Transformer transformer(tiny.model, std::move(backend), 16);
    KvOptions kv_options;
    kv_options.policy.policy = policy;
    kv_options.policy.window = 2, kv_options.policy.sinks = 1, kv_options.policy.stay = 0;
    kv_options.policy.epsilon = 0.5f;
    kv_options.policy.ghost_key_bits = kv_options.policy.ghost_value_bits = 1;
    kv_options.centre_tokens = 4;
    if (policy == Policy::kWindow) kv_options.hot_tokens = 4;
    const auto kv = transformer.backend().make_kv_store(
        kv_shape(tiny.model.config, 100, KvType::kF32), kv_options);
    Sampler sampler(options(temperature, 40, 0.95f, 0.01f));
    GenerateOptions go;
    go.max_tokens = simt::kIsSlow ? 8 : 24;
    go.verify = 5;
    go.second_look = 0.05f;
    const Generation g =
        generate(transformer, *kv, sampler, Tokens{3, 1, 4, 1, 5, 9, 2, 6, 5, 3}, go);
    CHECK((g.checks > 0) == (policy != Policy::kFull));
    return g.tokens;
  };
  for (const float temperature : {0.0f, 1.0f}) {
    if (simt::kIsSlow && temperature > 0) continue;
    const Tokens full = run(make_cpu_backend(tiny.model, 1), Policy::kFull, temperature);
    for (const Policy policy : {Policy::kWindow, Policy::kThaw}) {
      if (simt::kIsSlow && policy == Policy::kThaw) continue;  // its attention is tested elsewhere
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CHECK(run(make_cuda_backend(tiny.model, 1), policy, temperature) == full);
    }
  }
}
