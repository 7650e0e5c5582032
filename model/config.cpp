#include "model/config.h"

#include <cmath>
#include <cstdint>
#include <numbers>

#include "device/error.h"

namespace thaw {
namespace {

void demand_range(const std::string& source, const char* field, std::int64_t value,
                  std::int64_t least, std::int64_t most) {
  require(value >= least && value <= most, source, ": ", field, ": expected ", least, " to ", most,
          ", found ", value);
}

// A positive number that is neither infinite nor NaN.
void demand_positive(const std::string& source, const char* field, double value) {
  require(std::isfinite(value) && value > 0, source, ": ", field,
          ": expected a finite number above 0, found ", value);
}

}  // namespace

void validate(const Config& c, const std::string& source) {
  demand_range(source, "width (dim)", c.dim, 1, kMaxWidth);
  demand_range(source, "layers", c.n_layers, 1, 1 << 16);
  demand_range(source, "heads", c.n_heads, 1, 1 << 16);
  demand_range(source, "key/value heads", c.n_kv_heads, 1, c.n_heads);
  require(c.n_heads % c.n_kv_heads == 0, source, ": heads: expected a multiple of the ",
          c.n_kv_heads, " key/value heads, found ", c.n_heads);
  demand_range(source, "head width (head_dim)", c.head_dim, 2, 1 << 16);
  require(c.head_dim % 2 == 0, source, ": head width (head_dim): expected an even number, found ",
          c.head_dim);
  demand_range(source, "heads x head width", std::int64_t{c.n_heads} * c.head_dim, 2, kMaxWidth);
  demand_range(source, "feed-forward width", c.ffn_dim, 1, kMaxWidth);
  // Logits are of fewer rows: 128, unless a flag asks for more.
  demand_range(source, "vocabulary", c.vocab_size, 1, 4 * kMaxWidth);
  demand_range(source, "context length", c.context_length, 1, kMaxSize);
  require(std::isfinite(c.norm_eps) && c.norm_eps >= 0, source,
          ": RMSNorm epsilon: expected a finite number, 0 or more, found ", c.norm_eps);
  demand_positive(source, "RoPE base (rope_theta)", c.rope_theta);
  const auto n_factors = static_cast<std::int64_t>(c.rope_factors.size());
  require(n_factors == 0 || n_factors == c.head_dim / 2, source, ": RoPE factors: expected ",
          c.head_dim / 2, " or none, found ", n_factors);
  for (const float factor : c.rope_factors) demand_positive(source, "RoPE factors", factor);
  for (const float frequency : rope_inverse_frequencies(c))
    require(std::isfinite(frequency), source,
            ": RoPE frequency (of rope_theta and factors): expected a finite number, found ",
            frequency);
}

std::vector<float> linear_rope_factors(int head_dim, double factor) {
  return std::vector<float>(head_dim / 2, static_cast<float>(factor));
}

std::vector<float> llama3_rope_factors(int head_dim, double rope_theta, double factor,
                                       double low_freq_factor, double high_freq_factor,
                                       double original_context) {
  std::vector<float> factors;
  for (int i = 0; i < head_dim / 2; ++i) {
    const double wavelength = 2 * std::numbers::pi * std::pow(rope_theta, 2.0 * i / head_dim);
    const double turns = original_context / wavelength;  // of this pair over the original context
    double divisor = 1;
    if (turns < low_freq_factor) {
      divisor = factor;
    } else if (turns <= high_freq_factor) {
      const double smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
      divisor = 1 / ((1 - smooth) / factor + smooth);
    }
    factors.push_back(static_cast<float>(divisor));
  }
  return factors;
}

// In f32 step by step, as Hugging Face transformers does (modeling_rope_utils.py), so that angles
// at far positions agree with it.
std::vector<float> rope_inverse_frequencies(const Config& config) {
  std::vector<float> inverse;
  for (int i = 0; i < config.head_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(config.head_dim);
    const float frequency = 1.0f / std::pow(config.rope_theta, exponent);
    inverse.push_back(config.rope_factors.empty() ? frequency : frequency / config.rope_factors[i]);
  }
  return inverse;
}

}  // namespace thaw
