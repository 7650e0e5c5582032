#include "model/identity.h"

#include <algorithm>
#include <cstddef>
#include <span>
#include <vector>

namespace thaw {
namespace {

class Hash {
 public:
  void add(std::span<const std::byte> bytes) {
    for (const std::byte byte : bytes)
      value_ = (value_ ^ static_cast<std::uint64_t>(byte)) * 0x100000001b3;
  }
  template <class T>
  void add(const std::vector<T>& values) {
    add(std::as_bytes(std::span(values)));
  }
  void add(const Tensor& t) {
    constexpr std::int64_t kMost = 4096;
    add(std::vector<std::int64_t>{static_cast<std::int64_t>(t.type), t.rows, t.cols});
    const std::int64_t n = std::min(t.bytes(), kMost);
    add(std::span(t.data + (t.bytes() - n) / 2, static_cast<std::size_t>(n)));
  }
  std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325;
};

}  // namespace

std::uint64_t identity(const Model& model) {
  const Config& c = model.config;
  const Weights& w = model.weights;
  Hash hash;
  hash.add(std::vector<int>{c.n_layers, c.n_heads, c.n_kv_heads, c.head_dim, c.vocab_size,
                            static_cast<int>(c.rope_pairing)});
  hash.add(std::vector<float>{c.norm_eps});
  hash.add(rope_inverse_frequencies(c));
  hash.add(w.final_norm);
  for (const Tensor* t : {&w.embedding, &w.output}) hash.add(*t);
  for (const LayerWeights& l : w.layers) {
    hash.add(l.attn_norm), hash.add(l.ffn_norm);
    for (const Tensor* t : {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down})
      hash.add(*t);
  }
  return hash.value();
}

}  // namespace thaw
