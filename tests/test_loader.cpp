#include <doctest/doctest.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "model/check.h"
#include "tests/error_of.h"
#include "tests/safetensors_writer.h"
#include "tests/tiny_files.h"

using namespace thaw;
using namespace thaw::testing;
using nlohmann::json;

namespace {

std::vector<float> values(const Tensor& t) {
  std::vector<float> out(static_cast<std::size_t>(t.rows * t.cols));
  dequantize(out.data(), t.data, t.type, t.rows * t.cols);
  return out;
}

// Rows of `t`, as the file `from` holds them, in the order of pairing `to`.
std::vector<float> repaired(Tensor t, int head_dim, RopePairing from, RopePairing to) {
  const std::string bytes = repair_rows(t, head_dim, from, to);
  t.data = reinterpret_cast<const std::byte*>(bytes.data());
  return values(t);
}

// The weights of both models are equal once dequantised and wq, wk are brought to one pairing.
void check_same(const Model& a, const Model& b) {
  const auto same = [](const Tensor& x, const Tensor& y) {
    CAPTURE(x.name);
    CHECK(x.rows == y.rows);
    CHECK(x.cols == y.cols);
    CHECK(values(x) == values(y));
  };
  const auto halves = [](const Tensor& t, const Config& c) {
    return repaired(t, c.head_dim, c.rope_pairing, RopePairing::kHalves);
  };
  same(a.weights.embedding, b.weights.embedding);
  same(a.weights.output, b.weights.output);
  CHECK(a.weights.final_norm == b.weights.final_norm);
  REQUIRE(a.weights.layers.size() == b.weights.layers.size());
  for (std::size_t i = 0; i < a.weights.layers.size(); ++i) {
    const LayerWeights& x = a.weights.layers[i];
    const LayerWeights& y = b.weights.layers[i];
    CHECK(x.index == static_cast<int>(i));
    CHECK(x.attn_norm == y.attn_norm);
    CHECK(halves(x.wq, a.config) == halves(y.wq, b.config));
    CHECK(halves(x.wk, a.config) == halves(y.wk, b.config));
    same(x.wv, y.wv);
    same(x.wo, y.wo);
    CHECK(x.ffn_norm == y.ffn_norm);
    same(x.w_gate, y.w_gate);
    same(x.w_up, y.w_up);
    same(x.w_down, y.w_down);
  }
}

TinyModel tiny() { return make_tiny_model({.n_layers = 1, .vocab_size = 259}); }

// A tiny model's files in a temporary directory, for tests that change one of them.
struct HfDirectory {
  TemporaryDirectory directory;
  Files files;

  explicit HfDirectory(int n_shards = 1) : files(tiny_hf(tiny(), n_shards)) {}
  std::string path(const std::string& name = "") const {
    return (name.empty() ? directory.path() : directory.path() / name).string();
  }
  void config(const std::string& key, const json& value) {
    json document = json::parse(files["config.json"]);
    document[key] = value;
    files["config.json"] = document.dump();
  }
  // One tensor more, in a shard of its own; needs an index.
  void add_tensor(const std::string& name) {
    SafetensorsWriter writer;
    writer.tensors.push_back({name, "F32", {2}, "12345678"});
    files["extra.safetensors"] = writer.bytes();
    json index = json::parse(files["model.safetensors.index.json"]);
    index["weight_map"][name] = "extra.safetensors";
    files["model.safetensors.index.json"] = index.dump();
  }
  std::string error() const {
    save(directory.path(), files);
    return error_of([&] { load_model(directory.path()); });
  }
};

struct GgufFile {
  TemporaryDirectory directory;
  std::filesystem::path path = directory.path() / "tiny.gguf";

  std::string error(const std::string& bytes) const {
    write_file(path, bytes);
    return error_of([&] { load_model(path); });
  }
  std::string error(const GgufWriter& writer) const { return error(writer.bytes()); }
};

}  // namespace

