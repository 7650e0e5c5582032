// A store that is told what attention saw, by examples small enough to follow by hand.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <utility>
#include <vector>

#include "kvstore/kvstore.h"

namespace thaw::testing {

inline constexpr int kDim = 8;

// What a token gets of the attention, by (layer, token). What is missing to 1 is nobody's.
using Attention = std::function<float(int layer, int token)>;

// A store of one KV head that is told what attention saw.
class Told {
 public:
  explicit Told(const KvOptions& options, int n_layers = 1)
      : kv_(make_kv_store({n_layers, 1, kDim, 4096, KvType::kF32}, options)) {}

  void prefill(int n, const Attention& probability, const Attention& relevance = {}) {
    step(n, Phase::kPrefill, probability, relevance, {});
  }
  // recalled: of layer 0.
  void decode(const Attention& probability, const Attention& relevance = {},
              const std::vector<AttentionStats::Recall>& recalled = {}) {
    step(1, Phase::kDecode, probability, relevance, recalled);
  }
  void entropies(std::vector<float> entropy) { entropy_ = std::move(entropy); }
  void ghost_mass(float mass) { ghost_mass_ = mass; }

  std::vector<int> hot(int layer = 0) const {
    const KvView view = kv_->view(layer);
    std::vector<int> tokens(view.lanes[0].tokens.begin(), view.lanes[0].tokens.end());
    std::sort(tokens.begin(), tokens.end());
    return tokens;
  }
  bool is_hot(int token, int layer = 0) const {
    const std::vector<int> tokens = hot(layer);
    return std::binary_search(tokens.begin(), tokens.end(), token);
  }
  KvStore& kv() { return *kv_; }

 private:
  void step(int n, Phase phase, const Attention& probability, const Attention& relevance,
            const std::vector<AttentionStats::Recall>& recalled) {
    kv_->begin(n, phase);
    const std::vector<float> x(static_cast<std::size_t>(n * kDim), 1.0f);
    for (int layer = 0; layer < kv_->shape().n_layers; ++layer) {
      kv_->append(layer, x.data(), x.data(), n);
      const KvView view = kv_->view(layer);
      AttentionStats stats;
      stats.n_rows = kv_->stats_rows(n);
      AttentionStats::Lane& lane = stats.lanes.emplace_back();
      lane.entropy = entropy_[static_cast<std::size_t>(layer) % entropy_.size()];
      lane.ghost_mass = ghost_mass_;
      const int n_rows = view.lanes.empty() ? view.kv_len : view.lanes[0].hot.n_rows;
      for (int row = 0; row < n_rows; ++row) {
        const int token = view.lanes.empty() ? row : view.lanes[0].tokens[row];
        lane.probability.push_back(probability(layer, token));
        lane.relevance.push_back(relevance ? relevance(layer, token) : 0.0f);
      }
      if (layer == 0) lane.recalled = recalled;
      kv_->settle(layer, stats);
    }
    kv_->check();
  }

  std::unique_ptr<KvStore> kv_;
  std::vector<float> entropy_ = {0.0f};
  float ghost_mass_ = 0;
};

inline KvOptions options(Policy policy, int window, int sinks) {
  KvOptions o;
  o.policy.policy = policy;
  o.policy.window = window;
  o.policy.sinks = sinks;
  o.centre_tokens = 4;
  o.check = true;
  return o;
}

inline float nobody(int, int) { return 0; }

inline std::vector<int> range(int begin, int end) {
  std::vector<int> out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

inline std::vector<int> joined(std::vector<int> a, const std::vector<int>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

}  // namespace thaw::testing
