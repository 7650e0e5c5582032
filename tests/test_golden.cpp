// Whole models against Hugging Face transformers. The expected values are made by tools/golden.py.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "kvstore/kvstore.h"
#include "model/forward.h"
#include "model/model.h"
#include "tests/compare.h"
#include "tests/sanitized.h"
#include "tests/weights.h"

namespace thaw {
namespace {

using Tokens = std::vector<std::int32_t>;

nlohmann::json read_golden(const std::filesystem::path& path) {
  std::ifstream file(path);
  REQUIRE_MESSAGE(file, path.string(), ": run the tests from the root of the repository");
  return nlohmann::json::parse(file);
}

std::unique_ptr<KvStore> make_store(const Config& config, std::size_t capacity, KvType type) {
  return make_kv_store(kv_shape(config, static_cast<int>(capacity), type));
}

// Logits of every token, tokens.size() x vocab, computed `step` tokens at a time.
std::vector<float> all_logits(const Model& model, const Tokens& tokens, std::size_t step,
                              KvType type) {
  Transformer transformer(model, 2, static_cast<int>(step));
  const auto store = make_store(model.config, tokens.size(), type);
  std::vector<float> logits;
  for (std::size_t first = 0; first < tokens.size(); first += step) {
    const std::size_t n = std::min(step, tokens.size() - first);
    const auto rows =
        transformer.forward(std::span(tokens).subspan(first, n), *store, static_cast<int>(n));
    logits.insert(logits.end(), rows.begin(), rows.end());
  }
  return logits;
}

std::vector<double> log_softmax(std::span<const float> logits) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float x : logits) sum += std::exp(x - largest);
  std::vector<double> out;
  for (const float x : logits) out.push_back(x - largest - std::log(sum));
  return out;
}

void check_tiny(const std::string& name) {
  CAPTURE(name);
  const std::filesystem::path folder = "tests/golden/" + name;
  const nlohmann::json golden = read_golden(folder / "expected.json");
  const Tokens tokens = golden.at("tokens").get<Tokens>();
  std::vector<float> expected;
  for (const auto& row : golden.at("logits").get<std::vector<std::vector<float>>>())
    expected.insert(expected.end(), row.begin(), row.end());
  // Both sides sum the same products in f32, each in its own order.
  const double tolerance = 4 * golden.at("f32_error").get<double>();
  const Model model = load_model(folder);
  for (const std::size_t step : {tokens.size(), std::size_t{1}, std::size_t{7}}) {
    CAPTURE(step);
    const std::vector<float> logits = all_logits(model, tokens, step, KvType::kF32);
    CHECK(testing::n_beyond(logits, expected, tolerance) == 0);
  }
}

TEST_CASE("tiny Hugging Face models give the logits of transformers") {
  check_tiny("tiny_mha_tied");     // one query head for each k/v head, tied output, F32
  check_tiny("tiny_gqa3_untied");  // three query heads share a k/v head, own output head
  check_tiny("tiny_gqa4_llama3");  // four share one; llama3 RoPE scaling; BF16
  check_tiny("tiny_linear");       // linear RoPE scaling; F16
  check_tiny("tiny_sharded");      // two shards; RoPE in "rope_parameters"
}

constexpr double kClear = 0.02, kFar = 0.05;

// What thaw says about the positions of a golden of a large vocabulary.
struct Fidelity {
  double mean_kl = 0;     // KL(golden || thaw) in nats
  int far_nlls = 0;       // NLLs that differ by more than kFar nats
  int clear_choices = 0;  // where the golden prefers its best token by kClear nats or more
  int agreements = 0;     // those of them where thaw has the same best token
};

// KL from the golden's most probable tokens and the rest taken as one; never more than the full KL.
double coarse_kl(const std::vector<double>& log_q, const std::vector<std::size_t>& ids,
                 const std::vector<double>& log_p) {
  double kl = 0, p_rest = 1, q_rest = 1;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const double p = std::exp(log_p[i]);
    kl += p * (log_p[i] - log_q[ids[i]]);
    p_rest -= p;
    q_rest -= std::exp(log_q[ids[i]]);
  }
  return p_rest > 0 && q_rest > 0 ? kl + p_rest * std::log(p_rest / q_rest) : kl;
}

Fidelity measure(const nlohmann::json& golden, const Tokens& tokens,
                 const std::vector<float>& logits) {
  const auto ids = golden.at("top_ids").get<std::vector<std::vector<std::size_t>>>();
  const auto log_p = golden.at("top_logp").get<std::vector<std::vector<double>>>();
  const auto nll = golden.at("nll").get<std::vector<double>>();
  const std::size_t vocab = logits.size() / tokens.size();
  Fidelity result;
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    const auto row = std::span(logits).subspan(t * vocab, vocab);
    const std::vector<double> log_q = log_softmax(row);
    const auto best = std::max_element(row.begin(), row.end()) - row.begin();
    result.mean_kl += coarse_kl(log_q, ids[t], log_p[t]) / static_cast<double>(tokens.size());
    const bool clear = log_p[t][0] - log_p[t][1] >= kClear;
    result.clear_choices += clear;
    result.agreements += clear && static_cast<std::size_t>(best) == ids[t][0];
    if (t + 1 == tokens.size()) break;
    const double own_nll = -log_q.at(static_cast<std::size_t>(tokens[t + 1]));
    result.far_nlls += !(std::abs(own_nll - nll[t]) <= kFar);
  }
  return result;
}

// Under sanitizers it takes minutes, and goes the ways of the small models.
TEST_CASE("SmolLM2 Q4_1 is faithful to transformers in f32 on the same weights" *
          doctest::skip(testing::sanitized())) {
  const auto path = weights_file(kSmolLM2File);
  if (!path) return;
  const Model model = load_model(*path);
  const nlohmann::json golden = read_golden("tests/golden/smollm2.json");
  const Tokens tokens = golden.at("tokens").get<Tokens>();
  const std::vector<float> logits = all_logits(model, tokens, 128, KvType::kF16);
  const Fidelity fidelity = measure(golden, tokens, logits);
  CHECK(fidelity.mean_kl <= 1e-5);  // 3.4e-7 with 16-bit activations and f16 keys and values
  CHECK(fidelity.far_nlls == 0);
  CHECK(fidelity.clear_choices >= 360);
  CHECK(fidelity.agreements == fidelity.clear_choices);
}

}  // namespace
}  // namespace thaw
