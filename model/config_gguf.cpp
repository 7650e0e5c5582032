#include <cmath>

#include "device/error.h"
#include "model/config_reader.h"

namespace thaw {
namespace {

class Reader {
 public:
  explicit Reader(const Gguf& gguf) : gguf_(gguf), source_(gguf.path().string()) {}
  Config read() const;

 private:
  int size(std::string_view key) const { return in_range(key, gguf_.integer(key)); }
  int size(std::string_view key, int fallback) const {
    return gguf_.has(key) ? size(key) : fallback;
  }
  int in_range(std::string_view key, std::int64_t value) const;
  int same_for_all_layers(std::string_view key, int n_layers) const;
  int vocab_size() const;
  float rope_theta() const;
  std::vector<float> rope_factors(int head_dim) const;
  void demand_plain(int context_length) const;

  const Gguf& gguf_;
  const std::string source_;
};

int Reader::in_range(std::string_view key, std::int64_t value) const {
  require(value >= 1 && value <= kMaxSize, source_, ": ", key, ": expected 1 to ", kMaxSize,
          ", found ", value);
  return static_cast<int>(value);
}

// An integer, or an array with one for each layer, all of which must agree.
int Reader::same_for_all_layers(std::string_view key, int n_layers) const {
  const auto entry = gguf_.metadata().find(key);
  if (entry == gguf_.metadata().end() ||
      !std::holds_alternative<std::vector<std::int64_t>>(entry->second)) {
    return size(key);
  }
  const auto& values = gguf_.integers(key);
  require(static_cast<std::int64_t>(values.size()) == n_layers, source_, ": ", key,
          ": expected one number for each of the ", n_layers, " layers, found ", values.size());
  for (const std::int64_t value : values) {
    require(value == values[0], source_, ": ", key, ": expected the same for all layers, found ",
            values[0], " and ", value);
  }
  return in_range(key, values[0]);
}

int Reader::vocab_size() const {
  constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
  if (!gguf_.has(kTokens)) return size("llama.vocab_size");
  const std::size_t n_tokens = gguf_.strings(kTokens).size();
  const std::int64_t n = gguf_.integer("llama.vocab_size", static_cast<std::int64_t>(n_tokens));
  require(n == static_cast<std::int64_t>(n_tokens), source_, ": ", kTokens, ": expected ", n,
          " (llama.vocab_size), found ", n_tokens);
  return in_range("llama.vocab_size", n);
}

float Reader::rope_theta() const {
  constexpr std::string_view kKey = "llama.rope.freq_base";
  const auto theta = static_cast<float>(gguf_.real(kKey, 10000));
  require(std::isfinite(theta) && theta > 0, source_, ": ", kKey,
          ": expected a finite number above 0, found ", theta);
  return theta;
}

// Linear scaling stands in the metadata; converters write "llama3" scaling as a tensor of divisors.
std::vector<float> Reader::rope_factors(int head_dim) const {
  const std::string_view type = gguf_.string("llama.rope.scaling.type", "linear");
  require(type == "linear" || type == "none", source_,
          ": llama.rope.scaling.type: expected linear or none, found ", printable(type));
  double factor = 1;
  if (type == "linear") {
    const double old_key = gguf_.real("llama.rope.scale_linear", 1);
    factor = gguf_.real("llama.rope.scaling.factor", old_key);
    if (factor == 0) factor = 1;  // some converters write 0 for "not scaled"
  }
  const Tensor* tensor = gguf_.find_tensor("rope_freqs.weight");
  if (!tensor) return factor == 1 ? std::vector<float>() : linear_rope_factors(head_dim, factor);
  require(tensor->rows == 1 && tensor->cols == head_dim / 2, source_,
          ": tensor rope_freqs.weight: shape: expected ", head_dim / 2, ", found ", tensor->rows,
          " x ", tensor->cols);
  std::vector<float> factors(static_cast<std::size_t>(tensor->cols));
  dequantize(factors.data(), tensor->data, tensor->type, tensor->cols);
  for (float& f : factors) f *= static_cast<float>(factor);
  return factors;
}

// What other architectures do with these keys would change the numbers of this one.
void Reader::demand_plain(int context_length) const {
  for (const std::string_view key : {"llama.rope.scaling.attn_factor", "llama.logit_scale",
                                     "llama.embedding_scale", "llama.residual_scale"}) {
    const double factor = gguf_.real(key, 1);
    require(factor == 1, source_, ": ", key, ": expected 1, found ", factor);
  }
  constexpr std::string_view kScale = "llama.attention.scale";
  require(gguf_.real(kScale, 0) == 0, source_, ": ", kScale, ": expected none, found ",
          gguf_.real(kScale, 0));
  constexpr std::string_view kCausal = "llama.attention.causal";
  require(gguf_.boolean(kCausal, true), source_, ": ", kCausal, ": expected true, found false");
  constexpr std::string_view kWindow = "llama.attention.sliding_window";
  const std::int64_t window = gguf_.integer(kWindow, 0);  // 0: none
  require(window == 0 || window >= context_length, source_, ": ", kWindow,
          ": expected none, or at least llama.context_length ", context_length, ", found ", window);
}

Config Reader::read() const {
  const std::string_view architecture = gguf_.string("general.architecture");
  require(architecture == "llama", source_, ": general.architecture: expected llama, found ",
          printable(architecture));
  const std::int64_t experts = gguf_.integer("llama.expert_count", 0);
  require(experts == 0, source_, ": llama.expert_count: expected 0, found ", experts);

  Config c;
  c.name = printable(gguf_.string("general.name", ""));
  c.dim = size("llama.embedding_length");
  c.n_layers = size("llama.block_count");
  c.n_heads = same_for_all_layers("llama.attention.head_count", c.n_layers);
  constexpr std::string_view kKvHeads = "llama.attention.head_count_kv";
  c.n_kv_heads = gguf_.has(kKvHeads) ? same_for_all_layers(kKvHeads, c.n_layers) : c.n_heads;
  constexpr std::string_view kKeyLength = "llama.attention.key_length";
  require(gguf_.has(kKeyLength) || c.dim % c.n_heads == 0, source_,
          ": llama.attention.head_count: expected a divisor of llama.embedding_length ", c.dim,
          ", found ", c.n_heads);
  c.head_dim = size(kKeyLength, c.dim / c.n_heads);
  for (const std::string_view key :
       {"llama.attention.value_length", "llama.rope.dimension_count"}) {
    const int found = size(key, c.head_dim);
    require(found == c.head_dim, source_, ": ", key, ": expected ", c.head_dim,
            ", the width of a head, found ", found);
  }
  c.ffn_dim = same_for_all_layers("llama.feed_forward_length", c.n_layers);
  c.vocab_size = vocab_size();
  c.context_length = size("llama.context_length");
  demand_plain(c.context_length);
  c.norm_eps = static_cast<float>(gguf_.real("llama.attention.layer_norm_rms_epsilon"));
  c.rope_theta = rope_theta();
  c.rope_factors = rope_factors(c.head_dim);
  c.rope_pairing = RopePairing::kInterleaved;
  c.tied_output = !gguf_.find_tensor("output.weight");
  validate(c, source_);
  return c;
}

}  // namespace

Config read_gguf_config(const Gguf& gguf) { return Reader(gguf).read(); }

}  // namespace thaw
