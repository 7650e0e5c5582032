#include "kvstore/kvstore.h"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <limits>
#include <vector>

#include "device/error.h"
#include "device/half.h"

namespace thaw {

std::size_t element_bytes(KvType type) { return type == KvType::kF32 ? 4 : 2; }

std::string_view kv_type_name(KvType type) {
  constexpr std::string_view kNames[] = {"f16", "bf16", "f32"};
  return kNames[static_cast<int>(type)];
}

std::int64_t KvShape::bytes_per_token() const {
  return std::int64_t{2} * n_layers * n_kv_heads * head_dim *
         static_cast<std::int64_t>(element_bytes(type));
}

const std::byte* KvView::key(int head, int token) const {
  return static_cast<const std::byte*>(k) + (head * head_stride + std::int64_t{token} * head_dim) *
                                                static_cast<std::int64_t>(element_bytes(type));
}

const std::byte* KvView::value(int head, int token) const {
  return static_cast<const std::byte*>(v) + (head * head_stride + std::int64_t{token} * head_dim) *
                                                static_cast<std::int64_t>(element_bytes(type));
}

namespace {

// Address space for n bytes, zero until written; the kernel gives memory page by page on first
// touch.
class Reservation {
 public:
  explicit Reservation(std::size_t n) : size_(n) {
    void* map = ::mmap(nullptr, n, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED)
      fail("KV store: cannot reserve ", n, " bytes: ", std::strerror(errno),
           "; choose a smaller context");
    data_ = static_cast<std::byte*>(map);
  }
  ~Reservation() { ::munmap(data_, size_); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  std::size_t size_;
};

// Bytes of the arena; throws when the shape is not sane or the product does not fit.
std::size_t arena_bytes(const KvShape& s) {
  require(s.n_layers > 0 && s.n_kv_heads > 0 && s.head_dim > 0 && s.capacity > 0,
          "KV store: expected positive sizes, found ", s.n_layers, " layers, ", s.n_kv_heads,
          " heads of ", s.head_dim, ", ", s.capacity, " tokens");
  std::int64_t total = 2 * static_cast<std::int64_t>(element_bytes(s.type));
  bool overflows = false;
  for (int factor : {s.n_layers, s.n_kv_heads, s.head_dim, s.capacity})
    overflows |= __builtin_mul_overflow(total, factor, &total);
  require(!overflows, "KV store: ", s.capacity, " tokens of ", s.n_layers, " layers of ",
          s.n_kv_heads, " heads of ", s.head_dim, " do not fit 64 bits");
  return static_cast<std::size_t>(total);
}

void narrow(std::byte* out, const float* in, int n, KvType type) {
  if (type == KvType::kF32) {
    std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
    return;
  }
  for (int i = 0; i < n; ++i) {
    const std::uint16_t bits = type == KvType::kF16 ? f32_to_f16(in[i]) : f32_to_bf16(in[i]);
    std::memcpy(out + 2 * i, &bits, 2);
  }
}

// Arena layout: layer, then k or v, then head, then token, then element; so the tokens of one head
// are contiguous, which is the order attention reads them in.
class FullKvStore final : public KvStore {
 public:
  explicit FullKvStore(const KvShape& shape)
      : shape_(shape), arena_(arena_bytes(shape)), appended_(shape.n_layers, 0) {}

  void append(int layer, const float* k, const float* v, int n_tokens) override {
    const int first = appended_.at(layer);
    require(n_tokens <= shape_.capacity - first, "KV store: expected at most ", shape_.capacity,
            " tokens, found ", std::int64_t{first} + n_tokens);
    const KvView to = view(layer);
    for (int t = 0; t < n_tokens; ++t) {
      for (int head = 0; head < shape_.n_kv_heads; ++head) {
        const std::int64_t from = (std::int64_t{t} * shape_.n_kv_heads + head) * shape_.head_dim;
        narrow(const_cast<std::byte*>(to.key(head, first + t)), k + from, shape_.head_dim,
               shape_.type);
        narrow(const_cast<std::byte*>(to.value(head, first + t)), v + from, shape_.head_dim,
               shape_.type);
      }
    }
    appended_[layer] += n_tokens;
  }

  KvView view(int layer) const override {
    const std::int64_t head_stride = std::int64_t{shape_.capacity} * shape_.head_dim;
    const std::int64_t plane =
        shape_.n_kv_heads * head_stride * static_cast<std::int64_t>(element_bytes(shape_.type));
    const std::byte* k = arena_.data() + 2 * plane * layer;
    return {shape_.type,     k,          k + plane, appended_.at(layer), shape_.n_kv_heads,
            shape_.head_dim, head_stride};
  }

  void rewind(int position) override {
    require(position >= 0 && position <= length(),
            "KV store: rewind: expected a position from 0 to ", length(), ", found ", position);
    for (int& n : appended_) n = position;
  }

  int length() const override { return *std::min_element(appended_.begin(), appended_.end()); }
  const KvShape& shape() const override { return shape_; }
  std::int64_t resident_bytes() const override { return length() * shape_.bytes_per_token(); }

 private:
  KvShape shape_;
  Reservation arena_;
  std::vector<int> appended_;  // tokens held, per layer
};

}  // namespace

std::unique_ptr<KvStore> make_full_kv_store(const KvShape& shape) {
  return std::make_unique<FullKvStore>(shape);
}

}  // namespace thaw
