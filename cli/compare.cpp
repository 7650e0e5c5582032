#include "cli/compare.h"

#include <algorithm>

#include "model/divergence.h"
#include "model/generate.h"

namespace thaw {
namespace {

void add(KvUsage& sum, const KvUsage& usage) {
  sum.hot += usage.hot;
  sum.ghosts += usage.ghosts;
  sum.bookkeeping += usage.bookkeeping;
  sum.cold += usage.cold;
  sum.full += usage.full;
  sum.resident += usage.resident;
}

void add(KvCounters& sum, const KvCounters& counters) {
  sum.steps += counters.steps;
  sum.attended += counters.attended;
  sum.visible += counters.visible;
  sum.recalled += counters.recalled;
  sum.thawed += counters.thawed;
  sum.frozen += counters.frozen;
  sum.cold_bytes_read += counters.cold_bytes_read;
  sum.cold_bytes_visible += counters.cold_bytes_visible;
}

std::int64_t f16_bytes(const KvStore& store) {
  KvShape shape = store.shape();
  shape.type = KvType::kF16;
  return shape.bytes_per_token() * store.length();
}

void add(KvStep::Layer& sum, const KvStep::Layer& layer) {
  sum.entropy += layer.entropy;
  sum.ghost_mass += layer.ghost_mass;
  sum.threshold += layer.threshold;
  sum.hot += layer.hot;
  sum.budget += layer.budget;
  sum.recalled += layer.recalled;
  sum.thawed += layer.thawed;
  sum.frozen += layer.frozen;
}

// Sums what happens in each layer.
class LayerSums : public KvRecorder {
 public:
  LayerSums(KvStore& store, PolicyScore& score) : store_(store), score_(score) {
    store.record(this);
  }
  ~LayerSums() override { store_.record(nullptr); }
  LayerSums(const LayerSums&) = delete;
  LayerSums& operator=(const LayerSums&) = delete;

  bool wants_events() const override { return false; }
  void event(const KvEvent&) override {}
  void step(const KvStep& step) override {
    score_.layers.resize(step.layers.size());
    for (std::size_t i = 0; i < step.layers.size(); ++i) add(score_.layers[i], step.layers[i]);
  }

 private:
  KvStore& store_;
  PolicyScore& score_;
};

// One Transformer whose passes alternate between the stores.
class Lockstep {
 public:
  Lockstep(Transformer& transformer, const std::vector<std::unique_ptr<KvStore>>& stores,
           KvStore* full)
      : transformer_(transformer), stores_(stores), full_(full) {
    result.policies.resize(stores.size());
    for (std::size_t i = 0; i < stores.size(); ++i)
      sums_.push_back(std::make_unique<LayerSums>(*stores[i], result.policies[i]));
  }

  // False when `go_on`, asked after each batch, says so; then the stores hold a part.
  bool prefill(const std::vector<TokenId>& tokens, const std::function<bool()>& go_on) {
    if (full_ && !prefill(tokens, *full_, go_on)) return false;
    return std::all_of(stores_.begin(), stores_.end(),
                       [&](const auto& store) { return prefill(tokens, *store, go_on); });
  }

  // Decodes `token`, which `next` follows.
  void step(TokenId token, TokenId next) {
    if (full_) {
      const std::span<const float> logits =
          transformer_.forward({&token, 1}, *full_, 1, Phase::kDecode);
      full_logits_.assign(logits.begin(), logits.end());
      result.nll_full.push_back(negative_log_likelihood(logits, next));
    }
    for (std::size_t i = 0; i < stores_.size(); ++i) {
      PolicyScore& score = result.policies[i];
      const std::span<const float> logits =
          transformer_.forward({&token, 1}, *stores_[i], 1, Phase::kDecode);
      if (full_) {
        const Divergence d = compare_rows(transformer_.pool(), full_logits_, logits, next);
        score.nll.push_back(d.nll);
        score.kl.push_back(d.kl);
        score.same_top += d.same_top;
      } else {
        score.nll.push_back(negative_log_likelihood(logits, next));
      }
    }
  }

  void end_window() {
    ++result.windows;
    for (std::size_t i = 0; i < stores_.size(); ++i) {
      PolicyScore& score = result.policies[i];
      add(score.usage, stores_[i]->usage());
      add(score.counters, stores_[i]->counters());
      score.f16_bytes += f16_bytes(*stores_[i]);
    }
  }

  Comparison result;

 private:
  bool prefill(const std::vector<TokenId>& tokens, KvStore& store,
               const std::function<bool()>& go_on) {
    store.clear();
    const int last = static_cast<int>(tokens.size()) - 1;
    return teacher_force(transformer_, store, tokens, {.first = last},
                         [&](int, std::span<const float>) { return go_on(); });
  }

  Transformer& transformer_;
  const std::vector<std::unique_ptr<KvStore>>& stores_;
  KvStore* full_;
  std::vector<float> full_logits_;
  std::vector<std::unique_ptr<LayerSums>> sums_;
};

}  // namespace

std::vector<DecodeWindow> decode_windows(const DecodeWindows& w, int n_tokens) {
  const int n_bos = w.bos >= 0;
  std::vector<DecodeWindow> plan;
  for (int begin = 0; static_cast<int>(plan.size()) < w.most; begin += w.stride) {
    const int end =
        std::min(begin + w.context - n_bos, n_tokens - 1);  // the last is only predicted
    if (end - begin + n_bos <= w.prefill) break;
    plan.push_back({begin, end});
  }
  return plan;
}

Comparison compare_policies(Transformer& transformer,
                            const std::vector<std::unique_ptr<KvStore>>& stores, KvStore* full,
                            std::span<const TokenId> ids, const DecodeWindows& windows,
                            const std::function<bool(int, int)>& progress) {
  Lockstep run(transformer, stores, full);
  for (const auto& [begin, end] : decode_windows(windows, static_cast<int>(ids.size()))) {
    std::vector<TokenId> tokens(ids.begin() + begin, ids.begin() + end);
    if (windows.bos >= 0) tokens.insert(tokens.begin(), windows.bos);
    const int n_tokens = static_cast<int>(tokens.size());
    const auto go_on = [&](int i) {
      run.result.interrupted = !progress(run.result.windows, i - windows.prefill);
      return !run.result.interrupted;
    };
    if (!run.prefill({tokens.begin(), tokens.begin() + windows.prefill},
                     [&] { return go_on(windows.prefill); }))
      return run.result;
    for (int i = windows.prefill; i < n_tokens; ++i) {
      if (!go_on(i)) return run.result;
      run.step(tokens[i], ids[end - n_tokens + i + 1]);
    }
    run.end_window();
  }
  return run.result;
}

}  // namespace thaw
