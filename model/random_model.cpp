#include "model/random_model.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <new>

#include "device/error.h"
#include "model/k_quants.h"

namespace thaw {
namespace {

constexpr float kRms = 0.02f;

Config shape(const char* name, int dim, int n_layers, int n_heads, int n_kv_heads, int head_dim,
             int ffn_dim, int vocab_size, int context, float theta, bool tied) {
  Config c;
  c.name = name;
  c.dim = dim, c.n_layers = n_layers, c.n_heads = n_heads, c.n_kv_heads = n_kv_heads;
  c.head_dim = head_dim, c.ffn_dim = ffn_dim, c.vocab_size = vocab_size;
  c.context_length = context, c.norm_eps = 1e-5f, c.rope_theta = theta, c.tied_output = tied;
  return c;
}

// SplitMix64 (Steele, Lea and Flood, 2014), the i-th number of a stream: no state, so that tasks
// need no order.
std::uint64_t random_bits(std::uint64_t seed, std::uint64_t i) {
  std::uint64_t z = seed + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// Uniform in +-sqrt(3) kRms, of 16 random bits.
float random_float(std::uint64_t bits) {
  return (static_cast<float>(bits & 0xffff) + 0.5f - 32768.0f) / 32768.0f * 1.7320508f * kRms;
}

// Of codes that are all as likely: their mean from the least on, and deviation.
struct CodeSpread {
  float mean, deviation;
};
CodeSpread spread_of(DType type) {
  const bool five_bits = has_five_bits(type) || type == DType::kQ5_K;
  const float n = type == DType::kQ8_0 ? 256 : type == DType::kQ6_K ? 64 : five_bits ? 32 : 16;
  return {(n - 1) / 2, std::sqrt((n * n - 1) / 12)};
}

// All scales of the parts of a block of a K-quant 32.
void set_part_scales(std::byte* out, DType type) {
  if (type == DType::kQ6_K) {
    std::memset(out + k_scales_at(type), 32, 16);
  } else {
    std::memset(out + k_scales_at(type), 0xa0, 8);  // six bits 32, and the high ones of another 32
    std::memset(out + k_scales_at(type) + 8, 0, 4);
  }
}

// A block of codes that are all as likely; d makes their root mean square kRms.
void fill_block(std::byte* out, DType type, std::uint64_t seed, std::uint64_t block) {
  const auto bytes = static_cast<std::size_t>(dtype_info(type).block_bytes);
  const std::size_t n_words = (bytes + 7) / 8;
  for (std::size_t i = 0; i < n_words; ++i) {
    const std::uint64_t bits = random_bits(seed, block * n_words + i);
    std::memcpy(out + 8 * i, &bits, std::min<std::size_t>(8, bytes - 8 * i));
  }
  const bool is_k = is_k_quant(type);
  if (is_k) set_part_scales(out, type);
  const CodeSpread codes = spread_of(type);
  const float d = kRms / codes.deviation / (is_k ? 32.0f : 1.0f);
  const std::uint16_t halves[] = {f32_to_f16(d), f32_to_f16((is_k ? d : -d) * codes.mean)};
  std::memcpy(out + (is_k ? k_d_at(type) : 0), halves, has_min(type) ? 4 : 2);
}

void fill_element(std::byte* out, DType type, float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const std::uint16_t half = type == DType::kF16 ? f32_to_f16(x) : f32_to_bf16(x);
  if (type == DType::kF32) {
    std::memcpy(out, &bits, 4);
  } else {
    std::memcpy(out, &half, 2);
  }
}

void fill_row(std::byte* out, DType type, std::int64_t cols, std::uint64_t seed) {
  const DTypeInfo& info = dtype_info(type);
  for (std::int64_t i = 0; i < cols / info.block; ++i) {
    std::byte* block = out + i * info.block_bytes;
    const auto index = static_cast<std::uint64_t>(i);
    if (info.block > 1) {
      fill_block(block, type, seed, index);
    } else {
      fill_element(block, type, random_float(random_bits(seed, index / 4) >> index % 4 * 16));
    }
  }
}

// Makes the tensors of a model one by one; each has its own stream of random numbers.
class Filler {
 public:
  Filler(Model& model, DType type, std::uint64_t seed, ThreadPool& pool)
      : model_(model), type_(type), seed_(seed), pool_(pool) {}

  Tensor tensor(const std::string& name, std::int64_t rows, std::int64_t cols) {
    const DType type = cols % dtype_info(type_).block == 0 ? type_ : DType::kQ8_0;
    Tensor t{name, type, rows, cols, nullptr};
    std::byte* data = new (std::nothrow) std::byte[static_cast<std::size_t>(t.bytes())];
    require(data != nullptr, "--random: ", name, ": memory for ", t.bytes(), " bytes was refused");
    model_.memory.push_back(std::shared_ptr<const std::byte[]>(data));
    t.data = data;
    const std::uint64_t seed = random_bits(seed_, n_tensors_++);
    pool_.run(rows, [&](std::int64_t row, int) {
      fill_row(data + row * row_bytes(type, cols), type, cols,
               random_bits(seed, static_cast<std::uint64_t>(row)));
    });
    return t;
  }

 private:
  Model& model_;
  DType type_;
  std::uint64_t seed_, n_tensors_ = 0;
  ThreadPool& pool_;
};

}  // namespace

const std::vector<ModelShape>& model_shapes() {
  static const std::vector<ModelShape> shapes = {
      {"tiny", shape("tiny", 128, 2, 4, 2, 64, 256, 512, 2048, 1e4f, false)},
      {"135m", shape("SmolLM2 135M", 576, 30, 9, 3, 64, 1536, 49152, 8192, 1e5f, true)},
      {"1b", shape("LLaMA 3.2 1B", 2048, 16, 32, 8, 64, 8192, 128256, 131072, 5e5f, true)},
      {"8b", shape("LLaMA 3.1 8B", 4096, 32, 32, 8, 128, 14336, 128256, 131072, 5e5f, false)}};
  return shapes;
}

Model make_random_model(const std::string& shape, DType type, std::uint64_t seed,
                        ThreadPool& pool) {
  Model model;
  for (const ModelShape& known : model_shapes())
    if (known.name == shape) model.config = known.config;
  const Config& c = model.config;
  require(c.dim > 0, "--random: expected the name of a shape, found '", shape, "'");
  model.path = join("random ", shape, " ", dtype_info(type).name);
  Filler fill(model, type, seed, pool);
  Weights& w = model.weights;
  const std::vector<float> ones(static_cast<std::size_t>(c.dim), 1.0f);
  w.embedding = fill.tensor("embedding", c.vocab_size, c.dim);
  w.output = c.tied_output ? w.embedding : fill.tensor("output", c.vocab_size, c.dim);
  w.final_norm = ones;
  for (int i = 0; i < c.n_layers; ++i) {
    const auto name = [&](const char* part) { return join("layer ", i, " ", part); };
    LayerWeights l;
    l.index = i;
    l.attn_norm = l.ffn_norm = ones;
    l.wq = fill.tensor(name("wq"), c.q_dim(), c.dim);
    l.wk = fill.tensor(name("wk"), c.kv_dim(), c.dim);
    l.wv = fill.tensor(name("wv"), c.kv_dim(), c.dim);
    l.wo = fill.tensor(name("wo"), c.dim, c.q_dim());
    l.w_gate = fill.tensor(name("w_gate"), c.ffn_dim, c.dim);
    l.w_up = fill.tensor(name("w_up"), c.ffn_dim, c.dim);
    l.w_down = fill.tensor(name("w_down"), c.dim, c.ffn_dim);
    w.layers.push_back(std::move(l));
  }
  return model;
}

}  // namespace thaw
