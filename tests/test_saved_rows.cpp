// Keys and values that leave a store as bytes and come back: the store is as it would be had it
// computed them.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "kvstore/saved_rows.h"
#include "model/forward.h"
#include "model/identity.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

using Bytes = std::vector<std::byte>;
using Tokens = std::vector<std::int32_t>;

Bytes saved(const KvStore& kv) {
  Bytes all;
  save_rows(kv, [&](std::span<const std::byte> bytes) {
    all.insert(all.end(), bytes.begin(), bytes.end());
  });
  return all;
}

testing::TinyModel model() {
  testing::TinyOptions o{.dim = 64, .n_layers = 2};
  o.n_heads = 2, o.n_kv_heads = 2, o.head_dim = 32;
  return testing::make_tiny_model(o);
}

Tokens tokens(int n) {
  Tokens all;
  for (int i = 0; i < n; ++i) all.push_back((13 * i * i + 5 * i) % 288);
  return all;
}

struct Fixture {
  testing::TinyModel tiny = model();
  Transformer transformer{tiny.model, 1, 128};
  Tokens text = tokens(340);

  std::unique_ptr<KvStore> store(Policy policy, KvType type) {
    KvOptions options;
    options.policy.policy = policy;
    options.policy.window = 16;
    options.check = true;
    return make_kv_store(kv_shape(tiny.model.config, 400, type), options);
  }
  std::span<const std::int32_t> part(int first, int n) const {
    return std::span(text).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n));
  }
  std::vector<float> forward(KvStore& kv, int n, Phase phase = Phase::kPrefill) {
    const auto logits = transformer.forward(part(kv.length(), n), kv, 1, phase);
    return {logits.begin(), logits.end()};
  }
  void restore(KvStore& kv, const SavedRows& rows, int n) {
    const int first = kv.length();
    transformer.restore(part(first, n), kv, [&](int layer, std::span<float> k, std::span<float> v) {
      rows.load(layer, first, k, v);
    });
  }
};

TEST_CASE("saved rows: a store that gets them goes on as the one that they are of") {
  Fixture f;
  for (const Policy policy : {Policy::kFull, Policy::kThaw, Policy::kWindow, Policy::kH2o,
                              Policy::kBudget, Policy::kAsr}) {
    for (const KvType type :
         {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8_0, KvType::kQ4_0}) {
      CAPTURE(static_cast<int>(policy));
      CAPTURE(kv_type_name(type));
      const auto first = f.store(policy, type), second = f.store(policy, type);
      for (int i = 0; i < 2; ++i) f.forward(*first, 120);
      for (int i = 0; i < 30; ++i) f.forward(*first, 1, Phase::kDecode);
      const Bytes bytes = saved(*first);
      REQUIRE(bytes.size() == 270 * first->shape().bytes_per_token());
      const SavedRows rows(bytes, first->shape(), 270);
      for (const int n : {128, 1, 20, 121}) f.restore(*second, rows, n);
      CHECK(saved(*second) == bytes);
      CHECK(second->counters().steps == 0);
      second->check();
      CHECK(f.forward(*second, 32) == f.forward(*first, 32));  // exact, over all that was saved
      for (int i = 0; i < 10; ++i) f.forward(*second, 1, Phase::kDecode);
      second->check();
    }
  }
}

TEST_CASE("saved rows: tokens can be decoded behind them at once") {
  Fixture f;
  for (const Policy policy :
       {Policy::kThaw, Policy::kWindow, Policy::kH2o, Policy::kBudget, Policy::kAsr}) {
    const auto first = f.store(policy, KvType::kF16), second = f.store(policy, KvType::kF16);
    for (int i = 0; i < 2; ++i) f.forward(*first, 100);
    const Bytes bytes = saved(*first);
    const SavedRows rows(bytes, first->shape(), 200);
    for (int i = 0; i < 2; ++i) f.restore(*second, rows, 100);
    for (int i = 0; i < 40; ++i) f.forward(*second, 1, Phase::kDecode);
    second->check();
    second->rewind(150);
    f.restore(*second, rows, 50);
    CHECK(saved(*second) == bytes);
  }
}

TEST_CASE("identity: of the weights and sizes, wherever one differs") {
  const auto of = [](auto change) {
    testing::TinyModel tiny = model();
    change(tiny.model);
    return identity(tiny.model);
  };
  const std::uint64_t same = of([](Model&) {});
  CHECK(of([](Model& m) { m.config.name = "other"; }) == same);
  CHECK(of([](Model& m) { m.config.rope_theta *= 2; }) != same);
  CHECK(of([](Model& m) { m.weights.final_norm[3] += 1; }) != same);
  CHECK(of([](Model& m) { m.weights.layers[1].ffn_norm[0] += 1; }) != same);
  CHECK(of([](Model& m) { std::swap(m.weights.layers[0].wq, m.weights.layers[1].wq); }) != same);
  CHECK(of([](Model& m) { m.weights.layers[1].w_down = m.weights.layers[0].w_down; }) != same);
}

}  // namespace
}  // namespace thaw
