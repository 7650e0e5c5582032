// The config that a GGUF header gives: tests/test_config.cpp has config.json and the checks of
// both.
#include <doctest/doctest.h>

#include <cstdint>
#include <limits>

#include "model/config_reader.h"
#include "tests/error_of.h"
#include "tests/limited_memory.h"
#include "tests/tiny_files.h"

using namespace thaw;
using namespace thaw::testing;

namespace {

const float kInf = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

GgufWriter gguf_header() {
  TinyModel tiny = make_tiny_model({.n_layers = 1, .vocab_size = 259});
  GgufWriter w = tiny_gguf(tiny);
  w.tensors.clear();
  return w;
}

Config read(const GgufWriter& writer) {
  const std::string bytes = writer.bytes();
  const Gguf gguf(std::as_bytes(std::span(bytes)), "model.gguf");
  return read_gguf_config(gguf);
}

std::string error_in(const GgufWriter& writer) {
  return error_of([&] { read(writer); });
}

template <class T>
std::string gguf_error_with(const char* key, const T& value) {
  GgufWriter w = gguf_header();
  w.set(key, value);
  return error_in(w);
}

}  // namespace

TEST_CASE("gguf config: a header gives the same config as the model it was made from") {
  TinyModel tiny = make_tiny_model({.n_layers = 3, .n_heads = 6, .n_kv_heads = 2, .head_dim = 8});
  const Config& expected = tiny.model.config;
  const Config c = read(tiny_gguf(tiny));
  CHECK(c.name == "tiny");
  CHECK(c.dim == expected.dim);
  CHECK(c.n_layers == 3);
  CHECK(c.n_heads == 6);
  CHECK(c.n_kv_heads == 2);
  CHECK(c.head_dim == 8);
  CHECK(c.ffn_dim == expected.ffn_dim);
  CHECK(c.vocab_size == expected.vocab_size);
  CHECK(c.context_length == expected.context_length);
  CHECK(c.norm_eps == expected.norm_eps);
  CHECK(c.rope_theta == expected.rope_theta);
  CHECK(c.rope_pairing == RopePairing::kInterleaved);
  CHECK_FALSE(c.tied_output);
}

TEST_CASE("gguf config: keys that converters leave out have llama.cpp's defaults") {
  GgufWriter w = gguf_header();
  for (const char* key : {"llama.attention.head_count_kv", "llama.attention.key_length",
                          "llama.attention.value_length", "llama.rope.dimension_count",
                          "llama.rope.freq_base", "llama.vocab_size", "general.name"}) {
    w.erase(key);
  }
  const Config c = read(w);
  CHECK(c.n_kv_heads == 4);
  CHECK(c.head_dim == 16);
  CHECK(c.rope_theta == 10000.0f);
  CHECK(c.vocab_size == 259);
  CHECK(c.tied_output);
}

TEST_CASE("gguf config: head counts for each layer must agree") {
  const char* key = "llama.attention.head_count_kv";
  CHECK(gguf_error_with(key, std::vector<std::int32_t>{2}) == "");
  CHECK(gguf_error_with(key, std::vector<std::int32_t>{2, 2}) ==
        "model.gguf: llama.attention.head_count_kv: expected one number for each of the 1 layers, "
        "found 2");
  GgufWriter w = gguf_header();
  w.set("llama.block_count", std::uint32_t{3});
  w.set(key, std::vector<std::int32_t>{2, 2, 1});
  CHECK(
      error_in(w) ==
      "model.gguf: llama.attention.head_count_kv: expected the same for all layers, found 2 and 1");
  CHECK(gguf_error_with(key, std::vector<std::int32_t>{-2}) ==
        "model.gguf: llama.attention.head_count_kv: expected 1 to 16777216, found -2");
}

