#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "model/config_reader.h"
#include "tests/error_of.h"

using namespace thaw;
using namespace thaw::testing;
using nlohmann::json;

namespace {

const float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

// Hugging Face's LLaMA-3.2-1B.
json llama32() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "vocab_size": 128256})");
}

Config read(const json& document) { return read_hf_config(document.dump(), "config.json"); }

std::string error_in(const json& document) {
  return error_of([&] { read(document); });
}

// What config.json with `key` replaced by `value` (or removed, when it is "absent") says.
std::string error_with(const char* key, const json& value) {
  json document = llama32();
  document[key] = value;
  if (value == "absent") document.erase(key);
  return error_in(document);
}

void check_close(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    CAPTURE(i);
    CHECK(std::fabs(found[i] - expected[i]) <=
          2.5e-7f * expected[i]);  // two units in the last place
  }
}

Config valid() {
  Config c;
  c.dim = 64, c.n_layers = 2, c.n_heads = 4, c.n_kv_heads = 2, c.head_dim = 16, c.ffn_dim = 96;
  c.vocab_size = 288, c.context_length = 512, c.norm_eps = 1e-5f, c.rope_theta = 10000;
  return c;
}

}  // namespace

TEST_CASE("config: LLaMA-3.2's config.json is read as it is published") {
  const Config c = read(llama32());
  CHECK(c.dim == 2048);
  CHECK(c.n_layers == 16);
  CHECK(c.n_heads == 32);
  CHECK(c.n_kv_heads == 8);
  CHECK(c.head_dim == 64);
  CHECK(c.ffn_dim == 8192);
  CHECK(c.vocab_size == 128256);
  CHECK(c.context_length == 131072);
  CHECK(c.norm_eps == 1e-5f);
  CHECK(c.rope_theta == 500000.0f);
  CHECK(c.tied_output);
  CHECK(c.rope_pairing == RopePairing::kHalves);
  CHECK(c.q_dim() == 2048);
  CHECK(c.kv_dim() == 512);
  CHECK(c.group() == 4);
}

TEST_CASE("config: the defaults of Hugging Face stand in for what config.json leaves out") {
  json document = llama32();
  for (const char* key :
       {"head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_theta", "rope_scaling",
        "rms_norm_eps", "max_position_embeddings", "hidden_act"}) {
    document.erase(key);
  }
  document["rope_scaling"] = nullptr;
  const Config c = read(document);
  CHECK(c.head_dim == 64);
  CHECK(c.n_kv_heads == 32);
  CHECK_FALSE(c.tied_output);
  CHECK(c.rope_theta == 10000.0f);
  CHECK(c.rope_factors.empty());
  CHECK(c.norm_eps == 1e-6f);
  CHECK(c.context_length == 2048);
}

TEST_CASE("config: head_dim need not be hidden_size / heads") {
  json document = llama32();
  document["head_dim"] = 128;
  document["rope_scaling"] = nullptr;
  CHECK(read(document).q_dim() == 4096);
}

// Expected: transformers 5.23, ROPE_INIT_FUNCTIONS["llama3"] of the config above.
TEST_CASE("config: llama3 scaling gives transformers' inverse frequencies") {
  check_close(rope_inverse_frequencies(read(llama32())), {1.f,
                                                          0.663601279f,
                                                          0.440366626f,
                                                          0.292227834f,
                                                          0.193922758f,
                                                          0.128687382f,
                                                          0.0853971019f,
                                                          0.0566696189f,
                                                          0.0376060307f,
                                                          0.0249554086f,
                                                          0.0165604409f,
                                                          0.0109895291f,
                                                          0.00729266508f,
                                                          0.00483942125f,
                                                          0.00321144611f,
                                                          0.00129054801f,
                                                          0.000429556705f,
                                                          9.70828623e-05f,
                                                          1.94616387e-05f,
                                                          1.29147675e-05f,
                                                          8.57025589e-06f,
                                                          5.68723226e-06f,
                                                          3.77405445e-06f,
                                                          2.50446715e-06f,
                                                          1.66196742e-06f,
                                                          1.10288363e-06f,
                                                          7.31874934e-07f,
                                                          4.85673127e-07f,
                                                          3.22293289e-07f,
                                                          2.1387423e-07f,
                                                          1.41927202e-07f,
                                                          9.41830649e-08f});
}

