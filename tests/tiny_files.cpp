#include "tests/tiny_files.h"

#include <unistd.h>

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

#include "device/error.h"
#include "tests/safetensors_writer.h"

namespace thaw::testing {
namespace {

using nlohmann::json;

constexpr const char* kChatMl =
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}";

// The letter that stands for `byte` in GPT-2's alphabet, in UTF-8: printable bytes for themselves,
// the others for 256, 257, ...
std::string letter(int byte) {
  const auto printable_byte = [](int b) {
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  };
  int code = byte;
  if (!printable_byte(byte)) {
    code = 256;
    for (int b = 0; b < byte; ++b) code += printable_byte(b) ? 0 : 1;
  }
  if (code < 0x80) return {static_cast<char>(code)};
  return {static_cast<char>(0xc0 | code >> 6), static_cast<char>(0x80 | (code & 0x3f))};
}

struct Vocabulary {
  std::vector<std::string> tokens;  // in GPT-2's alphabet, but the special ones as they are
  std::vector<std::int32_t> types;  // as in GGUF: 1 normal, 3 control, 5 unused
  std::vector<std::string> merges;
  std::uint32_t endoftext = 0, im_start = 0, im_end = 0;
};

Vocabulary make_vocabulary(int vocab_size) {
  const std::pair<const char*, const char*> kMerges[] = {
      {"h", "e"},   {"l", "l"},  {"he", "ll"},   {"hell", "o"}, {"Ġ", "w"},  {"o", "r"},
      {"Ġw", "or"}, {"l", "d"},  {"Ġwor", "ld"}, {"t", "h"},    {"Ġ", "t"},  {"Ġt", "he"},
      {"i", "n"},   {"e", "r"},  {"a", "n"},     {"Ġ", "Ġ"},    {"in", "g"}, {"Ġ", "a"},
      {"r", "e"},   {"th", "e"}, {"Ġa", "n"},    {"Ġan", "d"}};
  constexpr int kSpecial = 3;
  require(vocab_size >= 256 + kSpecial, "tiny vocabulary: expected at least 259, found ",
          vocab_size);
  Vocabulary v;
  for (int byte = 0; byte < 256; ++byte) v.tokens.push_back(letter(byte));
  for (const auto& [left, right] : kMerges) {
    if (static_cast<int>(v.tokens.size()) + kSpecial >= vocab_size) break;
    v.tokens.push_back(join(left, right));
    v.merges.push_back(join(left, " ", right));
  }
  v.types.assign(v.tokens.size(), 1);
  v.endoftext = static_cast<std::uint32_t>(v.tokens.size());
  v.im_start = v.endoftext + 1, v.im_end = v.endoftext + 2;
  for (const char* token : {"<|endoftext|>", "<|im_start|>", "<|im_end|>"})
    v.tokens.push_back(token);
  v.types.resize(v.tokens.size(), 3);
  while (static_cast<int>(v.tokens.size()) < vocab_size) {
    v.tokens.push_back(join("<|unused_", v.tokens.size(), "|>"));
  }
  v.types.resize(v.tokens.size(), 5);
  return v;
}

std::string bytes_of(const void* data, std::int64_t n) {
  return {static_cast<const char*>(data), static_cast<std::size_t>(n)};
}

std::string bytes_of(const std::vector<float>& values) {
  return bytes_of(values.data(), static_cast<std::int64_t>(values.size() * sizeof(float)));
}

std::uint32_t ggml_type(DType type) {
  constexpr std::uint32_t kNumbers[] = {0, 1, 30, 8, 2, 3, 6, 7, 12, 13, 14};  // in the order of DType
  return kNumbers[static_cast<int>(type)];
}

struct Named {
  std::string name;  // without ".weight"
  const Tensor* matrix = nullptr;
  const std::vector<float>* vector = nullptr;
  bool rotated = false;  // by RoPE
};

// The tensors of `w` in file order, by GGUF's names or Hugging Face's.
std::vector<Named> named_tensors(const Weights& w, bool tied, bool hf) {
  const auto pick = [&](const char* gguf_name, const char* hf_name) {
    return std::string(hf ? hf_name : gguf_name);
  };
  std::vector<Named> out = {{pick("token_embd", "model.embed_tokens"), &w.embedding}};
  for (const LayerWeights& l : w.layers) {
    const std::string p = join(pick("blk.", "model.layers."), l.index, ".");
    out.push_back({p + pick("attn_norm", "input_layernorm"), nullptr, &l.attn_norm});
    out.push_back({p + pick("attn_q", "self_attn.q_proj"), &l.wq, nullptr, true});
    out.push_back({p + pick("attn_k", "self_attn.k_proj"), &l.wk, nullptr, true});
    out.push_back({p + pick("attn_v", "self_attn.v_proj"), &l.wv});
    out.push_back({p + pick("attn_output", "self_attn.o_proj"), &l.wo});
    out.push_back({p + pick("ffn_norm", "post_attention_layernorm"), nullptr, &l.ffn_norm});
    out.push_back({p + pick("ffn_gate", "mlp.gate_proj"), &l.w_gate});
    out.push_back({p + pick("ffn_up", "mlp.up_proj"), &l.w_up});
    out.push_back({p + pick("ffn_down", "mlp.down_proj"), &l.w_down});
  }
  out.push_back({pick("output_norm", "model.norm"), nullptr, &w.final_norm});
  if (!tied) out.push_back({pick("output", "lm_head"), &w.output});
  return out;
}

std::string matrix_bytes(const Named& named, const Config& c, RopePairing to) {
  const Tensor& t = *named.matrix;
  return named.rotated ? repair_rows(t, c.head_dim, c.rope_pairing, to)
                       : bytes_of(t.data, t.bytes());
}

// `bytes` of format `type`, as F32.
std::string widened(const std::string& bytes, DType type) {
  const DTypeInfo& info = dtype_info(type);
  std::vector<float> values(bytes.size() / info.block_bytes * info.block);
  dequantize(values.data(), reinterpret_cast<const std::byte*>(bytes.data()), type,
             static_cast<std::int64_t>(values.size()));
  return bytes_of(values);
}

json hf_config(const Config& c) {
  json config = {{"architectures", json::array({"LlamaForCausalLM"})},
                 {"model_type", "llama"},
                 {"hidden_act", "silu"},
                 {"hidden_size", c.dim},
                 {"num_hidden_layers", c.n_layers},
                 {"num_attention_heads", c.n_heads},
                 {"num_key_value_heads", c.n_kv_heads},
                 {"head_dim", c.head_dim},
                 {"intermediate_size", c.ffn_dim},
                 {"vocab_size", c.vocab_size},
                 {"max_position_embeddings", c.context_length},
                 {"rms_norm_eps", c.norm_eps},
                 {"rope_theta", c.rope_theta},
                 {"rope_scaling", nullptr},
                 {"tie_word_embeddings", c.tied_output}};
  if (!c.rope_factors.empty()) {
    config["rope_scaling"] = {{"rope_type", "linear"}, {"factor", c.rope_factors[0]}};
  }
  return config;
}

std::string hf_tokenizer(const Vocabulary& v) {
  json vocab = json::object(), added = json::array();
  for (std::uint32_t id = 0; id < v.tokens.size(); ++id) {
    if (v.types[id] == 1) vocab[v.tokens[id]] = id;
    if (v.types[id] != 3) continue;
    added.push_back({{"id", id},
                     {"content", v.tokens[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  const json digits = {{"type", "Digits"}, {"individual_digits", true}};
  return json{{"version", "1.0"},
              {"truncation", nullptr},
              {"padding", nullptr},
              {"added_tokens", added},
              {"normalizer", nullptr},
              {"pre_tokenizer",
               {{"type", "Sequence"}, {"pretokenizers", json::array({digits, byte_level})}}},
              {"post_processor", nullptr},
              {"decoder", byte_level},
              {"model",
               {{"type", "BPE"},
                {"dropout", nullptr},
                {"unk_token", nullptr},
                {"continuing_subword_prefix", nullptr},
                {"end_of_word_suffix", nullptr},
                {"fuse_unk", false},
                {"byte_fallback", false},
                {"ignore_merges", false},
                {"vocab", vocab},
                {"merges", v.merges}}}}
      .dump();
}

// Deals the tensors round to the shards, so that a layer is spread over files.
void add_safetensors(Files& files, const std::vector<SafetensorsWriter::TensorSpec>& tensors,
                     int n_shards) {
  if (n_shards == 1) {
    SafetensorsWriter writer;
    writer.tensors = tensors;
    files["model.safetensors"] = writer.bytes();
    return;
  }
  json map = json::object();
  for (int shard = 0; shard < n_shards; ++shard) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05d-of-%05d.safetensors", shard + 1, n_shards);
    SafetensorsWriter writer;
    for (std::size_t i = shard; i < tensors.size(); i += n_shards) {
      writer.tensors.push_back(tensors[i]);
      map[tensors[i].name] = name;
    }
    files[name] = writer.bytes();
  }
  files["model.safetensors.index.json"] =
      json{{"metadata", {{"total_size", 0}}}, {"weight_map", map}}.dump();
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string name = (std::filesystem::temp_directory_path() / "thaw-test-XXXXXX").string();
  require(::mkdtemp(name.data()), name, ": cannot make a temporary directory");
  path_ = name;
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

void write_file(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary);
  out << bytes;
  require(out.flush().good(), path.string(), ": cannot write");
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::string repair_rows(const Tensor& tensor, int head_dim, RopePairing from, RopePairing to) {
  const std::int64_t row = row_bytes(tensor.type, tensor.cols);
  std::string out;
  for (std::int64_t r = 0; r < tensor.rows; ++r) {
    const std::int64_t head = r / head_dim * head_dim;
    const std::int64_t i = r % head_dim;
    std::int64_t source = r;
    if (from == RopePairing::kHalves && to == RopePairing::kInterleaved) {
      source = head + i / 2 + i % 2 * (head_dim / 2);
    } else if (from == RopePairing::kInterleaved && to == RopePairing::kHalves) {
      source = head + i % (head_dim / 2) * 2 + i / (head_dim / 2);
    }
    out += bytes_of(tensor.row(source), row);
  }
  return out;
}

GgufWriter tiny_gguf(const TinyModel& tiny) {
  const Config& c = tiny.model.config;
  const auto u32 = [](int value) { return static_cast<std::uint32_t>(value); };
  GgufWriter w;
  w.set("general.architecture", "llama");
  w.set("general.name", c.name);
  w.set("llama.embedding_length", u32(c.dim));
  w.set("llama.block_count", u32(c.n_layers));
  w.set("llama.attention.head_count", u32(c.n_heads));
  w.set("llama.attention.head_count_kv", u32(c.n_kv_heads));
  w.set("llama.attention.key_length", u32(c.head_dim));
  w.set("llama.attention.value_length", u32(c.head_dim));
  w.set("llama.rope.dimension_count", u32(c.head_dim));
  w.set("llama.feed_forward_length", u32(c.ffn_dim));
  w.set("llama.vocab_size", u32(c.vocab_size));
  w.set("llama.context_length", u32(c.context_length));
  w.set("llama.attention.layer_norm_rms_epsilon", c.norm_eps);
  w.set("llama.rope.freq_base", c.rope_theta);

  const Vocabulary v = make_vocabulary(c.vocab_size);
  w.set("tokenizer.ggml.model", "gpt2");
  w.set("tokenizer.ggml.pre", "smollm");
  w.set("tokenizer.ggml.tokens", v.tokens);
  w.set("tokenizer.ggml.token_type", v.types);
  w.set("tokenizer.ggml.merges", v.merges);
  w.set("tokenizer.ggml.bos_token_id", v.im_start);
  w.set("tokenizer.ggml.eos_token_id", v.im_end);
  w.set("tokenizer.ggml.add_bos_token", false);
  w.set("tokenizer.chat_template", kChatMl);

  for (const Named& named : named_tensors(tiny.model.weights, c.tied_output, false)) {
    const std::string name = named.name + ".weight";
    if (named.vector) {
      w.tensors.push_back({name, {named.vector->size()}, 0, bytes_of(*named.vector)});
    } else {
      const Tensor& t = *named.matrix;
      w.tensors.push_back({name,
                           {static_cast<std::uint64_t>(t.cols), static_cast<std::uint64_t>(t.rows)},
                           ggml_type(t.type),
                           matrix_bytes(named, c, RopePairing::kInterleaved)});
    }
  }
  if (!c.rope_factors.empty()) {
    w.tensors.push_back(
        {"rope_freqs.weight", {c.rope_factors.size()}, 0, bytes_of(c.rope_factors)});
  }
  return w;
}

Files tiny_hf(const TinyModel& tiny, int n_shards) {
  const Config& c = tiny.model.config;
  const Vocabulary v = make_vocabulary(c.vocab_size);
  Files files;
  files["config.json"] = hf_config(c).dump(2);
  files["tokenizer.json"] = hf_tokenizer(v);
  files["tokenizer_config.json"] = json{
      {"bos_token", "<|im_start|>"},
      {"eos_token", "<|im_end|>"},
      {"chat_template", kChatMl}}.dump();
  files["generation_config.json"] =
      json{{"bos_token_id", v.im_start}, {"eos_token_id", v.im_end}}.dump();

  std::vector<SafetensorsWriter::TensorSpec> tensors;
  for (const Named& named : named_tensors(tiny.model.weights, c.tied_output, true)) {
    const std::string name = named.name + ".weight";
    if (named.vector) {
      const auto n = static_cast<std::int64_t>(named.vector->size());
      tensors.push_back({name, "F32", {n}, bytes_of(*named.vector)});
      continue;
    }
    const Tensor& t = *named.matrix;
    const std::string bytes = matrix_bytes(named, c, RopePairing::kHalves);
    const bool plain = dtype_info(t.type).block == 1;
    tensors.push_back({name,
                       plain ? std::string(dtype_info(t.type).name) : "F32",
                       {t.rows, t.cols},
                       plain ? bytes : widened(bytes, t.type)});
  }
  add_safetensors(files, tensors, n_shards);
  return files;
}

void save(const std::filesystem::path& directory, const Files& files) {
  std::filesystem::create_directories(directory);
  for (const auto& [name, bytes] : files) write_file(directory / name, bytes);
}

}  // namespace thaw::testing
