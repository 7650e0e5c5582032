#include <functional>
#include <optional>
#include <utility>

#include "device/error.h"
#include "model/config_reader.h"
#include "model/model.h"

namespace thaw {
namespace {

// What the tensors are called, without ".weight".
struct Names {
  const char *embedding, *final_norm, *output;
  const char* layers;  // stands before the layer's number
  const char *attn_norm, *wq, *wk, *wv, *wo, *ffn_norm, *w_gate, *w_up, *w_down;
};

constexpr Names kGgufNames = {"token_embd",  "output_norm", "output",     "blk.",
                              "attn_norm",   "attn_q",      "attn_k",     "attn_v",
                              "attn_output", "ffn_norm",    "ffn_gate",   "ffn_up",
                              "ffn_down"};

struct Found {
  Tensor tensor;
  std::string file;
};
using FindTensor = std::function<std::optional<Found>(const std::string& name)>;

// Demands tensors by name and shape.
class WeightReader {
 public:
  WeightReader(const std::string& source, const Names& names, FindTensor find)
      : source_(source), names_(names), find_(std::move(find)) {}

  Weights read(const Config& config) const;

 private:
  LayerWeights layer(const Config& config, int index) const;
  Tensor matrix(const std::string& name, std::int64_t rows, std::int64_t cols) const;
  std::vector<float> vector(const std::string& name, std::int64_t n) const;
  Found demand(const std::string& name) const;

  const std::string& source_;
  const Names& names_;
  const FindTensor find_;
};

Found WeightReader::demand(const std::string& name) const {
  std::optional<Found> found = find_(name + ".weight");
  require(found.has_value(), source_, ": tensor ", name, ".weight: expected it, found none");
  require(!find_(name + ".bias"), source_, ": tensor ", name, ".bias: expected none, found one");
  return *std::move(found);
}

Tensor WeightReader::matrix(const std::string& name, std::int64_t rows, std::int64_t cols) const {
  Found found = demand(name);
  const Tensor& t = found.tensor;
  require(t.rows == rows && t.cols == cols, found.file, ": tensor ", name,
          ".weight: shape: expected ", rows, " x ", cols, ", found ", t.rows, " x ", t.cols);
  return std::move(found.tensor);
}

std::vector<float> WeightReader::vector(const std::string& name, std::int64_t n) const {
  const Found found = demand(name);
  const Tensor& t = found.tensor;
  require(t.rows == 1 && t.cols == n, found.file, ": tensor ", name, ".weight: shape: expected ", n,
          ", found ", t.rows == 1 ? "" : join(t.rows, " x "), t.cols);
  std::vector<float> out(static_cast<std::size_t>(n));
  dequantize(out.data(), t.data, t.type, n);
  return out;
}

LayerWeights WeightReader::layer(const Config& c, int index) const {
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

Weights WeightReader::read(const Config& c) const {
  Weights weights;
  weights.embedding = matrix(names_.embedding, c.vocab_size, c.dim);
  for (int i = 0; i < c.n_layers; ++i) weights.layers.push_back(layer(c, i));
  weights.final_norm = vector(names_.final_norm, c.dim);
  weights.output =
      c.tied_output ? weights.embedding : matrix(names_.output, c.vocab_size, c.dim);
  return weights;
}

Model load_gguf(const std::filesystem::path& path) {
  Model model;
  model.path = path;
  model.gguf = std::make_shared<const Gguf>(path);
  model.config = read_gguf_config(*model.gguf);
  const std::string source = path.string();
  const auto find = [&](const std::string& name) -> std::optional<Found> {
    const Tensor* tensor = model.gguf->find_tensor(name);
    return tensor ? std::optional(Found{*tensor, source}) : std::nullopt;
  };
  model.weights = WeightReader(source, kGgufNames, find).read(model.config);
  return model;
}

}  // namespace

Model load_model(const std::filesystem::path& path) { return load_gguf(path); }

}  // namespace thaw
