#include "model/forward.h"

#include <algorithm>
#include <numeric>

#include "device/error.h"

namespace thaw {

KvShape kv_shape(const Config& c, int capacity, KvType type) {
  return {c.n_layers, c.n_kv_heads,
          c.head_dim, capacity,
          type,       {rope_inverse_frequencies(c), c.rope_pairing == RopePairing::kInterleaved}};
}

Transformer::Transformer(const Model& model, int n_threads, int max_rows)
    : model_(model),
      max_rows_(max_rows),
      pool_(n_threads),
      ops_(make_cpu_ops(model.config, pool_)),
      attention_(make_cpu_attention(pool_)) {
  require(n_threads >= 1 && max_rows >= 1,
          "transformer: expected at least 1 thread and 1 row, found ", n_threads, " and ",
          max_rows);
}

void Transformer::observe(Observer observer) { ops_->observe(std::move(observer)); }

std::span<const float> Transformer::forward(std::span<const std::int32_t> tokens, KvStore& kv,
                                            int n_logits, Phase phase) {
  const Config& config = model_.config;
  const Weights& weights = model_.weights;
  const int n_rows = static_cast<int>(tokens.size());
  require(n_rows >= 1 && n_rows <= max_rows_, "forward: tokens: expected 1 to ", max_rows_,
          ", found ", n_rows);
  require(n_logits >= 0 && n_logits <= n_rows, "forward: n_logits: expected 0 to ", n_rows,
          ", found ", n_logits);
  reserve(n_rows, n_logits);
  std::iota(positions_.begin(), positions_.end(), kv.length());
  float *x = x_.data(), *q = q_.data(), *k = k_.data(), *v = v_.data(), *o = attn_out_.data(),
        *h = h_.data();

  ops_->embed(x, tokens, weights);  // x: T x dim
  kv.begin(n_rows, phase);
  for (const LayerWeights& w : weights.layers) {
    ops_->qkv(q, k, v, x, w, positions_);  // q: T x q_dim, k, v: T x kv_dim
    kv.append(w.index, k, v, n_rows);
    attention_->attend(o, q, n_rows, config.n_heads, kv.view(w.index), stats_,  // o: T x q_dim
                       kv.stats_rows(n_rows));
    kv.settle(w.index, stats_);
    ops_->report("attn_out", w.index, o, n_rows, config.q_dim());
    ops_->project_add(x, o, w.wo, n_rows);  // x += o Wo^T
    ops_->report("attn_residual", w.index, x, n_rows, config.dim);
    ops_->gate_up(h, x, w, n_rows);             // h: T x ffn_dim
    ops_->project_add(x, h, w.w_down, n_rows);  // x += h Wdown^T
    ops_->report("ffn_residual", w.index, x, n_rows, config.dim);
  }
  if (n_logits > 0)
    ops_->logits(logits_.data(), x + std::int64_t{n_rows - n_logits} * config.dim, weights,
                 n_logits);
  return {logits_.data(), static_cast<std::size_t>(n_logits) * config.vocab_size};
}

std::span<const float> Transformer::prefill(std::span<const std::int32_t> tokens, KvStore& kv) {
  require(!tokens.empty(), "prefill: tokens: expected at least 1, found 0");
  const std::size_t step = static_cast<std::size_t>(max_rows_);
  for (; tokens.size() > step; tokens = tokens.subspan(step))
    forward(tokens.first(step), kv, 0, Phase::kPrefill);
  return forward(tokens, kv, 1, Phase::kPrefill);
}

void Transformer::reserve(int n_rows, int n_logits) {
  const Config& c = model_.config;
  const auto grow = [](std::vector<float>& buffer, std::int64_t rows, std::int64_t cols) {
    buffer.resize(std::max(buffer.size(), static_cast<std::size_t>(rows * cols)));
  };
  grow(x_, n_rows, c.dim), grow(q_, n_rows, c.q_dim()), grow(k_, n_rows, c.kv_dim());
  grow(v_, n_rows, c.kv_dim()), grow(attn_out_, n_rows, c.q_dim()), grow(h_, n_rows, c.ffn_dim);
  grow(logits_, n_logits, c.vocab_size);
  positions_.resize(static_cast<std::size_t>(n_rows));
}

}  // namespace thaw
