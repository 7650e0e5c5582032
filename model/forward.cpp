#include "model/forward.h"

#include <vector>

#include "device/error.h"

namespace thaw {

KvShape kv_shape(const Config& c, int capacity, KvType type) {
  return {c.n_layers, c.n_kv_heads,
          c.head_dim, capacity,
          type,       {rope_inverse_frequencies(c), c.rope_pairing == RopePairing::kInterleaved}};
}

Transformer::Transformer(const Model& model, std::unique_ptr<Backend> backend, int max_rows)
    : model_(model),
      max_rows_(max_rows == kBestRows ? backend->best_rows() : max_rows),
      backend_(std::move(backend)) {
  require(max_rows_ >= 1, "transformer: expected at least 1 row, found ", max_rows);
}

Transformer::Transformer(const Model& model, int n_threads, int max_rows)
    : Transformer(model, make_cpu_backend(model, n_threads), max_rows) {}

void Transformer::observe(Observer observer) { backend_->ops().observe(std::move(observer)); }

void Transformer::run(std::span<const std::int32_t> tokens, KvStore& kv, int n_logits,
                      Phase phase) {
  const int n_rows = static_cast<int>(tokens.size());
  require(n_rows >= 1 && n_rows <= max_rows_, "forward: tokens: expected 1 to ", max_rows_,
          ", found ", n_rows);
  require(n_logits >= 0 && n_logits <= n_rows, "forward: n_logits: expected 0 to ", n_rows,
          ", found ", n_logits);
  n_logits_ = n_logits;
  scratch_ = backend_->begin(tokens, kv.length(), n_logits);
  backend_->ops().embed(scratch_.x, scratch_.tokens, model_.weights);  // x: T x dim
  kv.begin(n_rows, phase);
  backend_->run(kv, [&] { run_layers(scratch_, kv, n_logits); });
}

std::span<const float> Transformer::logits() {
  return backend_->fetch(scratch_, static_cast<std::size_t>(n_logits_) * model_.config.vocab_size);
}

std::span<const float> Transformer::forward(std::span<const std::int32_t> tokens, KvStore& kv,
                                            int n_logits, Phase phase) {
  run(tokens, kv, n_logits, phase);
  return logits();
}

std::optional<Prediction> Transformer::predict(std::int32_t token, KvStore& kv, Sampler& sampler,
                                               int n_vocab) {
  run({&token, 1}, kv, 1, Phase::kDecode);
  return backend_->predict(scratch_, sampler, n_vocab);
}

void Transformer::run_layers(const Scratch& a, KvStore& kv, int n_logits) {
  const Config& config = model_.config;
  const int n_rows = static_cast<int>(a.tokens.size());
  float *x = a.x, *q = a.q, *k = a.k, *v = a.v, *o = a.attn_out, *h = a.h;
  Ops& ops = backend_->ops();

  for (const LayerWeights& w : model_.weights.layers) {
    backend_->enter_layer(w.index);
    ops.qkv(q, k, v, x, w, a.positions);  // q: T x q_dim, k, v: T x kv_dim
    kv.append(w.index, k, v, n_rows);
    backend_->attention().attend(o, q, n_rows, config.n_heads, kv.view(w.index),  // o: T x q_dim
                                 stats_, kv.stats_rows(n_rows));
    kv.settle(w.index, stats_);
    ops.report("attn_out", w.index, o, n_rows, config.q_dim());
    ops.project_add(x, o, w.wo, n_rows);  // x += o Wo^T
    ops.report("attn_residual", w.index, x, n_rows, config.dim);
    ops.feed_forward(x, h, w, n_rows);  // h = silu(n Wgate^T) * (n Wup^T), x += h Wdown^T
    ops.report("ffn_residual", w.index, x, n_rows, config.dim);
  }
  backend_->enter_layer(-1);
  if (n_logits > 0)
    ops.logits(a.logits, x + std::int64_t{n_rows - n_logits} * config.dim, model_.weights,
               n_logits);
}

std::span<const float> Transformer::prefill(std::span<const std::int32_t> tokens, KvStore& kv) {
  require(!tokens.empty(), "prefill: tokens: expected at least 1, found 0");
  const std::size_t step = static_cast<std::size_t>(max_rows_);
  for (; tokens.size() > step; tokens = tokens.subspan(step))
    forward(tokens.first(step), kv, 0, Phase::kPrefill);
  return forward(tokens, kv, 1, Phase::kPrefill);
}

void Transformer::restore(std::span<const std::int32_t> tokens, KvStore& kv,
                          const KnownRows& rows) {
  const int n_rows = static_cast<int>(tokens.size());
  require(n_rows >= 1 && n_rows <= max_rows_, "restore: tokens: expected 1 to ", max_rows_,
          ", found ", n_rows);
  const Scratch a = backend_->begin(tokens, kv.length(), 0);
  std::vector<float> k(tokens.size() * static_cast<std::size_t>(model_.config.kv_dim())), v(k);
  kv.begin(n_rows, Phase::kRestore);
  for (int layer = 0; layer < model_.config.n_layers; ++layer) {
    rows(layer, k, v);
    backend_->upload(a.k, k), backend_->upload(a.v, v);
    kv.append(layer, a.k, a.v, n_rows);
    kv.settle(layer, {});
  }
}

}  // namespace thaw
