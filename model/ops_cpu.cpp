// The ops on the CPU: each is one to three parallel loops around matmul().
#include <algorithm>
#include <cmath>
#include <vector>

#include "device/error.h"
#include "device/fast_math.h"
#include "model/matmul.h"
#include "model/ops.h"

namespace thaw {
namespace {

// n = x / sqrt(mean(x^2) + eps) * w   (Zhang and Sennrich, 1910.07467)
void rms_norm(float* n, const float* x, const std::vector<float>& w, float eps) {
  const std::int64_t dim = static_cast<std::int64_t>(w.size());
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < dim; ++i) sum += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(sum / static_cast<float>(dim) + eps);
  for (std::int64_t i = 0; i < dim; ++i) n[i] = x[i] * scale * w[i];
}

class CpuOps final : public Ops {
 public:
  CpuOps(const Config& config, ThreadPool& pool)
      : config_(config), pool_(pool), inverse_frequencies_(rope_inverse_frequencies(config)) {}

  void embed(float* x, std::span<const std::int32_t> tokens, const Weights& weights) override {
    const Tensor& table = weights.embedding;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      require(tokens[t] >= 0 && tokens[t] < table.rows, "embed: token: expected 0 to ",
              table.rows - 1, ", found ", tokens[t]);
      dequantize(x + t * table.cols, table.row(tokens[t]), table.type, table.cols);
    }
    report("embed", -1, x, static_cast<std::int64_t>(tokens.size()), table.cols);
  }

  void qkv(float* q, float* k, float* v, const float* x, const LayerWeights& w,
           std::span<const std::int32_t> positions) override {
    const std::int64_t n_rows = static_cast<std::int64_t>(positions.size());
    const float* n = normalize(x, w.attn_norm, n_rows);
    report("attn_norm", w.index, n, n_rows, config_.dim);
    const Tensor* matrices[] = {&w.wq, &w.wk, &w.wv};
    float* outputs[] = {q, k, v};
    multiply(outputs, matrices, n, n_rows);
    rotate(q, config_.n_heads, positions);
    rotate(k, config_.n_kv_heads, positions);
    report("q", w.index, q, n_rows, config_.q_dim());
    report("k", w.index, k, n_rows, config_.kv_dim());
    report("v", w.index, v, n_rows, config_.kv_dim());
  }

  void project_add(float* x, const float* h, const Tensor& w, std::int64_t n_rows) override {
    activations_.assign(h, n_rows, w.cols, needs_codes(w.type), pool_);
    const Product product{x, w.rows, &w, true};
    matmul({&product, 1}, activations_, pool_);
  }

  void gate_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) override {
    const float* n = normalize(x, w.ffn_norm, n_rows);
    report("ffn_norm", w.index, n, n_rows, config_.dim);
    up_.resize(std::max(up_.size(), static_cast<std::size_t>(n_rows * config_.ffn_dim)));
    const Tensor* matrices[] = {&w.w_gate, &w.w_up};
    float* outputs[] = {h, up_.data()};
    multiply(outputs, matrices, n, n_rows);
    for_rows(n_rows, [&](std::int64_t t) {
      float* gate = h + t * config_.ffn_dim;
      const float* up = up_.data() + t * config_.ffn_dim;
#pragma omp simd
      for (int i = 0; i < config_.ffn_dim; ++i) gate[i] = silu(gate[i]) * up[i];
    });
    report("ffn_hidden", w.index, h, n_rows, config_.ffn_dim);
  }

  void logits(float* logits, const float* x, const Weights& weights, std::int64_t n_rows) override {
    const float* n = normalize(x, weights.final_norm, n_rows);
    report("final_norm", -1, n, n_rows, config_.dim);
    const Tensor* matrices[] = {&weights.output};
    multiply({&logits, 1}, matrices, n, n_rows);
    report("logits", -1, logits, n_rows, config_.vocab_size);
  }

 private:
  // body(row) for every row, a task for every few of them.
  template <class Body>
  void for_rows(std::int64_t n_rows, const Body& body) {
    constexpr std::int64_t kRows = 8;
    pool_.run((n_rows + kRows - 1) / kRows, [&](std::int64_t task, int) {
      const std::int64_t end = std::min(n_rows, (task + 1) * kRows);
      for (std::int64_t row = task * kRows; row < end; ++row) body(row);
    });
  }

  const float* normalize(const float* x, const std::vector<float>& w, std::int64_t n_rows) {
    const std::int64_t dim = config_.dim;
    norm_.resize(std::max(norm_.size(), static_cast<std::size_t>(n_rows * dim)));
    for_rows(n_rows, [&](std::int64_t t) {
      rms_norm(norm_.data() + t * dim, x + t * dim, w, config_.norm_eps);
    });
    return norm_.data();
  }

  // outputs[i] (n_rows x matrices[i]->rows) = n (n_rows x dim) times matrices[i]^T
  void multiply(std::span<float* const> outputs, std::span<const Tensor* const> matrices,
                const float* n, std::int64_t n_rows) {
    Product products[3];
    bool with_codes = false;
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      products[i] = {outputs[i], matrices[i]->rows, matrices[i], false};
      with_codes |= needs_codes(matrices[i]->type);
    }
    activations_.assign(n, n_rows, config_.dim, with_codes, pool_);
    matmul({products, outputs.size()}, activations_, pool_);
  }

  // The angles of `positions`, unless they are the same as in the layer before.
  void update_rotations(std::span<const std::int32_t> positions) {
    if (std::equal(positions.begin(), positions.end(), rope_positions_.begin(),
                   rope_positions_.end()))
      return;
    rope_positions_.assign(positions.begin(), positions.end());
    const std::size_t half = inverse_frequencies_.size();
    cos_.resize(positions.size() * half), sin_.resize(positions.size() * half);
    for (std::size_t t = 0; t < positions.size(); ++t) {
      for (std::size_t i = 0; i < half; ++i) {
        const float angle = static_cast<float>(positions[t]) * inverse_frequencies_[i];
        cos_[t * half + i] = std::cos(angle), sin_[t * half + i] = std::sin(angle);
      }
    }
  }

  // RoPE on every head of every row of x (rows x n_heads * head_dim)   (RoFormer, 2104.09864, eq.
  // 34)
  void rotate(float* x, int n_heads, std::span<const std::int32_t> positions) {
    update_rotations(positions);
    const int half = config_.head_dim / 2;
    const bool interleaved = config_.rope_pairing == RopePairing::kInterleaved;
    const int step = interleaved ? 2 : 1, partner = interleaved ? 1 : half;
    const std::int64_t n_rows = static_cast<std::int64_t>(positions.size());
    for_rows(n_rows, [&](std::int64_t row) {
      const float *cos = cos_.data() + row * half, *sin = sin_.data() + row * half;
      for (int head = 0; head < n_heads; ++head) {
        float* pair = x + (row * n_heads + head) * config_.head_dim;
        for (int i = 0; i < half; ++i, pair += step) {
          const float a = pair[0], b = pair[partner];
          pair[0] = a * cos[i] - b * sin[i];
          pair[partner] = a * sin[i] + b * cos[i];
        }
      }
    });
  }

  const Config& config_;
  ThreadPool& pool_;
  std::vector<float> inverse_frequencies_;
  std::vector<float> cos_, sin_;  // rows of the last positions x head_dim / 2
  std::vector<std::int32_t> rope_positions_;
  std::vector<float> norm_, up_;
  Activations activations_;
};

}  // namespace

std::unique_ptr<Ops> make_cpu_ops(const Config& config, ThreadPool& pool) {
  return std::make_unique<CpuOps>(config, pool);
}

}  // namespace thaw
