// The definition: a LLaMA-architecture model in plain loops, f32 storage and f64 accumulation. No
// intrinsics, no threads, no cache; every position is computed from the equations. Start reading
// here; every backend is tested against it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "model/model.h"

namespace thaw::reference {

using Vector = std::vector<float>;
using Matrix = std::vector<Vector>;  // [row][col]

// n_i = x_i / sqrt(mean(x^2) + eps) * w_i
inline Vector rms_norm(const Vector& x, const Vector& w, float eps) {
  double sum = 0;
  for (float value : x) sum += static_cast<double>(value) * value;
  const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
  Vector n(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) n[i] = static_cast<float>(x[i] * scale * w[i]);
  return n;
}

// y = W x, W: rows x cols in any stored format
inline Vector project(const Tensor& w, const Vector& x) {
  Vector y(static_cast<std::size_t>(w.rows)), row(static_cast<std::size_t>(w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r) {
    dequantize(row.data(), w.row(r), w.type, w.cols);
    double sum = 0;
    for (std::int64_t i = 0; i < w.cols; ++i) sum += static_cast<double>(row[i]) * x[i];
    y[r] = static_cast<float>(sum);
  }
  return y;
}

// Rotates pair i of every head of x by position * theta^(-2i / head_dim) / factor_i   (RoFormer,
// eq. 34)
inline void rope(Vector& x, int position, const Config& c) {
  const int half = c.head_dim / 2;
  for (std::size_t head = 0; head < x.size(); head += static_cast<std::size_t>(c.head_dim)) {
    for (int i = 0; i < half; ++i) {
      const double factor = c.rope_factors.empty() ? 1 : c.rope_factors[i];
      const double angle =
          position * std::pow(double{c.rope_theta}, -2.0 * i / c.head_dim) / factor;
      const bool interleaved = c.rope_pairing == RopePairing::kInterleaved;
      float& a = x[head + static_cast<std::size_t>(interleaved ? 2 * i : i)];
      float& b = x[head + static_cast<std::size_t>(interleaved ? 2 * i + 1 : i + half)];
      const double rotated_a = a * std::cos(angle) - b * std::sin(angle);
      const double rotated_b = a * std::sin(angle) + b * std::cos(angle);
      a = static_cast<float>(rotated_a), b = static_cast<float>(rotated_b);
    }
  }
}

// What one query row sees of one layer: o, and the by-products of attention.h.
struct AttentionResult {
  Vector o;            // n_heads * head_dim
  Vector probability;  // mean over heads, one per token of k
  double entropy = 0;  // mean over heads, nats
};

// o_h = sum_j softmax_j(q_h . k_j / sqrt(d)) v_j over the first n_visible tokens
inline AttentionResult attend(const Vector& q, const Matrix& k, const Matrix& v, int n_visible,
                              int n_heads, int n_kv_heads, int head_dim) {
  AttentionResult r{Vector(q.size()), Vector(static_cast<std::size_t>(n_visible)), 0};
  for (int h = 0; h < n_heads; ++h) {
    const int q_at = h * head_dim, kv_at = h / (n_heads / n_kv_heads) * head_dim;
    std::vector<double> p(static_cast<std::size_t>(n_visible));
    double max = -std::numeric_limits<double>::infinity(), sum = 0;
    for (int j = 0; j < n_visible; ++j) {
      for (int i = 0; i < head_dim; ++i) p[j] += static_cast<double>(q[q_at + i]) * k[j][kv_at + i];
      p[j] /= std::sqrt(static_cast<double>(head_dim));
      max = std::fmax(max, p[j]);
    }
    for (double& score : p) sum += score = std::exp(score - max);
    for (int j = 0; j < n_visible; ++j) {
      p[j] /= sum;
      r.probability[j] += static_cast<float>(p[j] / n_heads);
      if (p[j] > 0) r.entropy -= p[j] * std::log(p[j]) / n_heads;
    }
    for (int i = 0; i < head_dim; ++i) {
      double o = 0;
      for (int j = 0; j < n_visible; ++j) o += p[j] * v[j][kv_at + i];
      r.o[q_at + i] = static_cast<float>(o);
    }
  }
  return r;
}

inline void add(Vector& x, const Vector& y) {
  for (std::size_t i = 0; i < x.size(); ++i) x[i] += y[i];
}

// One layer for all rows x (T x dim), in place.
inline void layer(Matrix& x, const LayerWeights& w, const Config& c) {
  Matrix q, k, v;
  for (std::size_t t = 0; t < x.size(); ++t) {
    const Vector n = rms_norm(x[t], w.attn_norm, c.norm_eps);
    q.push_back(project(w.wq, n));
    k.push_back(project(w.wk, n));
    v.push_back(project(w.wv, n));
    rope(q[t], static_cast<int>(t), c);
    rope(k[t], static_cast<int>(t), c);
  }
  for (std::size_t t = 0; t < x.size(); ++t) {
    const int n_visible = static_cast<int>(t) + 1;
    add(x[t], project(w.wo, attend(q[t], k, v, n_visible, c.n_heads, c.n_kv_heads, c.head_dim).o));
    const Vector n = rms_norm(x[t], w.ffn_norm, c.norm_eps);
    const Vector gate = project(w.w_gate, n);
    Vector h = project(w.w_up, n);
    for (std::size_t i = 0; i < h.size(); ++i)
      h[i] = static_cast<float>(h[i] * (gate[i] / (1 + std::exp(-static_cast<double>(gate[i])))));
    add(x[t], project(w.w_down, h));
  }
}

// The logits of every position: T x vocab_size.
inline Matrix forward(const Model& model, std::span<const std::int32_t> tokens) {
  const Config& c = model.config;
  Matrix x;
  for (std::int32_t token : tokens) {
    Vector& row = x.emplace_back(static_cast<std::size_t>(c.dim));
    dequantize(row.data(), model.weights.embedding.row(token), model.weights.embedding.type, c.dim);
  }
  for (const LayerWeights& w : model.weights.layers) layer(x, w, c);
  Matrix logits;
  for (const Vector& row : x)
    logits.push_back(
        project(model.weights.output, rms_norm(row, model.weights.final_norm, c.norm_eps)));
  return logits;
}

}  // namespace thaw::reference