// Expected: transformers 5.23, ROPE_INIT_FUNCTIONS["linear"], theta 100000, factor 4, head_dim 32.
TEST_CASE("config: linear scaling gives transformers' inverse frequencies, in each spelling") {
  json document = llama32();
  document["head_dim"] = 32;
  document["rope_theta"] = 100000;
  std::vector<json> spellings(3, document);
  spellings[0]["rope_scaling"] = {{"type", "linear"}, {"factor", 4}};
  spellings[1]["rope_scaling"] = {{"rope_type", "linear"}, {"factor", 4.0}};
  spellings[2].erase("rope_theta");
  spellings[2].erase("rope_scaling");
  spellings[2]["rope_parameters"] = {
      {"rope_type", "linear"}, {"factor", 4.0}, {"rope_theta", 100000.0}};
  for (const json& spelling : spellings) {
    check_close(
        rope_inverse_frequencies(read(spelling)),
        {0.25f, 0.121741883f, 0.0592843406f, 0.0288695507f, 0.0140585322f, 0.00684604887f,
         0.00333380373f, 0.00162345415f, 0.000790569466f, 0.000384981628f, 0.000187473546f,
         9.12935284e-05f, 4.44569851e-05f, 2.1649108e-05f, 1.05424133e-05f, 5.13381246e-06f});
  }
}

TEST_CASE("config: a default rope_type scales nothing") {
  for (const char* key : {"rope_parameters", "rope_scaling"}) {
    json document = llama32();
    document["rope_scaling"] = nullptr;
    document[key] = {{"rope_type", "default"}, {"rope_theta", 500000.0}};
    CHECK(read(document).rope_factors.empty());
    CHECK(read(document).rope_theta == 500000.0f);
  }
}

TEST_CASE("config: what is not a LLaMA, or one of another kind, is refused by name") {
  const std::string expected =
      "config.json: architectures: expected LlamaForCausalLM or MistralForCausalLM, found ";
  CHECK(error_with("architectures", json::array({"MixtralForCausalLM"})) ==
        expected + "[\"MixtralForCausalLM\"]");
  CHECK(error_with("architectures", 3) == expected + "3");
  CHECK(error_with("architectures", json::array({"MistralForCausalLM"})) == "");
  CHECK(error_with("model_type", "mistral") ==
        "config.json: sliding_window: expected null or a size in a Mistral, found none");
  json mistral = llama32();
  mistral["model_type"] = "mistral", mistral["sliding_window"] = nullptr;
  CHECK(error_in(mistral) == "");
  CHECK(error_with("model_type", "mixtral") ==
        "config.json: model_type: expected llama or mistral, found mixtral");
  CHECK(error_with("hidden_act", "gelu") == "config.json: hidden_act: expected silu, found gelu");
  CHECK(error_with("attention_bias", true) ==
        "config.json: attention_bias: expected false, found true");
  CHECK(error_with("mlp_bias", true) == "config.json: mlp_bias: expected false, found true");
  json document = llama32();
  document.erase("architectures"), document.erase("model_type");
  CHECK(error_in(document) == "config.json: model_type: expected llama, found none");
}

TEST_CASE("config: what would change the result and is not computed is refused by name") {
  for (const char* key : {"partial_rotary_factor", "logits_scaling", "attention_multiplier",
                          "embedding_multiplier", "residual_multiplier"}) {
    CHECK(error_with(key, 0.5) == join("config.json: ", key, ": expected 1, found 0.5"));
    CHECK(error_with(key, "x") == join("config.json: ", key, ": expected a number, found \"x\""));
    CHECK(error_with(key, 1.0) == "");
    CHECK(error_with(key, nullptr) == "");
  }
  CHECK(error_with("quantization_config", {{"quant_method", "fp8"}}) ==
        "config.json: quantization_config: expected none, found {\"quant_method\":\"fp8\"}");
  CHECK(error_with("quantization_config", nullptr) == "");

  CHECK(error_with("sliding_window", 4096) ==
        "config.json: sliding_window: expected none, or at least max_position_embeddings 131072, "
        "found 4096");
  CHECK(error_with("sliding_window", "all") ==
        "config.json: sliding_window: expected an integer from 1 to 16777216, found \"all\"");
  for (const json& harmless : {json(nullptr), json(false), json(131072)}) {
    CHECK(error_with("sliding_window", harmless) == "");
  }
  json both = llama32();
  both["rope_parameters"] = {{"rope_type", "default"}};
  CHECK(error_in(both) ==
        "config.json: rope_scaling: expected none beside rope_parameters, found both");

  json unused = llama32();
  unused["sliding_window"] = 4096, unused["use_sliding_window"] = false;
  CHECK(error_in(unused) == "");
  unused["use_sliding_window"] = true;
  CHECK(error_in(unused) != "");
}

