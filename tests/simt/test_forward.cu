// Whole models on the GPU: the same tokens as on the CPU, the same bits every time, errors instead
// of hangs.
//
// Tolerance on logits, NMSE: the prompt's 14 products and 2 attentions are rounded to f16,
// by 1.6e-7 and 4.8e-7 of the power (test_ops.cu, test_attention.cu), 3.2e-6 in all, if no layer
// makes more of it than it is: norms keep shares. bf16 has 64 times the power: 2.0e-4.
#include <doctest/doctest.h>

#include <algorithm>
#include <functional>
#include <string>
#include <vector>

#include "device/error.h"
#include "kvstore/saved_rows.h"
#include "model/backend_cuda.h"
#include "model/forward.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/sanitized.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using simt::kIsSlow;
using testing::error_of;

namespace {

using Tokens = std::vector<std::int32_t>;
using Logits = std::vector<float>;

// What is lost when a call fails is seen only when that call does.
const int kEveryCall = testing::sanitized("thread") ? 23 : 1;
const unsigned kOrders = kIsSlow ? 3 : 32;
const int kGraphPrompt = kIsSlow ? 10 : 120;                                // 120 and its steps
const int kTieredSteps = kIsSlow ? 6 : 40, kGraphSteps = kIsSlow ? 5 : 20;  // open a page
std::vector<DType> types() {
  if (kIsSlow) return {DType::kBF16, DType::kQ4_1};
  return {std::begin(testing::kAllTypes), std::end(testing::kAllTypes)};
}

testing::TinyOptions options(DType type) {
  testing::TinyOptions o{.type = type, .dim = 64, .n_layers = 2};
  o.n_heads = 3, o.n_kv_heads = 1, o.head_dim = 32, o.ffn_dim = 64, o.vocab_size = 96;
  if (is_k_quant(type)) o.n_layers = 1;  // of 256 columns
  return o;
}

Tokens prompt(int n, int vocab_size) {
  Tokens tokens;
  for (int i = 0; i < n; ++i) tokens.push_back((7 * i + 3) % vocab_size);
  return tokens;
}

KvOptions full_options() {
  KvOptions o;
  o.policy.policy = Policy::kFull;
  return o;
}

// A transformer with a store.
struct Machine {
  Transformer transformer;
  std::unique_ptr<KvStore> kv;

  Machine(const Model& model, std::unique_ptr<Backend> backend, KvType type = KvType::kF16)
      : transformer(model, std::move(backend), 16),
        kv(transformer.backend().make_kv_store(kv_shape(model.config, 300, type), full_options())) {
  }
};

// The prompt, then n tokens greedily; logits of every step one after the other.
Tokens generate(Machine& m, const Tokens& prompt, int n, Logits* all = nullptr,
                const std::function<void(int)>& before_step = {}) {
  std::span<const float> logits = m.transformer.prefill(prompt, *m.kv);
  Tokens tokens;
  for (int i = 0; i < n; ++i) {
    if (before_step) before_step(i);
    if (all) all->insert(all->end(), logits.begin(), logits.end());
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    tokens.push_back(static_cast<std::int32_t>(best));
    logits = m.transformer.forward({&tokens.back(), 1}, *m.kv, 1, Phase::kDecode);
  }
  return tokens;
}

}  // namespace

TEST_CASE("cuda forward: prompts go in steps of 2,048 where they leave most memory free") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF16));
  CHECK(Transformer(tiny.model, 1).max_rows() == 512);
  CHECK(Transformer(tiny.model, make_cuda_backend(tiny.model, 1)).max_rows() == 2048);
  simt::set_memory((std::size_t{1} << 30) - device_facts().free_memory + (8 << 20));
  CHECK(Transformer(tiny.model, make_cuda_backend(tiny.model, 1)).max_rows() == 512);
  simt::set_memory(std::size_t{1} << 30);
}

TEST_CASE("cuda forward: a prompt's steps have their own tokens though nothing waits for a step") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  const auto logits_of = [&](std::unique_ptr<Backend> backend) {
    Transformer transformer(tiny.model, std::move(backend), 4);
    // Exact: sums of another order may round a key to another f16.
    const auto kv = transformer.backend().make_kv_store(
        kv_shape(tiny.model.config, 30, KvType::kF32), full_options());
    const auto logits = transformer.prefill(prompt(12, 96), *kv);
    return Logits(logits.begin(), logits.end());
  };
  CHECK(testing::nmse(logits_of(make_cuda_backend(tiny.model, 1)),
                      logits_of(make_cpu_backend(tiny.model, 1))) <= 1e-10);
}

