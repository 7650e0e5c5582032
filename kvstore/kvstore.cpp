#include "kvstore/kvstore.h"

#include <cstring>

#include "device/error.h"

namespace thaw {

std::int64_t KvShape::bytes_per_token() const {
  return std::int64_t{2} * n_layers * n_kv_heads *
         static_cast<std::int64_t>(kv_row_bytes(type, head_dim));
}

void copy_rows(std::byte* out, const KvShape& shape, const KvRows& rows, int first, int n_tokens) {
  const std::size_t size = kv_row_bytes(shape.type, shape.head_dim);
  for (int row = first; row < first + n_tokens; ++row) {
    for (int head = 0; head < shape.n_kv_heads; ++head) {
      std::memcpy(out, rows.key(head, row), size);
      std::memcpy(out + size, rows.value(head, row), size);
      out += 2 * size;
    }
  }
}

void check_shape(const KvShape& s) {
  require(s.n_layers > 0 && s.n_kv_heads > 0 && s.head_dim > 0 && s.capacity > 0,
          "KV store: expected positive sizes, found ", s.n_layers, " layers, ", s.n_kv_heads,
          " heads of ", s.head_dim, ", ", s.capacity, " tokens");
  std::int64_t total = 8;
  bool overflows = false;
  for (int factor : {s.n_layers, s.n_kv_heads, s.head_dim, s.capacity})
    overflows |= __builtin_mul_overflow(total, factor, &total);
  require(!overflows, "KV store: ", s.capacity, " tokens of ", s.n_layers, " layers of ",
          s.n_kv_heads, " heads of ", s.head_dim, " do not fit 64 bits");
  require((s.type != KvType::kQ8_0 && s.type != KvType::kQ4_0) || s.head_dim % 32 == 0,
          "KV store: ", kv_type_name(s.type), ": expected a head_dim that 32 divides, found ",
          s.head_dim);
}

}  // namespace thaw
