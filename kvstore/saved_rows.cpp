#include "kvstore/saved_rows.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "device/error.h"
#include "kvstore/row.h"

namespace thaw {
namespace {

constexpr int kPiece = 256;  // tokens

// Of one layer.
std::size_t token_bytes(const KvShape& shape) {
  return static_cast<std::size_t>(shape.bytes_per_token() / shape.n_layers);
}

}  // namespace

void save_rows(const KvStore& kv, const std::function<void(std::span<const std::byte>)>& write) {
  const std::size_t size = token_bytes(kv.shape());
  std::vector<std::byte> piece(kPiece * size);
  for (int layer = 0; layer < kv.shape().n_layers; ++layer) {
    for (int first = 0; first < kv.length(); first += kPiece) {
      const int n = std::min(kPiece, kv.length() - first);
      kv.read(layer, first, n, piece.data());
      write(std::span(piece).first(static_cast<std::size_t>(n) * size));
    }
  }
}

SavedRows::SavedRows(std::span<const std::byte> bytes, const KvShape& shape, int n_tokens)
    : bytes_(bytes), shape_(shape), n_tokens_(n_tokens) {
  require(std::ssize(bytes) == n_tokens * shape.bytes_per_token(), "keys and values: expected ",
          n_tokens * shape.bytes_per_token(), " bytes, found ", bytes.size());
}

bool SavedRows::finite_as(KvType type) const {
  std::vector<float> numbers(static_cast<std::size_t>(shape_.head_dim));
  std::vector<std::byte> rounded(kv_row_bytes(type, shape_.head_dim));
  const std::size_t row = kv_row_bytes(shape_.type, shape_.head_dim);
  for (std::size_t at = 0; at < bytes_.size(); at += row) {
    load_row(numbers.data(), bytes_.data() + at, shape_.head_dim, shape_.type);
    if (type != shape_.type) {
      store_row(rounded.data(), numbers.data(), shape_.head_dim, type);
      load_row(numbers.data(), rounded.data(), shape_.head_dim, type);
    }
    if (!std::all_of(numbers.begin(), numbers.end(), [](float x) { return std::isfinite(x); }))
      return false;
  }
  return true;
}

void SavedRows::load(int layer, int first, std::span<float> k, std::span<float> v) const {
  const auto dim = static_cast<std::size_t>(shape_.head_dim);
  const std::size_t row = kv_row_bytes(shape_.type, shape_.head_dim);
  const std::byte* in =
      bytes_.data() + (static_cast<std::size_t>(layer) * n_tokens_ + first) * token_bytes(shape_);
  for (std::size_t at = 0; at < k.size(); at += dim, in += 2 * row) {
    load_row(k.data() + at, in, shape_.head_dim, shape_.type);
    load_row(v.data() + at, in + row, shape_.head_dim, shape_.type);
  }
}

}  // namespace thaw