TEST_CASE("cuda forward: every format writes what the CPU writes") {
  for (DType type : types()) {
    CAPTURE(dtype_info(type).name);
    const testing::TinyModel tiny = testing::make_tiny_model(options(type));
    Machine cpu(tiny.model, make_cpu_backend(tiny.model, 1));
    Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1));
    const Tokens text = prompt(20, 96);  // 16 rows by tensor cores, and 4
    CHECK(generate(cuda, text, 8) == generate(cpu, text, 8));
    CHECK(cuda.kv->length() == 28);
    cuda.kv->rewind(10), cpu.kv->rewind(10);
    Logits a, b;
    CHECK(generate(cuda, prompt(4, 96), 4, &a) == generate(cpu, prompt(4, 96), 4, &b));
    CHECK(testing::nmse(a, b) <= (type == DType::kBF16 ? 2.0e-4 : 3.2e-6));
    cuda.kv->check();
  }
}

TEST_CASE("cuda forward: every type of store") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  for (KvType type : {KvType::kBF16, KvType::kF32, KvType::kQ8_0, KvType::kQ4_0}) {
    CAPTURE(kv_type_name(type));
    Machine cpu(tiny.model, make_cpu_backend(tiny.model, 1), type);
    Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1), type);
    Logits a, b;
    CHECK(generate(cuda, prompt(7, 96), 4, &a) == generate(cpu, prompt(7, 96), 4, &b));
    // All is f32, within 1e-6 of the CPU's. About 1,400 numbers are stored; a share of 1e-6 over a
    // step of rounding lies so near a boundary that it rounds the other way: 2^-8 (bf16), less than
    // one number; 1/127 and 1/8 of a block's largest, far fewer. One that does changes at most 2^-8
    // or 1/127 of one in 32 numbers of one in 11 tokens: 1.8e-7 of the power. Five of them pass.
    CHECK(testing::nmse(a, b) <= 1e-6);
  }
}

// Saved on one side, restored on the other: two and a bit pages of the full store's.
TEST_CASE("cuda forward: keys and values that the CPU computed are as good as its own, and back") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  const int n = kIsSlow ? 20 : 270;
  const Tokens text = prompt(n + 4, 96);
  const auto save = [](const KvStore& kv) {
    std::vector<std::byte> all;
    save_rows(kv, [&](std::span<const std::byte> some) {
      all.insert(all.end(), some.begin(), some.end());
    });
    return all;
  };
  const auto move = [&](Machine& from, Machine& to) {
    const std::vector<std::byte> bytes = save(*from.kv);
    const SavedRows rows(bytes, from.kv->shape(), from.kv->length());
    for (int first = 0; first < n; first += 16)
      to.transformer.restore(std::span(text).subspan(first, std::min(16, n - first)), *to.kv,
                             [&](int layer, std::span<float> k, std::span<float> v) {
                               rows.load(layer, first, k, v);
                             });
    CHECK(save(*to.kv) == bytes);
  };
  Machine cpu(tiny.model, make_cpu_backend(tiny.model, 1));
  Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1));
  Machine back(tiny.model, make_cpu_backend(tiny.model, 1));
  cpu.transformer.prefill(std::span(text).first(n), *cpu.kv);
  move(cpu, cuda), move(cuda, back);
  const auto rest = std::span(text).last(4);
  const auto a = cuda.transformer.prefill(rest, *cuda.kv);
  const auto b = cpu.transformer.prefill(rest, *cpu.kv);
  const auto c = back.transformer.prefill(rest, *back.kv);
  CHECK(testing::nmse(Logits(a.begin(), a.end()), Logits(b.begin(), b.end())) <= 3.2e-6);
  CHECK(std::equal(b.begin(), b.end(), c.begin(), c.end()));
}

TEST_CASE("cuda forward: checked finds nothing, and an op that errs by its name") {
  for (DType type : {DType::kBF16, DType::kQ4_1, DType::kQ6_K}) {
    if (kIsSlow && is_k_quant(type)) continue;
    const testing::TinyModel tiny = testing::make_tiny_model(options(type));
    Machine checked(tiny.model, make_checked_backend(tiny.model, 1));
    CHECK(generate(checked, prompt(20, 96), 2).size() == 2);
  }
  // The device has its own copy of the weights: the CPU's are changed behind its back.
  testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  Machine checked(tiny.model, make_checked_backend(tiny.model, 1));
  const Tensor& w = tiny.model.weights.layers[1].w_down;
  auto* weight = reinterpret_cast<float*>(const_cast<std::byte*>(w.row(5)));
  weight[3] += 10;
  const std::string error = error_of([&] { generate(checked, prompt(2, 96), 1); });
  CHECK(error.starts_with("checked: layer 1: project_add: row "));
  CHECK(error.find("element 5: expected ") != std::string::npos);
}

TEST_CASE("cuda forward: the same bits in any order of streams, blocks and threads") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kQ4_0));
  Logits first;
  for (std::uint64_t seed = 1; seed <= kOrders; ++seed) {
    simt::set_seed(seed);
    Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1));
    Logits logits;
    generate(cuda, prompt(10, 96), 2, &logits);
    if (seed == 1) first = logits;
    if (logits != first) FAIL("seed " << seed);
  }
  simt::set_seed(1);
}

