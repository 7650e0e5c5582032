#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <system_error>
#include <utility>

#include "device/error.h"
#include "device/json.h"
#include "model/config_reader.h"
#include "model/file_kind.h"
#include "model/model.h"
#include "model/safetensors.h"

namespace thaw {
namespace {

// What the tensors are called, without ".weight".
struct Names {
  const char *embedding, *final_norm, *output;
  const char* layers;  // stands before the layer's number
  const char *attn_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w_gate, *w_up, *w_down;
  const char* frequencies;  // of RoPE: how the whole name ends
};

constexpr Names kGgufNames = {"token_embd",  "output_norm",      "output",   "blk.",
                              "attn_norm",   "attn_q",           "attn_k",   "attn_v",
                              "attn_output", "ffn_norm",         "ffn_gate", "ffn_up",
                              "ffn_down",    "rope_freqs.weight"};

constexpr Names kHfNames = {"model.embed_tokens",
                            "model.norm",
                            "lm_head",
                            "model.layers.",
                            "input_layernorm",
                            "self_attn.q_proj",
                            "self_attn.k_proj",
                            "self_attn.v_proj",
                            "self_attn.o_proj",
                            "post_attention_layernorm",
                            "mlp.gate_proj",
                            "mlp.up_proj",
                            "mlp.down_proj",
                            "rotary_emb.inv_freq"};

struct Found {
  Tensor tensor;
  std::string file;
};
using FindTensor = std::function<std::optional<Found>(const std::string& name)>;

// The name of a tensor, and the file that holds it.
struct Held {
  std::string name;
  std::string file;
};

// Demands tensors by name and shape.
class WeightReader {
 public:
  WeightReader(const std::string& source, const Names& names, FindTensor find)
      : source_(source), names_(names), find_(std::move(find)) {}

  // `all` is what the files hold.
  Weights read(const Config& config, const std::vector<Held>& all);

 private:
  LayerWeights layer(const Config& config, int index);
  Tensor matrix(const std::string& name, std::int64_t rows, std::int64_t cols);
  std::vector<float> vector(const std::string& name, std::int64_t n);
  Found demand(const std::string& name);
  void refuse_rest(const Config& config, const std::vector<Held>& all) const;

