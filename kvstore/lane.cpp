#include "kvstore/lane.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "device/error.h"

namespace thaw {
namespace {

constexpr std::int64_t kSlabPages = 32;  // taken from the source at a time

}  // namespace

HotArena::HotArena(PageSource& source, std::size_t row_bytes, std::int64_t max_pages)
    : source_(source), row_bytes_(row_bytes), max_pages_(max_pages) {}

std::int64_t HotArena::bytes() const {
  return pages_ * kHotPageRows * static_cast<std::int64_t>(row_bytes_);
}

void HotArena::grow(std::int64_t at_least) {
  const std::int64_t n = std::min(std::max(at_least, kSlabPages), max_pages_ - pages_);
  if (n <= 0) return;
  free_.reserve(free_.size() + static_cast<std::size_t>(n));
  const std::size_t page = kHotPageRows * row_bytes_;
  std::byte* slab = source_.take(static_cast<std::size_t>(n) * page, "hot tokens");
  for (std::int64_t i = n; i-- > 0;) free_.push_back(slab + static_cast<std::size_t>(i) * page);
  pages_ += n;
}

void HotArena::reserve(std::int64_t n) {
  if (free_pages() < n) grow(n - free_pages());
}

std::byte* HotArena::take() {
  if (free_.empty()) {
    try {
      grow(1);
    } catch (const Error&) {  // the token stays frozen
    }
  }
  if (free_.empty()) return nullptr;
  std::byte* page = free_.back();
  free_.pop_back();
  return page;
}

Lane::Lane(HotArena& arena, const KvShape& shape, int layer, int first_head, int n_heads)
    : arena_(arena),
      layer_(layer),
      first_head_(first_head),
      n_heads_(n_heads),
      kv_row_(kv_row_bytes(shape.type, shape.head_dim)) {}

// A page: head, then row, then key and value.
std::byte* Lane::row_key(int row, int head) const {
  return pages_[static_cast<std::size_t>(row / kHotPageRows)] +
         static_cast<std::size_t>(head * kHotPageRows + row % kHotPageRows) * 2 * kv_row_;
}

bool Lane::thaw(const KvRows& cold, std::int32_t token) {
  const int row = n_rows();
  const auto word = static_cast<std::size_t>(token / 32);
  if (word >= mask_.size()) mask_.resize(word + 1);
  if (row % kHotPageRows == 0) {
    pages_.reserve(pages_.size() + 1);
    std::byte* page = arena_.take();
    if (!page) return false;
    pages_.push_back(page);
  }
  tokens_.push_back(token);
  mask_[word] |= 1u << token % 32;
  for (int head = 0; head < n_heads_; ++head) {
    std::memcpy(row_key(row, head), cold.key(first_head_ + head, token), kv_row_);
    std::memcpy(row_key(row, head) + kv_row_, cold.value(first_head_ + head, token), kv_row_);
  }
  return true;
}

void Lane::freeze(int row) {
  const int last = n_rows() - 1;
  const std::int32_t token = tokens_[static_cast<std::size_t>(row)];
  mask_[static_cast<std::size_t>(token / 32)] &= ~(1u << token % 32);
  if (row != last) {
    for (int head = 0; head < n_heads_; ++head)
      std::memcpy(row_key(row, head), row_key(last, head), 2 * kv_row_);
    tokens_[static_cast<std::size_t>(row)] = tokens_.back();
  }
  tokens_.pop_back();
  if (last % kHotPageRows == 0) {
    arena_.give(pages_.back());
    pages_.pop_back();
  }
}

void Lane::cut(std::int32_t position) {
  for (int row = n_rows(); row-- > 0;)
    if (token(row) >= position) freeze(row);
}

LaneView Lane::view() const {
  LaneView view;
  view.hot.pages = {pages_.data(), pages_.size()};
  view.hot.value_offset = kv_row_;
  view.hot.head_stride = kHotPageRows * 2 * kv_row_;
  view.hot.row_bytes = 2 * kv_row_;
  view.hot.page_shift = kHotPageShift;
  view.hot.n_rows = n_rows();
  view.tokens = tokens_;
  view.hot_mask = mask_;
  return view;
}

std::int64_t Lane::bookkeeping_bytes() const {
  return static_cast<std::int64_t>(tokens_.capacity() * sizeof tokens_[0] +
                                   mask_.capacity() * sizeof mask_[0] +
                                   pages_.capacity() * sizeof pages_[0]);
}

void Lane::check(const KvRows& cold, int kv_len) const {
  int marked = 0;
  for (const std::uint32_t word : mask_) marked += std::popcount(word);
  require(marked == n_rows(), "KV check: layer ", layer_, ": ", n_rows(), " hot rows, but ", marked,
          " tokens are marked hot");
  require(pages_.size() == static_cast<std::size_t>((n_rows() + kHotPageRows - 1) / kHotPageRows),
          "KV check: layer ", layer_, ": ", n_rows(), " hot rows in ", pages_.size(), " pages");
  for (int row = 0; row < n_rows(); ++row) {
    const std::int32_t t = token(row);
    require(t >= 0 && t < kv_len && is_hot(t), "KV check: layer ", layer_, ": hot row ", row,
            " holds token ", t, " of ", kv_len, ", which is not marked hot");
    for (int head = 0; head < n_heads_; ++head)
      require(std::memcmp(row_key(row, head), cold.key(first_head_ + head, t), kv_row_) == 0 &&
                  std::memcmp(row_key(row, head) + kv_row_, cold.value(first_head_ + head, t),
                              kv_row_) == 0,
              "KV check: layer ", layer_, ", head ", first_head_ + head, ": the hot copy of token ",
              t, " differs from the cold one");
  }
}

}  // namespace thaw