TEST_CASE("cuda forward: twenty steps by graph are twenty steps without, and one launch each") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kQ8_0));
  const auto make = [&](bool graphs) {
    auto backend = std::make_unique<CudaBackend>(tiny.model, 1);
    backend->use_graphs(graphs);
    return backend;
  };
  Machine with(tiny.model, make(true)), without(tiny.model, make(false));
  auto other =
      with.transformer.backend().make_kv_store(kv_shape(tiny.model.config, 300), full_options());
  Logits a, b;
  CHECK(generate(with, prompt(kGraphPrompt, 96), kGraphSteps, &a) ==
        generate(without, prompt(kGraphPrompt, 96), kGraphSteps, &b));
  CHECK(a == b);
  // The other store has its own graph.
  const Tokens few = prompt(3, 96);
  for (const std::int32_t& token : few) {
    with.transformer.forward({&token, 1}, *other, 1, Phase::kDecode);
    const auto x = with.transformer.forward({&token, 1}, *with.kv, 1, Phase::kDecode);
    const auto y = without.transformer.forward({&token, 1}, *without.kv, 1, Phase::kDecode);
    CHECK(Logits(x.begin(), x.end()) == Logits(y.begin(), y.end()));
  }
  if (!simt::emulated()) return;
  simt::fail_call(0);
  with.transformer.forward({&few[0], 1}, *with.kv, 1, Phase::kDecode);
  const int by_graph = simt::fail_call(0);
  without.transformer.forward({&few[0], 1}, *without.kv, 1, Phase::kDecode);
  CHECK(by_graph == 8);  // tokens, embed, begin, the graph, logits, and what waits for them
  CHECK(simt::fail_call(0) == by_graph - 1 + 2 * 6 + 1);
}

// All is f32, and so near the CPU's, but for weights of ghosts that round to the next of their 8
// bits: see BothSides in test_tiered_attention.cu, whose 4e-3 of o is here that of two layers.
TEST_CASE("cuda forward: under two policies, by graph and without, what the CPU writes") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  for (const Policy policy : {Policy::kThaw, Policy::kH2o}) {
    if (kIsSlow && policy == Policy::kThaw) continue;  // as in the next case
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    KvOptions o;
    o.policy.policy = policy;
    o.policy.window = 4;
    o.policy.epsilon = 1e-2f;
    o.centre_tokens = 16;
    o.freeze_from = 24;  // thaw attends all before
    if (policy == Policy::kH2o) o.hot_tokens = 12;
    const KvShape shape = kv_shape(tiny.model.config, 300, KvType::kF32);
    const auto run = [&](std::unique_ptr<Backend> backend, Logits& logits) {
      Machine m(tiny.model, std::move(backend));
      m.kv = m.transformer.backend().make_kv_store(shape, o);
      Tokens all = generate(m, prompt(20, 96), kTieredSteps, &logits);
      const Tokens more = generate(m, prompt(5, 96), 4, &logits);
      all.insert(all.end(), more.begin(), more.end());
      CHECK(m.kv->counters().frozen > 0);
      return all;
    };
    auto plain = std::make_unique<CudaBackend>(tiny.model, 1);
    plain->use_graphs(false);
    Logits cpu, by_graph, without;
    const Tokens expected = run(make_cpu_backend(tiny.model, 1), cpu);
    CHECK(run(make_cuda_backend(tiny.model, 1), by_graph) == expected);
    CHECK(run(std::move(plain), without) == expected);
    CHECK(by_graph == without);
    CHECK(testing::nmse(by_graph, cpu) <= 3.2e-5);
  }
}

TEST_CASE("cuda forward: a store's graph is not that of the next store, wherever that stands") {
  if (kIsSlow) return;  // no kernel of its own
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  Machine first(tiny.model, make_cuda_backend(tiny.model, 1));
  const auto run = [&](Machine& m, float stay) {
    KvOptions o;
    o.policy.policy = Policy::kThaw;
    o.policy.window = 4, o.policy.stay = stay, o.centre_tokens = 16;
    m.kv.reset();  // what it had can be had again
    m.kv = m.transformer.backend().make_kv_store(kv_shape(tiny.model.config, 300), o);
    generate(m, prompt(20, 96), kTieredSteps);
    return m.kv->counters().attended;
  };
  run(first, 0);  // by which the backend has all that it takes itself
  const auto some = run(first, 0), more = run(first, 8);
  Machine fresh(tiny.model, make_cuda_backend(tiny.model, 1));
  CHECK(some != more);
  CHECK(more == run(fresh, 8));
}