TEST_CASE(
    "loader: a model saved as GGUF and as Hugging Face directory loads with the same weights") {
  for (const DType type : kAllTypes) {
    for (const bool tied : {false, true}) {
      CAPTURE(dtype_info(type).name);
      TinyModel original = make_tiny_model({.type = type, .tied = tied});
      TemporaryDirectory directory;
      const auto gguf_path = directory.path() / "tiny.gguf";
      write_file(gguf_path, tiny_gguf(original).bytes());
      save(directory.path() / "single", tiny_hf(original));
      save(directory.path() / "sharded", tiny_hf(original, 3));

      const Model gguf = load_model(gguf_path);
      CHECK(gguf.path == gguf_path);
      CHECK(gguf.gguf != nullptr);
      CHECK(gguf.shards.empty());
      CHECK(gguf.config.rope_pairing == RopePairing::kInterleaved);
      CHECK(gguf.config.tied_output == tied);
      CHECK(gguf.weights.layers[1].w_up.type == type);
      CHECK((gguf.weights.output.data == gguf.weights.embedding.data) == tied);
      check_same(original.model, gguf);

      const Model single = load_model(directory.path() / "single");
      CHECK(single.gguf == nullptr);
      CHECK(single.shards.size() == 1);
      CHECK(single.config.name == "single");
      CHECK(single.config.rope_pairing == RopePairing::kHalves);
      check_same(original.model, single);
      const Model sharded = load_model(directory.path() / "sharded");
      CHECK(sharded.shards.size() == 3);
      check_same(original.model, sharded);
    }
  }
}

TEST_CASE("loader: a model trained for interleaved pairs needs no reordering in GGUF") {
  TinyModel original = make_tiny_model({.pairing = RopePairing::kInterleaved});
  GgufFile file;
  write_file(file.path, tiny_gguf(original).bytes());
  const Model loaded = load_model(file.path);
  CHECK(values(loaded.weights.layers[1].wq) == values(original.model.weights.layers[1].wq));
  TemporaryDirectory directory;
  save(directory.path(), tiny_hf(original));
  check_same(original.model, load_model(directory.path()));
}

TEST_CASE("loader: the views stay valid when the model moves") {
  HfDirectory hf;
  save(hf.directory.path(), hf.files);
  Model first = load_model(hf.directory.path());
  const std::vector<float> before = values(first.weights.embedding);
  const Model second = std::move(first);
  CHECK(values(second.weights.embedding) == before);
}

TEST_CASE("loader: a tensor that would be ignored is an error") {
  GgufFile file;
  const auto found = [](const std::string& source, const std::string& name, int last_layer) {
    return join(source, ": tensor ", name,
                ": expected none of this name in a LLaMA with layers 0 to ", last_layer,
                ", found one");
  };
  for (const char* name : {"extra.weight", "blk.0.attn_q.bias", "blk.0.attn_q_norm.weight",
                           "blk.1.attn_q.weight", "blk.x.attn_q.weight"}) {
    GgufWriter w = tiny_gguf(tiny());
    w.tensors.push_back({name, {2}, 0, "12345678"});
    CHECK(file.error(w) == found(file.path.string(), name, 0));
  }
  GgufWriter w = tiny_gguf(make_tiny_model({.n_layers = 3}));
  w.set("llama.block_count", std::uint32_t{2});
  CHECK(file.error(w) == found(file.path.string(), "blk.2.attn_norm.weight", 1));

  for (const char* name :
       {"model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.up_proj.bias",
        "model.layers.1.input_layernorm.weight", "score.weight"}) {
    HfDirectory hf(2);
    hf.add_tensor(name);
    CHECK(hf.error() == found(hf.path("extra.safetensors"), name, 0));
  }
}

TEST_CASE("loader: tensors that only repeat what the model says are ignored") {
  HfDirectory hf(2);
  hf.add_tensor("model.layers.0.self_attn.rotary_emb.inv_freq");
  CHECK(hf.error() == "");
  hf.files = tiny_hf(make_tiny_model({.n_layers = 1, .vocab_size = 259, .tied = true}), 2);
  hf.add_tensor("lm_head.weight");
  CHECK(hf.error() == "");
}

TEST_CASE("loader: a missing tensor is named") {
  GgufFile file;
  GgufWriter w = tiny_gguf(tiny());
  std::erase_if(w.tensors, [](const auto& t) { return t.name == "blk.0.ffn_up.weight"; });
  CHECK(file.error(w) ==
        file.path.string() + ": tensor blk.0.ffn_up.weight: expected it, found none");
  w = tiny_gguf(tiny());
  w.set("llama.block_count", std::uint32_t{60000});
  CHECK(file.error(w) ==
        file.path.string() + ": tensor blk.1.attn_norm.weight: expected it, found none");
  w.tensors.clear();
  CHECK(file.error(w) ==
        file.path.string() + ": tensor token_embd.weight: expected it, found none");
  HfDirectory hf;
  hf.config("num_hidden_layers", 2);
  CHECK(hf.error() ==
        hf.path() + ": tensor model.layers.1.input_layernorm.weight: expected it, found none");
}