TEST_CASE("config: sizes that are missing, zero, negative, no integers or too large are errors") {
  for (const char* key :
       {"hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "intermediate_size", "vocab_size", "max_position_embeddings"}) {
    const std::string start =
        join("config.json: ", key, ": expected an integer from 1 to 16777216");
    CHECK(error_with(key, 0) == start + ", found 0");
    CHECK(error_with(key, -4) == start + ", found -4");
    CHECK(error_with(key, 4.5) == start + ", found 4.5");
    CHECK(error_with(key, std::uint64_t{1} << 32) == start + ", found 4294967296");
    CHECK(error_with(key, ~std::uint64_t{0}) == start + ", found 18446744073709551615");
    CHECK(error_with(key, "64") == start + ", found \"64\"");
  }
  CHECK(error_with("hidden_size", "absent") == "config.json: hidden_size: expected it, found none");
  CHECK(error_with("vocab_size", nullptr) == "config.json: vocab_size: expected it, found none");
}

TEST_CASE("config: heads that do not divide are errors") {
  CHECK(error_with("num_key_value_heads", 5) ==
        "config.json: heads: expected a multiple of the 5 key/value heads, found 32");
  CHECK(error_with("num_key_value_heads", 64) ==
        "config.json: key/value heads: expected 1 to 32, found 64");
  CHECK(error_with("head_dim", 63) ==
        "config.json: head width (head_dim): expected an even number, found 63");
  json document = llama32();
  document.erase("head_dim");
  document["num_attention_heads"] = 24;
  CHECK(error_in(document) ==
        "config.json: num_attention_heads: expected a divisor of hidden_size 2048, found 24");
}

TEST_CASE("config: rope_theta and scaling out of range are errors") {
  const auto scaled = [](const char* key, const json& value) {
    json document = llama32();
    document["rope_scaling"][key] = value;
    if (value.is_null()) document["rope_scaling"].erase(key);
    return error_in(document);
  };
  CHECK(error_with("rope_theta", 0) ==
        "config.json: rope_theta: expected a finite number above 0, found 0");
  CHECK(error_with("rope_theta", -1.5) ==
        "config.json: rope_theta: expected a finite number above 0, found -1.5");
  CHECK(error_with("rope_theta", 1e300) ==
        "config.json: rope_theta: expected a finite number above 0, found 1e+300");
  CHECK(error_with("rope_theta", "big") ==
        "config.json: rope_theta: expected a number, found \"big\"");
  std::string text = llama32().dump();
  text.replace(text.find("500000.0"), 8, "NaN     ");
  CHECK(error_of([&] {
          read_hf_config(text, "config.json");
        }).find(": expected JSON, found \"NaN") != std::string::npos);
  CHECK(scaled("rope_type", "yarn") ==
        "config.json: rope_scaling: rope_type: expected default, linear or llama3, found yarn");
  CHECK(scaled("factor", 0) ==
        "config.json: rope_scaling: factor: expected a number above 0, found 0");
  CHECK(scaled("factor", nullptr) == "config.json: rope_scaling: factor: expected it, found none");
  CHECK(
      scaled("high_freq_factor", 1) ==
      "config.json: rope_scaling: high_freq_factor: expected more than low_freq_factor 1, found 1");
  CHECK(scaled("original_max_position_embeddings", -1) ==
        "config.json: rope_scaling: original_max_position_embeddings: expected a number above 0, "
        "found -1");
  CHECK(scaled("partial_rotary_factor", 0.5) ==
        "config.json: rope_scaling: partial_rotary_factor: expected 1, found 0.5");
  CHECK(error_with("rope_scaling", 8) ==
        "config.json: rope_scaling: expected a JSON object, found 8");
}

TEST_CASE("config: broken and hostile JSON is one line") {
  const auto error = [](const std::string& text) {
    return error_of([&] { read_hf_config(text, "config.json"); });
  };
  CHECK(error("{\"hidden_size\": }") == "config.json: byte 16: expected JSON, found \"}\"");
  CHECK(error("{\"a\": 1") == "config.json: expected JSON, found its end after byte 7");
  CHECK(error("") == "config.json: expected JSON, found its end after byte 0");
  CHECK(error("[1]") == "config.json: expected a JSON object, found [1]");
  CHECK(error("{\"a\": 1, \"a\": 2}") == "config.json: a: expected the key once, found it twice");
  CHECK(error("{\"a\": \"\xff\"}").find("config.json: byte ") == 0);
  CHECK(error(std::string(1 << 21, ' ')) ==
        "config.json: size: expected at most 1048576 bytes of JSON, found 2097152");
  for (const char* deep : {"[", "{\"a\":"}) {
    std::string text;
    while (text.size() < 1000000) text += deep;
    CHECK(error(text) == "config.json: JSON nesting: expected at most 64 levels, found more");
  }
  const std::string whole = llama32().dump();
  for (std::size_t n = 0; n < whole.size(); ++n) CHECK(error(whole.substr(0, n)) != "");
}

TEST_CASE("config: validate demands each field and how they fit together") {
  CHECK(error_of([] { validate(valid(), "m"); }) == "");
  const auto error_if = [](auto change) {
    Config c = valid();
    change(c);
    return error_of([&] { validate(c, "m"); });
  };
  CHECK(error_if([](Config& c) { c.dim = 0; }) ==
        "m: width (dim): expected 1 to 1048576, found 0");
  CHECK(error_if([](Config& c) { c.n_layers = -1; }) == "m: layers: expected 1 to 65536, found -1");
  CHECK(error_if([](Config& c) { c.n_heads = 0; }) == "m: heads: expected 1 to 65536, found 0");
  CHECK(error_if([](Config& c) { c.n_kv_heads = 3; }) ==
        "m: heads: expected a multiple of the 3 key/value heads, found 4");
  CHECK(error_if([](Config& c) { c.head_dim = 15; }) ==
        "m: head width (head_dim): expected an even number, found 15");
  CHECK(error_if([](Config& c) { c.n_heads = c.n_kv_heads = 65536, c.head_dim = 65536; }) ==
        "m: heads x head width: expected 2 to 1048576, found 4294967296");
  CHECK(error_if([](Config& c) { c.ffn_dim = 0; }) ==
        "m: feed-forward width: expected 1 to 1048576, found 0");
  CHECK(error_if([](Config& c) { c.vocab_size = 0; }) ==
        "m: vocabulary: expected 1 to 4194304, found 0");
  CHECK(error_if([](Config& c) { c.context_length = 0; }) ==
        "m: context length: expected 1 to 16777216, found 0");
  CHECK(error_if([](Config& c) { c.norm_eps = -1; }) ==
        "m: RMSNorm epsilon: expected a finite number, 0 or more, found -1");
  CHECK(error_if([](Config& c) { c.rope_theta = kNan; }) ==
        "m: RoPE base (rope_theta): expected a finite number above 0, found nan");
  CHECK(error_if([](Config& c) {
          c.rope_factors = {1, 2};
        }) == "m: RoPE factors: expected 8 or none, found 2");
  CHECK(error_if([](Config& c) { c.rope_factors.assign(8, 1e-39f); }) ==
        "m: RoPE frequency (of rope_theta and factors): expected a finite number, found inf");
  CHECK(error_if([](Config& c) { c.rope_factors.assign(8, kInf); }) ==
        "m: RoPE factors: expected a finite number above 0, found inf");
}
