#include <cmath>
#include <nlohmann/json.hpp>

#include "device/error.h"
#include "device/json.h"
#include "model/config_reader.h"

namespace thaw {
namespace {

using nlohmann::json;

std::string shown(const json& value) {
  return printable(value.dump(-1, ' ', true, json::error_handler_t::replace));
}

// The members of a JSON object, typed. A member that is null counts as absent.
class Fields {
 public:
  Fields(const json& object, std::string source) : object_(object), source_(std::move(source)) {
    require(object.is_object(), source_, ": expected a JSON object, found ", shown(object));
  }

  const std::string& source() const { return source_; }

  const json* find(const std::string& key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  bool names(const std::string& key) const { return object_.contains(key); }  // null as well

  Fields object(const std::string& key) const { return {*find(key), join(source_, ": ", key)}; }

  int size(const std::string& key) const {
    const json& value = demand(key);
    require(value.is_number_unsigned() && value.get<std::uint64_t>() >= 1 &&
                value.get<std::uint64_t>() <= kMaxSize,
            source_, ": ", key, ": expected an integer from 1 to ", kMaxSize, ", found ",
            shown(value));
    return value.get<int>();
  }
  int size(const std::string& key, int fallback) const { return find(key) ? size(key) : fallback; }

  double real(const std::string& key) const {
    const json& value = demand(key);
    require(value.is_number(), source_, ": ", key, ": expected a number, found ", shown(value));
    return value.get<double>();
  }
  double real(const std::string& key, double fallback) const {
    return find(key) ? real(key) : fallback;
  }
  // A scale or a length: finite and above 0.
  double positive(const std::string& key) const {
    const double value = real(key);
    require(std::isfinite(value) && value > 0, source_, ": ", key,
            ": expected a number above 0, found ", value);
    return value;
  }

  bool boolean(const std::string& key, bool fallback) const {
    const json* value = find(key);
    require(!value || value->is_boolean(), source_, ": ", key, ": expected true or false, found ",
            value ? shown(*value) : "");
    return value ? value->get<bool>() : fallback;
  }

  std::string string(const std::string& key, const std::string& fallback) const {
    const json* value = find(key);
    require(!value || value->is_string(), source_, ": ", key, ": expected a string, found ",
            value ? shown(*value) : "");
    return value ? value->get<std::string>() : fallback;
  }

 private:
  const json& demand(const std::string& key) const {
    const json* value = find(key);
    require(value, source_, ": ", key, ": expected it, found none");
    return *value;
  }

  const json& object_;
  const std::string source_;
};

// Demands that this is a LLaMA, or a Mistral, which is one but for its sliding window, without the
// variations that this engine does not compute.
void demand_llama(const Fields& fields) {
  const std::string& source = fields.source();
  const std::string type = fields.string("model_type", "llama");
  require(type == "llama" || type == "mistral", source,
          ": model_type: expected llama or mistral, found ", printable(type));
  const json* architectures = fields.find("architectures");
  require(!architectures || *architectures == json{"LlamaForCausalLM"} ||
              *architectures == json{"MistralForCausalLM"},
          source, ": architectures: expected LlamaForCausalLM or MistralForCausalLM, found ",
          architectures ? shown(*architectures) : "");
  require(architectures || fields.find("model_type"), source,
          ": model_type: expected llama, found none");
  const std::string act = fields.string("hidden_act", "silu");
  require(act == "silu", source, ": hidden_act: expected silu, found ", printable(act));
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    require(!fields.boolean(key, false), source, ": ", key, ": expected false, found true");
  }
  for (const char* key : {"partial_rotary_factor", "logits_scaling", "attention_multiplier",
                          "embedding_multiplier", "residual_multiplier"}) {
    const double factor = fields.real(key, 1);
    require(factor == 1, source, ": ", key, ": expected 1, found ", factor);
  }
  const json* quantized = fields.find("quantization_config");
  require(!quantized, source, ": quantization_config: expected none, found ",
          quantized ? shown(*quantized) : "");
}

// Demands that every token attends to the whole context; a Mistral must say so itself, for without
// the key transformers gives it a window of 4,096.
void demand_no_window(const Fields& fields, int context_length) {
  require(fields.string("model_type", "llama") != "mistral" || fields.names("sliding_window"),
          fields.source(), ": sliding_window: expected null or a size in a Mistral, found none");
  const json* window = fields.find("sliding_window");
  if (!window || *window == false || !fields.boolean("use_sliding_window", true)) return;
  const int size = fields.size("sliding_window");
  require(size >= context_length, fields.source(),
          ": sliding_window: expected none, or at least max_position_embeddings ", context_length,
          ", found ", size);
}

// `rope` holds rope_type ("type" in older files) and the numbers that belong to it.
std::vector<float> read_rope_factors(const Fields& rope, const Config& c) {
  const std::string type = rope.string("rope_type", rope.string("type", "default"));
  const double partial = rope.real("partial_rotary_factor", 1);
  require(partial == 1, rope.source(), ": partial_rotary_factor: expected 1, found ", partial);
  if (type == "default") return {};
  if (type == "linear") return linear_rope_factors(c.head_dim, rope.positive("factor"));
  require(type == "llama3", rope.source(),
          ": rope_type: expected default, linear or llama3, found ", printable(type));
  const double low = rope.positive("low_freq_factor");
  const double high = rope.positive("high_freq_factor");
  require(low < high, rope.source(), ": high_freq_factor: expected more than low_freq_factor ", low,
          ", found ", high);
  return llama3_rope_factors(c.head_dim, c.rope_theta, rope.positive("factor"), low, high,
                             rope.positive("original_max_position_embeddings"));
}

// transformers 5 keeps rope_theta and the scaling in "rope_parameters"; before, rope_theta stood
// alone and the scaling in "rope_scaling".
void read_rope(const Fields& fields, Config& c) {
  const bool is_new = fields.find("rope_parameters");
  require(!is_new || !fields.find("rope_scaling"), fields.source(),
          ": rope_scaling: expected none beside rope_parameters, found both");
  const char* key = is_new ? "rope_parameters" : "rope_scaling";
  double theta = fields.real("rope_theta", 10000);
  if (is_new) theta = fields.object(key).real("rope_theta", theta);
  c.rope_theta = static_cast<float>(theta);
  require(std::isfinite(c.rope_theta) && c.rope_theta > 0, fields.source(),
          ": rope_theta: expected a finite number above 0, found ", theta);
  if (fields.find(key)) c.rope_factors = read_rope_factors(fields.object(key), c);
}

}  // namespace

Config read_hf_config(std::string_view text, const std::string& source) {
  const json document = parse_json(text, source, std::size_t{1} << 20);
  const Fields fields(document, source);
  demand_llama(fields);
  Config c;
  c.dim = fields.size("hidden_size");
  c.n_layers = fields.size("num_hidden_layers");
  c.n_heads = fields.size("num_attention_heads");
  c.n_kv_heads = fields.size("num_key_value_heads", c.n_heads);
  require(fields.find("head_dim") || c.dim % c.n_heads == 0, source,
          ": num_attention_heads: expected a divisor of hidden_size ", c.dim, ", found ",
          c.n_heads);
  c.head_dim = fields.size("head_dim", c.dim / c.n_heads);
  c.ffn_dim = fields.size("intermediate_size");
  c.vocab_size = fields.size("vocab_size");
  c.context_length = fields.size("max_position_embeddings", 2048);
  demand_no_window(fields, c.context_length);
  c.norm_eps = static_cast<float>(fields.real("rms_norm_eps", 1e-6));
  c.tied_output = fields.boolean("tie_word_embeddings", false);
  c.rope_pairing = RopePairing::kHalves;
  read_rope(fields, c);
  validate(c, source);
  return c;
}

}  // namespace thaw
