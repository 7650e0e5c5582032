// Where keys and values live. The contract that the full-residency store implements here and tiered
// stores implement later: tokens are appended in order, viewed by attention, and can be rewound.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

namespace thaw {

enum class KvType : std::uint8_t { kF16, kBF16, kF32 };
std::size_t element_bytes(KvType type);
std::string_view kv_type_name(KvType type);  // "f16", "bf16", "f32"

struct KvShape {
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int capacity = 0;  // tokens
  KvType type = KvType::kF16;

  // Bytes of keys and values of one token over all layers.
  std::int64_t bytes_per_token() const;
};

// The tokens of one layer that attention reads, oldest first. Keys already carry RoPE.
// Element (head, token, i) is at (head * head_stride + token * head_dim + i) of `k` and of `v`.
struct KvView {
  KvType type = KvType::kF16;
  const void* k = nullptr;
  const void* v = nullptr;
  int kv_len = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  std::int64_t head_stride = 0;  // elements

  const std::byte* key(int head, int token) const;
  const std::byte* value(int head, int token) const;
};

class KvStore {
 public:
  virtual ~KvStore() = default;

  // Appends T tokens to `layer`: k and v are T x kv_dim f32, rounded to the store's type here.
  // Every layer must receive the same tokens before the next step. Throws Error, with nothing
  // changed, when the tokens do not fit the capacity.
  virtual void append(int layer, const float* k, const float* v, int n_tokens) = 0;

  // The tokens of `layer`; valid until the next append, rewind or clear.
  virtual KvView view(int layer) const = 0;

  // Forgets every token at `position` and after it, in all layers. 0 <= position <= length().
  virtual void rewind(int position) = 0;
  void clear() { rewind(0); }

  virtual int length() const = 0;  // complete tokens: those that every layer holds
  virtual const KvShape& shape() const = 0;
  virtual std::int64_t resident_bytes() const = 0;  // bytes of the tokens held now, all layers
};

// Every token stays resident and is attended exactly (policy "full"), in host memory reserved for
// `shape.capacity` tokens and touched only as tokens arrive.
std::unique_ptr<KvStore> make_full_kv_store(const KvShape& shape);

}  // namespace thaw