TEST_CASE("loader: a shape that contradicts the config is printed with the one expected") {
  GgufFile file;
  GgufWriter w = tiny_gguf(tiny());
  w.tensor("blk.0.attn_k.weight").dims = {32, 64};
  CHECK(file.error(w) ==
        file.path.string() +
            ": tensor blk.0.attn_k.weight: shape: expected 32 x 64, found 64 x 32");
  w = tiny_gguf(tiny());
  w.tensor("output_norm.weight").dims = {32, 2};
  CHECK(file.error(w) ==
        file.path.string() + ": tensor output_norm.weight: shape: expected 64, found 2 x 32");
  w = tiny_gguf(tiny());
  w.tensor("blk.0.attn_norm.weight").dims = {32};
  CHECK(file.error(w) ==
        file.path.string() + ": tensor blk.0.attn_norm.weight: shape: expected 64, found 32");

  HfDirectory hf(2);
  hf.config("num_key_value_heads", 1);
  CHECK(hf.error() ==
        hf.path("model-00002-of-00002.safetensors") +
            ": tensor model.layers.0.self_attn.k_proj.weight: shape: expected 16 x 64, "
            "found 32 x 64");
}

TEST_CASE("loader: a vocabulary and an embedding that disagree are an error") {
  GgufFile file;
  GgufWriter w = tiny_gguf(tiny());
  w.erase("llama.vocab_size");
  w.set("tokenizer.ggml.tokens", std::vector<std::string>(300, "x"));
  CHECK(file.error(w) ==
        file.path.string() +
            ": tensor token_embd.weight: shape: expected 300 x 64, found 259 x 64");
  HfDirectory hf;
  hf.config("vocab_size", 260);
  CHECK(hf.error() ==
        hf.path("model.safetensors") +
            ": tensor model.embed_tokens.weight: shape: expected 260 x 64, found 259 x 64");
}

TEST_CASE("loader: without lm_head a model must say that it is tied") {
  HfDirectory hf;
  hf.files = tiny_hf(make_tiny_model({.n_layers = 1, .vocab_size = 259, .tied = true}));
  CHECK(hf.error() == "");
  hf.config("tie_word_embeddings", false);
  CHECK(hf.error() == hf.path() + ": tensor lm_head.weight: expected it, found none");
}

TEST_CASE("loader: a path that is no model says what is there") {
  TemporaryDirectory directory;
  const std::string path = directory.path().string();
  CHECK(error_of([&] { load_model(directory.path() / "no.gguf"); }) ==
        path + "/no.gguf: cannot open: No such file or directory");
  CHECK(error_of([&] { load_model(""); }) == ": cannot open: No such file or directory");
  CHECK(error_of([&] { load_model(directory.path()); }) ==
        path +
            ": expected a directory with config.json and *.safetensors, or a .gguf file; found a "
            "directory without config.json");
  CHECK(error_of([&] { load_model("/dev/null"); }) ==
        "/dev/null: expected a regular file, found something else");
  write_file(directory.path() / "config.json", tiny_hf(tiny())["config.json"]);
  CHECK(error_of([&] { load_model(directory.path()); }) ==
        path + ": expected model.safetensors or model.safetensors.index.json, found neither");
  write_file(directory.path() / "pytorch_model.bin", "PK");
  CHECK(error_of([&] { load_model(directory.path()); }) ==
        path +
            ": expected model.safetensors or model.safetensors.index.json, found "
            "pytorch_model.bin");
  GgufFile file;
  CHECK(file.error("") == file.path.string() + ": expected a GGUF model, found an empty file");
  CHECK(file.error("<html>").find("found an HTML page") != std::string::npos);
  if (::geteuid() != 0) {  // root may read everything
    std::filesystem::permissions(file.path, std::filesystem::perms::none);
    CHECK(error_of([&] { load_model(file.path); }) ==
          file.path.string() + ": cannot open: Permission denied");
  }
}

TEST_CASE("loader: a file of a Hugging Face directory is answered with the directory to give") {
  HfDirectory hf;
  save(hf.directory.path(), hf.files);
  for (const char* name : {"model.safetensors", "config.json", "tokenizer.json"}) {
    CHECK(error_of([&] { load_model(hf.path(name)); }) ==
          hf.path(name) + ": expected a .gguf file or a directory, found a file of the directory " +
              hf.path());
  }
  CHECK(error_of([&] { load_model(hf.path("no.safetensors")); }) ==
        hf.path("no.safetensors") + ": cannot open: No such file or directory");
}

