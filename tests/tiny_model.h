// A tiny model with seeded random weights, in memory: every config and weight format, no file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <random>
#include <string>
#include <vector>

#include "model/model.h"
#include "tests/k_blocks.h"

namespace thaw::testing {

inline constexpr DType kAllTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16, DType::kQ8_0,
                                      DType::kQ4_0, DType::kQ4_1, DType::kQ5_0, DType::kQ5_1,
                                      DType::kQ4_K, DType::kQ5_K, DType::kQ6_K};

struct TinyOptions {
  DType type = DType::kF32;  // of every matrix; kQ8_0 where columns are not whole blocks
  int dim = 64;              // multiples of 32; this and ffn_dim become whole blocks of `type`
  int n_layers = 2;
  int n_heads = 4;
  int n_kv_heads = 2;
  int head_dim = 16;
  int ffn_dim = 96;
  int vocab_size = 288;
  int context_length = 512;
  bool tied = false;
  RopePairing pairing = RopePairing::kHalves;
  std::vector<float> rope_factors = {};
  std::uint64_t seed = 1;
};

// Numbers that are the same everywhere: std distributions are not, the engine is.
class Random {
 public:
  explicit Random(std::uint64_t seed) : engine_(seed) {}
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }  // [0, 1)
  float normal() {                                                             // Box-Muller
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return static_cast<float>(radius * std::cos(6.283185307179586 * uniform()));
  }
  int below(int n) { return static_cast<int>(uniform() * n); }
  std::vector<float> normals(std::int64_t n, float scale = 1) {
    std::vector<float> x(static_cast<std::size_t>(n));
    for (float& value : x) value = scale * normal();
    return x;
  }

 private:
  std::mt19937_64 engine_;
};

// The plainest rounding of 32 floats into a block of `type`: min and max decide the scale.
inline void quantize_block(std::byte* out, const float* x, DType type) {
  float lo = x[0], hi = x[0], peak = 0;
  for (int i = 0; i < 32; ++i) {
    lo = std::min(lo, x[i]), hi = std::max(hi, x[i]), peak = std::max(peak, std::fabs(x[i]));
  }
  const bool with_min = has_min(type), five_bits = has_five_bits(type);
  const int zero = type == DType::kQ8_0 ? 127 : five_bits ? 16 : 8;  // the code of 0, without min
  const float d = with_min ? (hi - lo) / static_cast<float>(2 * zero - 1)
                           : peak / static_cast<float>(zero - (zero < 127));
  const std::uint16_t halves[2] = {f32_to_f16(d), f32_to_f16(lo)};
  const int header = with_min ? 4 : 2;
  std::memcpy(out, halves, static_cast<std::size_t>(header));
  std::byte* fifths = out + header;
  std::byte* codes = fifths + (five_bits ? 4 : 0);
  std::fill(fifths, out + dtype_info(type).block_bytes, std::byte{});
  for (int i = 0; i < 32; ++i) {
    const float scaled = d > 0 ? (with_min ? x[i] - lo : x[i]) / d : 0;
    const int code = static_cast<int>(std::lround(scaled));
    if (type == DType::kQ8_0) {
      codes[i] = static_cast<std::byte>(std::clamp(code, -127, 127));
      continue;
    }
    const int c = std::clamp(with_min ? code : code + zero, 0, 2 * zero - 1);
    codes[i % 16] |= static_cast<std::byte>((c & 15) << i / 16 * 4);
    if (five_bits) fifths[i / 8] |= static_cast<std::byte>((c >> 4) << i % 8);
  }
}

// The bytes of n elements stored as `type`.
inline std::vector<std::byte> encode(const std::vector<float>& x, DType type) {
  const std::int64_t n = static_cast<std::int64_t>(x.size());
  const DTypeInfo& info = dtype_info(type);
  std::vector<std::byte> bytes(static_cast<std::size_t>(row_bytes(type, n)));
  for (std::int64_t i = 0; i < n / info.block; ++i) {
    std::byte* out = bytes.data() + i * info.block_bytes;
    const std::uint16_t half = type == DType::kF16 ? f32_to_f16(x[i]) : f32_to_bf16(x[i]);
    if (info.block > 1)
      (is_k_quant(type) ? quantize_k_block : quantize_block)(out, &x[i * info.block], type);
    else if (type == DType::kF32)
      std::memcpy(out, &x[i], 4);
    else
      std::memcpy(out, &half, 2);
  }
  return bytes;
}

// Owns the bytes that its model's tensors view. Move-only in effect: copies would share the views.
struct TinyModel {
  Model model;
  std::deque<std::vector<std::byte>> storage;

  TinyModel() = default;
  TinyModel(TinyModel&&) = default;
  TinyModel(const TinyModel&) = delete;
};

inline TinyModel make_tiny_model(TinyOptions o = {}) {
  TinyModel tiny;
  Random random(o.seed);
  const int block = dtype_info(o.type).block;
  for (int* cols : {&o.dim, &o.ffn_dim}) *cols = (*cols + block - 1) / block * block;
  const auto matrix = [&](std::string name, std::int64_t rows, std::int64_t cols, float scale) {
    const DType type = cols % block == 0 ? o.type : DType::kQ8_0;
    tiny.storage.push_back(encode(random.normals(rows * cols, scale), type));
    return Tensor{std::move(name), type, rows, cols, tiny.storage.back().data()};
  };
  const auto norm = [&] {
    std::vector<float> x = random.normals(o.dim, 0.1f);
    for (float& value : x) value += 1;
    return x;
  };
  Config& c = tiny.model.config;
  c.name = "tiny";
  c.dim = o.dim, c.n_layers = o.n_layers, c.n_heads = o.n_heads, c.n_kv_heads = o.n_kv_heads;
  c.head_dim = o.head_dim, c.ffn_dim = o.ffn_dim, c.vocab_size = o.vocab_size;
  c.context_length = o.context_length, c.norm_eps = 1e-5f, c.rope_theta = 10000.0f;
  c.rope_factors = o.rope_factors, c.rope_pairing = o.pairing, c.tied_output = o.tied;

  const float in = 1 / std::sqrt(static_cast<float>(o.dim));
  Weights& w = tiny.model.weights;
  w.embedding = matrix("embedding", o.vocab_size, o.dim, 1);
  for (int i = 0; i < o.n_layers; ++i) {
    const std::string prefix = "layer." + std::to_string(i) + ".";
    LayerWeights& layer = w.layers.emplace_back();
    layer.index = i;
    layer.attn_norm = norm();
    layer.wq = matrix(prefix + "wq", c.q_dim(), o.dim, 2 * in);
    layer.wk = matrix(prefix + "wk", c.kv_dim(), o.dim, 2 * in);
    layer.wv = matrix(prefix + "wv", c.kv_dim(), o.dim, in);
    layer.wo = matrix(prefix + "wo", o.dim, c.q_dim(), in);
    layer.ffn_norm = norm();
    layer.w_gate = matrix(prefix + "w_gate", o.ffn_dim, o.dim, in);
    layer.w_up = matrix(prefix + "w_up", o.ffn_dim, o.dim, in);
    layer.w_down = matrix(prefix + "w_down", o.dim, o.ffn_dim, in);
  }
  w.final_norm = norm();
  w.output = o.tied ? w.embedding : matrix("output", o.vocab_size, o.dim, 2 * in);
  return tiny;
}

}  // namespace thaw::testing
