// What a LLaMA-architecture model is made of, whichever file it came from.
#pragma once

#include <string>
#include <vector>

namespace thaw {

// Which two elements of a head RoPE rotates as a pair, for pair i of head_dim / 2.
enum class RopePairing {
  kInterleaved,  // (2i, 2i + 1): GGUF files of architecture "llama" store wq and wk permuted for it
  kHalves,       // (i, i + head_dim / 2): Hugging Face checkpoints
};

constexpr int kMaxSize = 1 << 24;   // no size in a Config is larger: far above any model
constexpr int kMaxWidth = 1 << 20;  // nor a row of activations: a prompt takes 512 of them

struct Config {
  std::string name;  // for people; printable ASCII, may be empty
  int dim = 0;       // width of the residual stream
  int n_layers = 0;
  int n_heads = 0;     // query heads
  int n_kv_heads = 0;  // key/value heads; divides n_heads
  int head_dim = 0;    // even; often dim / n_heads, not always
  int ffn_dim = 0;     // width of the SwiGLU hidden layer
  int vocab_size = 0;
  int context_length = 0;           // positions the model was trained for
  float norm_eps = 0;               // added to the mean square in RMSNorm
  float rope_theta = 0;             // RoPE base: inverse frequency i is rope_theta^(-2i / head_dim)
  std::vector<float> rope_factors;  // empty, or head_dim / 2 divisors of the inverse frequencies:
                                    // what linear and "llama3" scaling come down to
  RopePairing rope_pairing = RopePairing::kHalves;
  bool tied_output = false;  // the output head is the embedding table

  int q_dim() const { return n_heads * head_dim; }
  int kv_dim() const { return n_kv_heads * head_dim; }
  int group() const { return n_heads / n_kv_heads; }  // query heads that share one k/v head
};

// Throws Error("SOURCE: field: expected ..., found ...") unless every field is in range and they
// fit together (n_kv_heads divides n_heads, head_dim even, rope_theta finite and > 0, ...).
void validate(const Config& config, const std::string& source);

// Divisors of the inverse frequencies for "rope_type": "linear" (Chen et al., 2306.15595).
std::vector<float> linear_rope_factors(int head_dim, double factor);

// Divisors for "rope_type": "llama3" (LLaMA 3.1 reference code, apply_scaling): long wavelengths
// are divided by `factor`, short ones kept, those between original_context / high_freq_factor and
// original_context / low_freq_factor blended linearly.
std::vector<float> llama3_rope_factors(int head_dim, double rope_theta, double factor,
                                       double low_freq_factor, double high_freq_factor,
                                       double original_context);

// The inverse frequency of each pair, head_dim / 2 of them: rope_theta^(-2i/head_dim) /
// rope_factors[i].
std::vector<float> rope_inverse_frequencies(const Config& config);

}  // namespace thaw