  const std::string source_;
  const Names& names_;
  const FindTensor find_;
  std::set<std::string> taken_;
};

Found WeightReader::demand(const std::string& name) {
  std::optional<Found> found = find_(name + ".weight");
  require(found.has_value(), source_, ": tensor ", name, ".weight: expected it, found none");
  taken_.insert(name + ".weight");
  return *std::move(found);
}

// A tensor that nobody took stands for something that is not computed: without it, the text would
// be wrong. Only what the config says already may be left.
void WeightReader::refuse_rest(const Config& c, const std::vector<Held>& all) const {
  for (const Held& held : all) {
    const bool repeats = held.name.ends_with(names_.frequencies) ||
                         (c.tied_output && held.name == join(names_.output, ".weight"));
    require(repeats || taken_.contains(held.name), held.file, ": tensor ", printable(held.name),
            ": expected none of this name in a LLaMA with layers 0 to ", c.n_layers - 1,
            ", found one");
  }
}

Tensor WeightReader::matrix(const std::string& name, std::int64_t rows, std::int64_t cols) {
  Found found = demand(name);
  const Tensor& t = found.tensor;
  require(t.rows == rows && t.cols == cols, found.file, ": tensor ", name,
          ".weight: shape: expected ", rows, " x ", cols, ", found ", t.rows, " x ", t.cols);
  return std::move(found.tensor);
}

std::vector<float> WeightReader::vector(const std::string& name, std::int64_t n) {
  const Found found = demand(name);
  const Tensor& t = found.tensor;
  require(t.rows == 1 && t.cols == n, found.file, ": tensor ", name, ".weight: shape: expected ", n,
          ", found ", t.rows == 1 ? "" : join(t.rows, " x "), t.cols);
  std::vector<float> out(static_cast<std::size_t>(n));
  dequantize(out.data(), t.data, t.type, n);
  return out;
}

LayerWeights WeightReader::layer(const Config& c, int index) {
  const std::string prefix = join(names_.layers, index, ".");
  LayerWeights w;
  w.index = index;
  w.attn_norm = vector(prefix + names_.attn_norm, c.dim);
  w.wq = matrix(prefix + names_.wq, c.q_dim(), c.dim);
  w.wk = matrix(prefix + names_.wk, c.kv_dim(), c.dim);
  w.wv = matrix(prefix + names_.wv, c.kv_dim(), c.dim);
  w.wo = matrix(prefix + names_.wo, c.dim, c.q_dim());
  w.ffn_norm = vector(prefix + names_.ffn_norm, c.dim);
  w.w_gate = matrix(prefix + names_.w_gate, c.ffn_dim, c.dim);
  w.w_up = matrix(prefix + names_.w_up, c.ffn_dim, c.dim);
  w.w_down = matrix(prefix + names_.w_down, c.dim, c.ffn_dim);
  return w;
}

Weights WeightReader::read(const Config& c, const std::vector<Held>& all) {
  Weights weights;
  weights.embedding = matrix(names_.embedding, c.vocab_size, c.dim);
  for (int i = 0; i < c.n_layers; ++i) weights.layers.push_back(layer(c, i));
  weights.final_norm = vector(names_.final_norm, c.dim);
  weights.output = c.tied_output ? weights.embedding : matrix(names_.output, c.vocab_size, c.dim);
  refuse_rest(c, all);
  return weights;
}

bool is_there(const std::filesystem::path& path) {
  std::error_code unreadable;
  return std::filesystem::exists(path, unreadable);
}

// Whether `path` is named as what a Hugging Face directory holds.
bool is_part_of_directory(const std::filesystem::path& path) {
  const auto extension = path.extension();
  return is_there(path) && (extension == ".safetensors" || extension == ".json");
}

Model load_gguf(const std::filesystem::path& path) {
  const std::string source = path.string();
  require(!is_part_of_directory(path), source,
          ": expected a .gguf file or a directory, found a file of the directory ",
          path.has_parent_path() ? path.parent_path().string() : ".");
  Model model;
  model.path = path;
  model.gguf = std::make_shared<const Gguf>(path);
  model.config = read_gguf_config(*model.gguf);
  const auto find = [&](const std::string& name) -> std::optional<Found> {
    const Tensor* tensor = model.gguf->find_tensor(name);
    return tensor ? std::optional(Found{*tensor, source}) : std::nullopt;
  };
  std::vector<Held> all;
  for (const Tensor& tensor : model.gguf->tensors()) all.push_back({tensor.name, source});
  model.weights = WeightReader(source, kGgufNames, find).read(model.config, all);
  return model;
}

std::string_view json_text(const MappedFile& file) {
  const auto kind = mistaken_for(file.bytes());
  require(kind.empty(), file.path().string(), ": expected JSON, found ", kind);
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// The safetensors files of a directory: which file holds which tensor.
class Checkpoint {
 public:
  explicit Checkpoint(const std::filesystem::path& directory);
  std::optional<Found> find(const std::string& name) const;
  std::vector<Held> all() const;
  std::vector<MappedFile> take_files() { return std::move(files_); }

 private:
  std::size_t open(const std::filesystem::path& path);  // its place in `shards_`
  void read_index(const std::filesystem::path& path);

  std::vector<MappedFile> files_;
  std::vector<Safetensors> shards_;
  std::map<std::string, std::size_t> place_;  // of each tensor, in `shards_`
};

std::size_t Checkpoint::open(const std::filesystem::path& path) {
  files_.emplace_back(path);
  shards_.emplace_back(files_.back().bytes(), path.string());
  return shards_.size() - 1;
}

void Checkpoint::read_index(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::string source = path.string();
  const nlohmann::json index = parse_json(json_text(file), source);
  const auto map = index.is_object() ? index.find("weight_map") : index.end();
  require(map != index.end() && map->is_object(), source,
          ": weight_map: expected an object, found none");
  std::map<std::string, std::size_t> opened;
  for (const auto& [name, shard] : map->items()) {
    const std::string field = join(source, ": weight_map: ", printable(name));
    require(shard.is_string(), field, ": expected a file name, found ", shard.type_name());
    const auto& text = shard.get_ref<const std::string&>();
    require(
        text.ends_with(".safetensors") && text.find_first_of(std::string("/\\\0", 3)) == text.npos,
        field, ": expected the name of a .safetensors file beside the index, found ",
        printable(text));
    auto it = opened.find(text);
    if (it == opened.end()) it = opened.emplace(text, open(path.parent_path() / text)).first;
    const Safetensors& holder = shards_[it->second];
    require(holder.has(name), holder.source(), ": tensor ", printable(name), ": expected it (",
            path.filename().string(), "), found none");
    place_[name] = it->second;
  }
}

Checkpoint::Checkpoint(const std::filesystem::path& directory) {
  const auto single = directory / "model.safetensors";
  const auto index = directory / "model.safetensors.index.json";
  if (is_there(single)) {
    open(single);
    for (const std::string& name : shards_[0].names()) place_[name] = 0;
  } else if (is_there(index)) {
    read_index(index);
  } else {
    fail(directory.string(), ": expected model.safetensors or model.safetensors.index.json, found ",
         is_there(directory / "pytorch_model.bin") ? "pytorch_model.bin" : "neither");
  }
}

std::optional<Found> Checkpoint::find(const std::string& name) const {
  const auto it = place_.find(name);
  if (it == place_.end()) return std::nullopt;
  const Safetensors& shard = shards_[it->second];
  return Found{shard.tensor(name), shard.source()};
}

std::vector<Held> Checkpoint::all() const {
  std::vector<Held> out;
  for (const Safetensors& shard : shards_) {
    for (const std::string& name : shard.names()) out.push_back({name, shard.source()});
  }
  return out;
}

Model load_directory(const std::filesystem::path& path) {
  const auto config_path = path / "config.json";
  require(is_there(config_path), path.string(),
          ": expected a directory with config.json and *.safetensors, or a .gguf file; found a "
          "directory without config.json");
  Model model;
  model.path = path;
  const MappedFile config_file(config_path);
  model.config = read_hf_config(json_text(config_file), config_path.string());
  model.config.name = printable(path.lexically_normal().filename().string());
  Checkpoint checkpoint(path);
  const auto find = [&](const std::string& name) { return checkpoint.find(name); };
  model.weights = WeightReader(path.string(), kHfNames, find).read(model.config, checkpoint.all());
  model.shards = checkpoint.take_files();
  return model;
}

}  // namespace

Model load_model(const std::filesystem::path& path) {
  std::error_code unreadable;
  return std::filesystem::is_directory(path, unreadable) ? load_directory(path) : load_gguf(path);
}

}  // namespace thaw
