// The hot rows of one lane: copies of the exact keys and values of the tokens that matter now,
// dense, so that attention reads them in one sweep. Freezing moves the last row into the gap; order
// means nothing to softmax, and RoPE is in the keys.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kvstore/kvstore.h"
#include "kvstore/pages.h"

namespace thaw {

inline constexpr int kHotPageShift = 3;
inline constexpr int kHotPageRows = 1 << kHotPageShift;

// Pages of kHotPageRows rows that lanes borrow. What was ever needed at once stays allocated.
class HotArena {
 public:
  // row_bytes: of one row of a lane. max_pages: the promise.
  HotArena(PageSource& source, std::size_t row_bytes, std::int64_t max_pages);

  // At least n pages can be taken without asking the source after this; throws Error, with nothing
  // changed, when memory is refused. n beyond the promise counts as the promise.
  void reserve(std::int64_t n);
  std::byte* take();  // null when the promise is reached, or memory is refused
  void give(std::byte* page) { free_.push_back(page); }
  std::int64_t bytes() const;
  std::int64_t free_pages() const { return static_cast<std::int64_t>(free_.size()); }
  std::int64_t pages() const { return pages_; }

 private:
  void grow(std::int64_t at_least);

  PageSource& source_;
  std::size_t row_bytes_;
  std::int64_t max_pages_, pages_ = 0;
  std::vector<std::byte*> free_;
};

class Lane {
 public:
  Lane(HotArena& arena, const KvShape& shape, int layer, int first_head, int n_heads);

  int layer() const { return layer_; }
  int n_rows() const { return static_cast<int>(tokens_.size()); }
  std::int32_t token(int row) const { return tokens_[static_cast<std::size_t>(row)]; }
  std::span<const std::int32_t> tokens() const { return tokens_; }
  bool is_hot(std::int32_t token) const {
    const auto word = static_cast<std::size_t>(token / 32);
    return word < mask_.size() && (mask_[word] >> token % 32 & 1) != 0;
  }

  // Copies the token from the cold tier into a new row. False when the arena has no page for it.
  bool thaw(const KvRows& cold, std::int32_t token);
  void freeze(int row);
  // Freezes every token at `position` and after it.
  void cut(std::int32_t position);

  LaneView view() const;
  std::int64_t bookkeeping_bytes() const;
  // Throws Error when a row is not the bit-exact copy of its token, or rows and mask disagree.
  void check(const KvRows& cold, int kv_len) const;

 private:
  std::byte* row_key(int row, int head) const;

  HotArena& arena_;
  int layer_, first_head_, n_heads_;
  std::size_t kv_row_;  // bytes of one key of one head
  std::vector<std::byte*> pages_;
  std::vector<std::int32_t> tokens_;  // the token in each row
  std::vector<std::uint32_t> mask_;   // of hot tokens
};

}  // namespace thaw
