// Whole tiny models against the definition, and what must hold between two ways to run one.
//
// Tolerance on logits, NMSE: two layers of f32 ops, each within 1e-12, and angles within 5e-11:
// 1e-9. Block formats: 15 products of 4.9e-10 each (test_ops.cpp) make 7e-9, and scores of standard
// deviation 4 amplify what reaches the softmax: 3e-8.
#include <doctest/doctest.h>

#include <set>

#include "device/error.h"
#include "model/forward.h"
#include "model/matmul.h"
#include "tests/compare.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

std::vector<std::int32_t> some_tokens(int n, int vocab_size) {
  testing::Random random(21);
  std::vector<std::int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back(random.below(vocab_size));
  return tokens;
}

std::unique_ptr<KvStore> store_for(const Config& c, KvType type = KvType::kF32) {
  return make_kv_store(kv_shape(c, c.context_length, type));
}

// Logits of all tokens, in calls of `step` rows.
std::vector<float> run(const Model& model, std::span<const std::int32_t> tokens, std::size_t step,
                       int n_threads = 2, KvType type = KvType::kF32) {
  Transformer transformer(model, n_threads);
  auto kv = store_for(model.config, type);
  std::vector<float> all;
  for (; !tokens.empty(); tokens = tokens.subspan(std::min(step, tokens.size()))) {
    const auto batch = tokens.first(std::min(step, tokens.size()));
    const auto logits = transformer.forward(batch, *kv, static_cast<int>(batch.size()));
    all.insert(all.end(), logits.begin(), logits.end());
  }
  return all;
}

std::vector<float> definition(const Model& model, std::span<const std::int32_t> tokens) {
  std::vector<float> all;
  for (const auto& row : reference::forward(model, tokens))
    all.insert(all.end(), row.begin(), row.end());
  return all;
}

}  // namespace

TEST_CASE("forward: every format, as one prefill, in uneven batches, and token by token") {
  for (DType type : testing::kAllTypes) {
    CAPTURE(dtype_info(type).name);
    const testing::TinyModel tiny = testing::make_tiny_model({.type = type});
    const auto tokens = some_tokens(37, 288);
    const auto expected = definition(tiny.model, tokens);
    for (std::size_t step : {37, 5, 1}) {
      CAPTURE(step);
      CHECK(testing::nmse(run(tiny.model, tokens, step), expected) <=
            (needs_codes(type) ? 3e-8 : 1e-9));
    }
  }
}

TEST_CASE("forward: groupings, head sizes, tied heads, both pairings, llama3 frequencies") {
  for (int n_kv_heads : {1, 2, 4})
    for (int head_dim : {16, 24})
      for (bool tied : {false, true}) {
        testing::TinyOptions options{.n_kv_heads = n_kv_heads, .head_dim = head_dim, .tied = tied};
        options.n_heads = 4;
        options.dim = head_dim == 24 ? 96 : 64;
        options.pairing = tied ? RopePairing::kInterleaved : RopePairing::kHalves;
        if (tied) options.rope_factors = llama3_rope_factors(head_dim, 10000, 8, 1, 4, 64);
        const testing::TinyModel tiny = testing::make_tiny_model(options);
        const auto tokens = some_tokens(20, 288);
        CHECK(testing::nmse(run(tiny.model, tokens, 20), definition(tiny.model, tokens)) <= 1e-9);
      }
}

TEST_CASE("forward: an f16 store costs no more than the rounding of keys and values") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const auto tokens = some_tokens(30, 288);
  const auto expected = definition(tiny.model, tokens);
  // f16 rounds by 2^-12 rms relative, NMSE 6e-8 / 3, through two layers with gain about 2.
  CHECK(testing::nmse(run(tiny.model, tokens, 30, 2, KvType::kF16), expected) <= 1e-6);
  CHECK(testing::nmse(run(tiny.model, tokens, 30, 2, KvType::kF16), expected) > 1e-9);
  CHECK(testing::nmse(run(tiny.model, tokens, 30, 2, KvType::kBF16), expected) <= 64e-6);
}

