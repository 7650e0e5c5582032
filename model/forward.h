// The forward pass, written once: for T rows, every backend, every weight format, every KV store.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>

#include "kvstore/kvstore.h"
#include "model/backend.h"
#include "model/model.h"

namespace thaw {

// The store that a model's forward passes fill: its sizes, and how its keys turn.
KvShape kv_shape(const Config& config, int capacity, KvType type = KvType::kF16);

class Transformer {
 public:
  static constexpr int kBestRows = -1;  // Backend::best_rows()

  // Keeps a reference to `model`, which must outlive this. max_rows: most tokens of one forward()
  // call; scratch memory grows with it.
  Transformer(const Model& model, std::unique_ptr<Backend> backend, int max_rows = kBestRows);
  // On the CPU. n_threads: at least 1; results do not depend on it.
  Transformer(const Model& model, int n_threads, int max_rows = kBestRows);

  // Runs `tokens` (1 .. max_rows; in decode 1) at positions kv.length() ...; appends them to kv,
  // a store that backend() made.
  // Returns logits of the last n_logits rows (0 .. T), n_logits x vocab_size, valid until the next
  // call. Throws Error on a token outside the vocabulary, or when the store is full or gets no
  // memory (nothing is changed then).
  std::span<const float> forward(std::span<const std::int32_t> tokens, KvStore& kv, int n_logits,
                                 Phase phase = Phase::kPrefill);

  // forward() of one token in decode, and what `sampler` would choose next among the first n_vocab
  // tokens, where the backend samples itself (Backend::predict); otherwise the logits have to say.
  std::optional<Prediction> predict(std::int32_t token, KvStore& kv, Sampler& sampler, int n_vocab);
  // Of the last forward() or predict().
  std::span<const float> logits();

  // Prefill of any number of tokens, in calls of at most max_rows; logits of the last token only.
  std::span<const float> prefill(std::span<const std::int32_t> tokens, KvStore& kv);

  // Appends `tokens` (1 .. max_rows) to kv whose keys and values are known: rows(layer, k, v) gives
  // those of each layer in turn, T x kv_dim each. Nothing is computed. Throws Error as forward()
  // does.
  using KnownRows = std::function<void(int, std::span<float>, std::span<float>)>;
  void restore(std::span<const std::int32_t> tokens, KvStore& kv, const KnownRows& rows);

  // Every named intermediate of every forward() from now on; {} to stop.
  void observe(Observer observer);

  Backend& backend() { return *backend_; }
  ThreadPool& pool() { return backend_->pool(); }
  const Config& config() const { return model_.config; }
  int max_rows() const { return max_rows_; }

 private:
  void run(std::span<const std::int32_t> tokens, KvStore& kv, int n_logits, Phase phase);
  void run_layers(const Scratch& a, KvStore& kv, int n_logits);

  const Model& model_;
  int max_rows_;
  std::unique_ptr<Backend> backend_;
  AttentionStats stats_;
  Scratch scratch_ = {};  // of the last pass, which gave n_logits_ rows of logits
  int n_logits_ = 0;
};

}  // namespace thaw