TEST_CASE("gguf config: metadata out of range or of another model is an error") {
  CHECK(gguf_error_with("general.architecture", "qwen3") ==
        "model.gguf: general.architecture: expected llama, found qwen3");
  CHECK(gguf_error_with("llama.expert_count", std::uint32_t{8}) ==
        "model.gguf: llama.expert_count: expected 0, found 8");
  CHECK(gguf_error_with("llama.embedding_length", std::uint32_t{0}) ==
        "model.gguf: llama.embedding_length: expected 1 to 16777216, found 0");
  CHECK(gguf_error_with("llama.block_count", 4.0f) ==
        "model.gguf: llama.block_count: expected an integer, found a real number");
  CHECK(gguf_error_with("llama.attention.head_count_kv", std::uint32_t{3}) ==
        "model.gguf: heads: expected a multiple of the 3 key/value heads, found 4");
  CHECK(gguf_error_with("llama.rope.dimension_count", std::uint32_t{8}) ==
        "model.gguf: llama.rope.dimension_count: expected 16, the width of a head, found 8");
  CHECK(gguf_error_with("llama.vocab_size", std::uint32_t{300}) ==
        "model.gguf: tokenizer.ggml.tokens: expected 300 (llama.vocab_size), found 259");
  CHECK(gguf_error_with("tokenizer.ggml.tokens", std::vector<std::int32_t>{1}) ==
        "model.gguf: tokenizer.ggml.tokens: expected an array of strings, found an array of "
        "integers");
  for (const float bad : {0.0f, -1.0f, kNan, kInf}) {
    CHECK(gguf_error_with("llama.rope.freq_base", bad) ==
          join("model.gguf: llama.rope.freq_base: expected a finite number above 0, found ", bad));
  }
  CHECK(gguf_error_with("llama.attention.layer_norm_rms_epsilon", kNan) ==
        "model.gguf: RMSNorm epsilon: expected a finite number, 0 or more, found nan");
  for (const char* key : {"llama.rope.scaling.attn_factor", "llama.logit_scale",
                          "llama.embedding_scale", "llama.residual_scale"}) {
    CHECK(gguf_error_with(key, 0.5f) == join("model.gguf: ", key, ": expected 1, found 0.5"));
    CHECK(gguf_error_with(key, 1.0f) == "");
  }
  CHECK(gguf_error_with("llama.attention.scale", 0.5f) ==
        "model.gguf: llama.attention.scale: expected none, found 0.5");
  CHECK(gguf_error_with("llama.attention.causal", false) ==
        "model.gguf: llama.attention.causal: expected true, found false");
  CHECK(
      gguf_error_with("llama.attention.sliding_window", std::uint32_t{16})
          .find(
              "llama.attention.sliding_window: expected none, or at least llama.context_length ") !=
      std::string::npos);
  CHECK(gguf_error_with("llama.attention.sliding_window", std::uint32_t{1 << 20}) == "");
  GgufWriter w = gguf_header();
  w.erase("llama.attention.key_length");
  w.set("llama.attention.head_count", std::uint32_t{6});
  CHECK(error_in(w) ==
        "model.gguf: llama.attention.head_count: expected a divisor of llama.embedding_length 64, "
        "found 6");
  w = gguf_header();
  w.erase("llama.context_length");
  CHECK(error_in(w) == "model.gguf: llama.context_length: expected the key, found none");
}

TEST_CASE("gguf config: scaling comes from the metadata and from rope_freqs.weight") {
  GgufWriter w = gguf_header();
  w.set("llama.rope.scaling.factor", 4.0f);
  CHECK(read(w).rope_factors == std::vector<float>(8, 4.0f));
  w.set("llama.rope.scaling.type", "none");
  CHECK(read(w).rope_factors.empty());
  w.set("llama.rope.scaling.type", "linear");
  CHECK(read(w).rope_factors == std::vector<float>(8, 4.0f));
  w.set("llama.rope.scaling.type", "yarn");
  CHECK(error_in(w) == "model.gguf: llama.rope.scaling.type: expected linear or none, found yarn");
  w.erase("llama.rope.scaling.type");
  w.set("llama.rope.scaling.factor", -4.0f);
  CHECK(error_in(w) == "model.gguf: RoPE factors: expected a finite number above 0, found -4");

  TinyModel tiny = make_tiny_model({.rope_factors = {1, 1, 1.5f, 2, 4, 8, 8, 8}});
  w = tiny_gguf(tiny);
  CHECK(read(w).rope_factors == tiny.model.config.rope_factors);
  w.tensor("rope_freqs.weight").dims = {4, 2};
  CHECK(error_in(w) == "model.gguf: tensor rope_freqs.weight: shape: expected 8, found 2 x 4");
  w = tiny_gguf(tiny);
  w.tensor("rope_freqs.weight").data.assign(32, '\0');
  CHECK(error_in(w) == "model.gguf: RoPE factors: expected a finite number above 0, found 0");
}

TEST_CASE("gguf config: sizes that lie cost no memory") {
  CHECK(holds_in_64mb([] {
    GgufWriter w = gguf_header();
    w.set("llama.attention.key_length", std::uint32_t{0xffffffff});
    w.set("llama.rope.scaling.factor", 2.0f);
    return error_in(w) ==
           "model.gguf: llama.attention.key_length: expected 1 to 16777216, found 4294967295";
  }));
}