TEST_CASE("forward: the same bits for any number of threads") {
  for (DType type : {DType::kF32, DType::kQ4_1}) {
    const testing::TinyModel tiny = testing::make_tiny_model({.type = type});
    const auto tokens = some_tokens(40, 288);
    for (std::size_t step : {40, 1}) {
      const auto one = run(tiny.model, tokens, step, 1);
      for (int n_threads : {2, 3, 8}) CHECK(run(tiny.model, tokens, step, n_threads) == one);
    }
  }
}

TEST_CASE("forward: after a rewind the same tokens give the same bits, other tokens others") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const auto tokens = some_tokens(24, 288);
  Transformer transformer(tiny.model, 2);
  auto kv = store_for(tiny.model.config);
  transformer.prefill(std::span(tokens).first(16), *kv);
  const auto last = std::span(tokens).subspan(16);
  const auto view = transformer.prefill(last, *kv);
  const std::vector<float> first(view.begin(), view.end());
  kv->rewind(16);
  const auto again = transformer.prefill(last, *kv);
  CHECK(std::vector<float>(again.begin(), again.end()) == first);
  kv->rewind(15);
  const auto shifted = transformer.prefill(last, *kv);
  CHECK(std::vector<float>(shifted.begin(), shifted.end()) != first);
}

TEST_CASE(
    "prefill: in calls of max_rows, equals one call up to rounding; logits of the last token") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const auto tokens = some_tokens(50, 288);
  Transformer small(tiny.model, 2, 16), large(tiny.model, 2, 64);
  auto a = store_for(tiny.model.config), b = store_for(tiny.model.config);
  const auto in_steps = small.prefill(tokens, *a), at_once = large.prefill(tokens, *b);
  CHECK(in_steps.size() == 288);
  CHECK(a->length() == 50);
  CHECK(testing::nmse(in_steps, at_once) <= 1e-11);
  const auto all = definition(tiny.model, tokens);
  CHECK(testing::nmse(at_once, std::span(all).last(288)) <= 1e-9);
}

TEST_CASE("forward: errors leave the store as it was") {
  const testing::TinyModel tiny = testing::make_tiny_model({.context_length = 8});
  Transformer transformer(tiny.model, 1, 16);
  auto kv = store_for(tiny.model.config);
  const std::vector<std::int32_t> six = some_tokens(6, 288), bad = {5, 288};
  transformer.prefill(six, *kv);
  CHECK_THROWS_WITH_AS(transformer.prefill(six, *kv),
                       "KV store: expected at most 8 tokens, found 12", Error);
  CHECK_THROWS_WITH_AS(transformer.prefill(bad, *kv), "embed: token: expected 0 to 287, found 288",
                       Error);
  CHECK_THROWS_AS(transformer.prefill({}, *kv), Error);
  CHECK_THROWS_AS(transformer.forward(six, *kv, 7), Error);
  CHECK(kv->length() == 6);
  CHECK(kv->view(0).kv_len == 6);
}

TEST_CASE("observer: reports every named intermediate once a layer, with its shape") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const Config& c = tiny.model.config;
  Transformer transformer(tiny.model, 1);
  auto kv = store_for(c);
  std::multiset<std::string> seen;
  transformer.observe([&](const ActivationView& a) {
    seen.insert(std::string(a.name) + "@" + std::to_string(a.layer));
    CHECK(a.rows == (a.name == "logits" || a.name == "final_norm" ? 1 : 3));
    if (a.name == "k" || a.name == "v") CHECK(a.cols == c.kv_dim());
    if (a.name == "ffn_hidden") CHECK(a.cols == c.ffn_dim);
  });
  transformer.prefill(some_tokens(3, 288), *kv);
  std::multiset<std::string> expected = {"embed@-1", "final_norm@-1", "logits@-1"};
  for (const char* layer : {"0", "1"})
    for (const char* name : {"attn_norm", "q", "k", "v", "attn_out", "attn_residual", "ffn_norm",
                             "ffn_hidden", "ffn_residual"})
      expected.insert(std::string(name) + "@" + layer);
  CHECK(seen == expected);
  transformer.observe({});
  transformer.prefill(some_tokens(3, 288), *kv);
  CHECK(seen == expected);
}