// Tolerance as above. The exact steps share a graph, which is not that of the steps around them.
TEST_CASE("cuda forward: recovery in the middle of a text, by graph and without, as on the CPU") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF32));
  for (const Policy policy : {Policy::kThaw, Policy::kAsr, Policy::kH2o}) {
    if (kIsSlow && policy != Policy::kThaw) continue;
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    KvOptions o;
    o.policy.policy = policy;
    o.policy.window = 4, o.policy.softness = 0.4f;
    o.policy.epsilon = 1e-2f;
    o.centre_tokens = 16;
    if (policy == Policy::kH2o) o.hot_tokens = 12;
    const KvShape shape = kv_shape(tiny.model.config, 300, KvType::kF32);
    int n_calls = 0;  // of CUDA, in an exact step
    const auto run = [&](std::unique_ptr<Backend> backend, Logits& logits) {
      Machine m(tiny.model, std::move(backend));
      m.kv = m.transformer.backend().make_kv_store(shape, o);
      const auto reset = [&](int step) {
        if (step == 3) m.kv->reset(Rung::kSoft);
        if (step == 7) m.kv->reset(Rung::kWindow);
        if (step == 11) m.kv->reset(Rung::kFull);
        const int since_last = simt::emulated() ? simt::fail_call(0) : 0;
        if (step == 16) n_calls = since_last;
      };
      const Tokens all = generate(m, prompt(20, 96), kIsSlow ? 17 : 34, &logits, reset);
      CHECK(m.kv->counters().frozen > 0);
      return all;
    };
    auto plain = std::make_unique<CudaBackend>(tiny.model, 1);
    plain->use_graphs(false);
    Logits cpu, by_graph, without, checked;
    const Tokens expected = run(make_cpu_backend(tiny.model, 1), cpu);
    CHECK(run(make_cuda_backend(tiny.model, 1), by_graph) == expected);
    if (simt::emulated()) CHECK(n_calls < 10);
    CHECK(testing::nmse(by_graph, cpu) <= 3.2e-5);
    if (kIsSlow) continue;
    CHECK(run(std::move(plain), without) == expected);
    if (simt::emulated()) CHECK(n_calls > 20);
    CHECK(by_graph == without);
    CHECK(run(make_checked_backend(tiny.model, 1), checked) == expected);
  }
}

TEST_CASE("cuda forward: a store that checks itself writes the same") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF16));
  for (const Policy policy : {Policy::kFull, Policy::kThaw}) {
    if (kIsSlow && policy == Policy::kFull) continue;
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    KvOptions o;
    o.policy.policy = policy;
    const auto run = [&](bool check) {
      Machine m(tiny.model, make_cuda_backend(tiny.model, 1));
      o.check = check;
      m.kv = m.transformer.backend().make_kv_store(kv_shape(tiny.model.config, 300), o);
      return generate(m, prompt(3, 96), 4);
    };
    CHECK(run(true) == run(false));
  }
}

TEST_CASE("cuda forward: times are of work that is done") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF16));
  CudaBackend cuda(tiny.model, 1);
  simt::set_memory(std::size_t{16} << 20);  // a quarter of what is free is copied
  CHECK(cuda.measure_bandwidth() > 0);
  simt::set_memory(std::size_t{1} << 30);
  CHECK(cuda.time_cold([&] { cuda.begin(prompt(3, 96), 0, 0); }) > 0);
}

TEST_CASE("cuda forward: errors leave the store as it was") {
  const testing::TinyModel tiny = testing::make_tiny_model(options(DType::kF16));
  Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1));
  cuda.transformer.prefill(prompt(6, 96), *cuda.kv);
  CHECK(error_of([&] {
          cuda.transformer.prefill(Tokens{5, 96}, *cuda.kv);
        }) == "embed: token: expected 0 to 95, found 96");
  CHECK(cuda.kv->length() == 6);
  CHECK(generate(cuda, prompt(2, 96), 1).size() == 1);
}

TEST_CASE("cuda forward: any call that fails is one clear error") {
  testing::TinyOptions o = options(DType::kF16);
  o.n_layers = 1;
  const testing::TinyModel tiny = testing::make_tiny_model(o);
  const auto everything = [&] {
    Machine cuda(tiny.model, make_cuda_backend(tiny.model, 1));
    generate(cuda, prompt(9, 96), 2);
  };
  everything();  // what is asked for once a process
  simt::fail_call(0);
  everything();
  const int n_calls = simt::fail_call(0);
  CHECK(n_calls > 80);
  for (int call = 1; call <= n_calls; call += kEveryCall) {
    simt::fail_call(call);
    const std::string error = error_of(everything);
    simt::fail_call(0);
    forget_failure();
    if (error.empty()) FAIL("call " << call << " of " << n_calls << " failed, and nobody noticed");
    if (error.find('\n') != std::string::npos) FAIL("call " << call << ": " << error);
  }
}
