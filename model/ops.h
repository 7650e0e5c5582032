// The operations of a forward pass: five fused ops that surround attention. One implementation a
// backend; model/forward.cpp composes them and knows no backend.
//
// All activations are f32, row-major, T rows; T = positions.size() or tokens.size(). Outputs come
// first and must not alias inputs, except x in project_add and feed_forward, which is read and
// written.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

#include "device/thread_pool.h"
#include "model/config.h"
#include "model/weights.h"

namespace thaw {

// Rows of an activation that an op has just computed; valid during the call only.
struct ActivationView {
  std::string_view name;  // "attn_norm", "q", "attn_out", ...: the names in docs/tour.md
  int layer;              // -1 outside the layers
  const float* data;      // rows x cols
  std::int64_t rows;
  std::int64_t cols;
};
using Observer = std::function<void(const ActivationView&)>;

class Ops {
 public:
  virtual ~Ops() = default;

  // x (T x dim) = rows of the embedding table. Tokens must lie in [0, vocab_size).
  virtual void embed(float* x, std::span<const std::int32_t> tokens, const Weights& weights) = 0;

  // n = RMSNorm(x) * attn_norm; q (T x q_dim) = RoPE(n Wq^T), k (T x kv_dim) = RoPE(n Wk^T),
  // v (T x kv_dim) = n Wv^T.  Observed: attn_norm, q, k, v.
  virtual void qkv(float* q, float* k, float* v, const float* x, const LayerWeights& w,
                   std::span<const std::int32_t> positions) = 0;

  // x (T x w.rows) += h (T x w.cols) W^T.
  virtual void project_add(float* x, const float* h, const Tensor& w, std::int64_t n_rows) = 0;

  // n = RMSNorm(x) * ffn_norm; h (T x ffn_dim) = silu(n Wgate^T) * (n Wup^T).  Observed: ffn_norm,
  // ffn_hidden.
  virtual void gate_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) = 0;

  // gate_up() and project_add() with Wdown, in which h is scratch where nobody observes it.
  virtual void feed_forward(float* x, float* h, const LayerWeights& w, std::int64_t n_rows) {
    gate_up(h, x, w, n_rows);
    project_add(x, h, w.w_down, n_rows);
  }

  // logits (T x vocab_size) = RMSNorm(x) * final_norm Woutput^T.  Observed: final_norm, logits.
  virtual void logits(float* logits, const float* x, const Weights& weights,
                      std::int64_t n_rows) = 0;

  // Called with every named intermediate; an empty function (the default) costs nothing.
  virtual void observe(Observer observer) { observer_ = std::move(observer); }
  // Tells the observer, which reads host memory: a backend that has its own copies first.
  virtual void report(std::string_view name, int layer, const float* data, std::int64_t rows,
                      std::int64_t cols) const {
    if (observer_) observer_({name, layer, data, rows, cols});
  }

  virtual bool observed() const { return static_cast<bool>(observer_); }

 private:
  Observer observer_;
};

// Keeps references to both. Results do not depend on the pool's size.
std::unique_ptr<Ops> make_cpu_ops(const Config& config, ThreadPool& pool);

}  // namespace thaw