TEST_CASE("loader: config.json and the index that are something else are called by name") {
  HfDirectory hf(2);
  const auto with = [&](const char* name, const std::string& text) {
    HfDirectory changed(2);
    changed.files[name] = text;
    std::string message = changed.error();
    return message.substr(std::min(message.size(), changed.path().size() + 1));
  };
  CHECK(with("config.json", "") == "config.json: expected JSON, found an empty file");
  CHECK(with("config.json", "<html>").find("config.json: expected JSON, found an HTML page") == 0);
  CHECK(with("config.json", "{") == "config.json: expected JSON, found its end after byte 1");
  const char* index = "model.safetensors.index.json";
  CHECK(with(index, "version https://git-lfs.github.com/spec/v1")
            .find("model.safetensors.index.json: expected JSON, found a git-lfs pointer") == 0);
  CHECK(with(index, "{}") ==
        "model.safetensors.index.json: weight_map: expected an object, found none");
  CHECK(with(index, "[]") ==
        "model.safetensors.index.json: weight_map: expected an object, found none");
  CHECK(with(index, R"({"weight_map": {"a": 1}})") ==
        "model.safetensors.index.json: weight_map: a: expected a file name, found number");
}

TEST_CASE("loader: a shard that is missing, lies outside or lacks its tensor is an error") {
  HfDirectory hf(2);
  const std::string index = "model.safetensors.index.json";
  const json original = json::parse(hf.files[index]);
  const std::string name = "model.embed_tokens.weight";
  for (const char* bad : {"../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..",
                          "", "model.bin", "a\\b.safetensors"}) {
    json changed = original;
    changed["weight_map"][name] = bad;
    hf.files[index] = changed.dump();
    CHECK(hf.error() == hf.path(index) + ": weight_map: " + name +
                            ": expected the name of a .safetensors file beside the index, found " +
                            printable(bad));
  }
  json changed = original;
  changed["weight_map"][name] = "model-00003-of-00002.safetensors";
  hf.files[index] = changed.dump();
  CHECK(hf.error() ==
        hf.path("model-00003-of-00002.safetensors") + ": cannot open: No such file or directory");
  changed["weight_map"][name] = "model-00002-of-00002.safetensors";
  hf.files[index] = changed.dump();
  CHECK(hf.error() == hf.path("model-00002-of-00002.safetensors") + ": tensor " + name +
                          ": expected it (model.safetensors.index.json), found none");
  hf.files[index] = original.dump();
  CHECK(hf.error() == "");
}

TEST_CASE("check: NaN and infinity are found with tensor, place and count") {
  for (const DType type : kAllTypes) {
    CAPTURE(dtype_info(type).name);
    TinyModel model = make_tiny_model({.type = type});
    CHECK(find_non_finite(model.model).empty());

    // NaN into what begins row 5 of w_up (an f32's low half does not make one), or its block's d.
    LayerWeights& layer = model.model.weights.layers[1];
    const std::uint32_t nan = type == DType::kF32    ? 0x7fc00000
                              : type == DType::kBF16 ? 0x7fc0
                                                     : 0x7e00;
    auto* row = const_cast<std::byte*>(layer.w_up.row(5));
    std::memcpy(row + (is_k_quant(type) ? k_d_at(type) : 0), &nan, type == DType::kF32 ? 4 : 2);
    const auto found = find_non_finite(model.model);
    REQUIRE(found.size() == 1);
    CHECK(found[0].tensor == layer.w_up.name);
    CHECK(found[0].first == 5 * layer.w_up.cols);
    CHECK(found[0].count == dtype_info(type).block);
  }
  TinyModel model = make_tiny_model({.tied = true});
  model.model.weights.layers[1].ffn_norm[3] = std::numeric_limits<float>::infinity();
  model.model.weights.layers[1].ffn_norm[9] = -std::numeric_limits<float>::infinity();
  auto found = find_non_finite(model.model);
  REQUIRE(found.size() == 1);
  CHECK(found[0].tensor == "ffn_norm of layer 1");
  CHECK(found[0].first == 3);
  CHECK(found[0].count == 2);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(const_cast<std::byte*>(model.model.weights.embedding.data), &nan, 4);
  found = find_non_finite(model.model);
  REQUIRE(found.size() == 2);  // the tied output is not told twice
  CHECK(found[0].tensor == "embedding");
}
