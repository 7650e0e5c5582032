// Byte-pair merging: a sequence of symbols (token ids) shrinks by the merge of lowest rank,
// leftmost first, until no two neighbours have one. Sennrich et al., 1508.07909, with a priority
// queue over a linked list: n symbols take O(n log n).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace thaw {

class MergeTable {
 public:
  struct Merge {
    std::int32_t rank = -1;  // -1: the two do not merge
    TokenId product = -1;
  };

  explicit MergeTable(std::size_t merges);  // how many will be added

  // Ids and rank are not negative. False, and no change, when the pair is already there.
  bool add(TokenId left, TokenId right, Merge merge);

  Merge find(TokenId left, TokenId right) const;

 private:
  struct Slot {
    std::uint64_t pair = kEmpty;
    Merge merge;
  };
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};

  std::size_t slot_of(std::uint64_t pair) const;

  std::vector<Slot> slots_;  // open addressing; a power of two, at most half full
};

// Merges symbols; keeps its scratch memory between calls, so that short pieces allocate nothing.
class Merger {
 public:
  explicit Merger(const MergeTable& table) : table_(table) {}

  // Replaces the symbols from `begin` to the end by what they merge to.
  void merge(std::vector<TokenId>& symbols, std::size_t begin);

 private:
  void merge_short(std::vector<TokenId>& symbols, std::size_t begin) const;
  void push(const TokenId* ids, std::int32_t at);

  const MergeTable& table_;
  std::vector<std::int32_t> previous_,
      next_;                          // neighbours of the symbol at each index, -1 for none
  std::vector<std::uint64_t> queue_;  // min-heap of rank << 32 | index of the pair's left symbol
};

}  // namespace thaw
