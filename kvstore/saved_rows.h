// Exact keys and values outside a store: as bytes that a file can hold.
//
// The bytes are layers x tokens x KV heads x (key, value), each of kv_row_bytes(), as stored.
#pragma once

#include <cstddef>
#include <functional>
#include <span>

#include "kvstore/kvstore.h"

namespace thaw {

// All tokens of `kv`, in pieces.
void save_rows(const KvStore& kv, const std::function<void(std::span<const std::byte>)>& write);

class SavedRows {
 public:
  // A view of n_tokens x shape.bytes_per_token() bytes, of the shape's layers, heads and type.
  SavedRows(std::span<const std::byte> bytes, const KvShape& shape, int n_tokens);

  int n_tokens() const { return n_tokens_; }
  const KvShape& shape() const { return shape_; }

  bool finite_as(KvType type) const;  // whether all numbers are once a store rounds them to it

  // Keys and values of tokens first ... of a layer, T x kv_dim f32 each; the spans say how many.
  // A store of the same type rounds them to the bits that were saved (NaN aside).
  void load(int layer, int first, std::span<float> k, std::span<float> v) const;

 private:
  std::span<const std::byte> bytes_;
  KvShape shape_;
  int n_tokens_;
};

}  // namespace thaw
