#include "tokenizer/bpe.h"

#include <algorithm>
#include <bit>
#include <functional>

namespace thaw {
namespace {

constexpr std::size_t kShort = 16;  // symbols; up to here a scan is faster than a queue (measured)

std::uint64_t pair_of(TokenId left, TokenId right) {
  return std::uint64_t{static_cast<std::uint32_t>(left)} << 32 | static_cast<std::uint32_t>(right);
}

}  // namespace

MergeTable::MergeTable(std::size_t merges) : slots_(std::bit_ceil(2 * merges + 1)) {}

// The slot that holds `pair`, or the empty one where it belongs.
std::size_t MergeTable::slot_of(std::uint64_t pair) const {
  std::uint64_t hash = pair;  // the finaliser of MurmurHash3
  hash = (hash ^ hash >> 33) * 0xff51afd7ed558ccdU;
  hash = (hash ^ hash >> 33) * 0xc4ceb9fe1a85ec53U;
  std::size_t at = (hash ^ hash >> 33) & (slots_.size() - 1);
  while (slots_[at].pair != pair && slots_[at].pair != kEmpty) at = (at + 1) & (slots_.size() - 1);
  return at;
}

bool MergeTable::add(TokenId left, TokenId right, Merge merge) {
  const std::uint64_t pair = pair_of(left, right);
  Slot& slot = slots_[slot_of(pair)];
  if (slot.pair == pair) return false;
  slot = {pair, merge};
  return true;
}

MergeTable::Merge MergeTable::find(TokenId left, TokenId right) const {
  return slots_[slot_of(pair_of(left, right))].merge;
}

void Merger::merge_short(std::vector<TokenId>& symbols, std::size_t begin) const {
  MergeTable::Merge merges[kShort];  // of symbol i with its right neighbour
  TokenId* const ids = symbols.data() + begin;
  std::size_t count = symbols.size() - begin;
  for (std::size_t i = 0; i + 1 < count; ++i) merges[i] = table_.find(ids[i], ids[i + 1]);
  while (count > 1) {
    std::size_t best = count;
    for (std::size_t i = 0; i + 1 < count; ++i) {
      if (merges[i].rank >= 0 && (best == count || merges[i].rank < merges[best].rank)) best = i;
    }
    if (best == count) break;
    ids[best] = merges[best].product;
    std::copy(ids + best + 2, ids + count, ids + best + 1);
    std::copy(merges + best + 2, merges + count, merges + best + 1);
    --count;
    if (best > 0) merges[best - 1] = table_.find(ids[best - 1], ids[best]);
    if (best + 1 < count) merges[best] = table_.find(ids[best], ids[best + 1]);
  }
  symbols.resize(begin + count);
}

// Queues the pair whose left symbol is at `at`, when it merges.
void Merger::push(const TokenId* ids, std::int32_t at) {
  const std::int32_t right = next_[static_cast<std::size_t>(at)];
  if (right < 0) return;
  const std::int32_t rank = table_.find(ids[at], ids[right]).rank;
  if (rank < 0) return;
  queue_.push_back(static_cast<std::uint64_t>(rank) << 32 | static_cast<std::uint32_t>(at));
}

void Merger::merge(std::vector<TokenId>& symbols, std::size_t begin) {
  const std::size_t count = symbols.size() - begin;
  if (count <= kShort) return merge_short(symbols, begin);
  constexpr TokenId kGone = -1;  // swallowed by the symbol to its left
  TokenId* const ids = symbols.data() + begin;
  previous_.resize(count);
  next_.resize(count);
  queue_.clear();
  for (std::size_t i = 0; i < count; ++i) {
    previous_[i] = static_cast<std::int32_t>(i) - 1;
    next_[i] = i + 1 < count ? static_cast<std::int32_t>(i) + 1 : -1;
    push(ids, static_cast<std::int32_t>(i));
  }
  std::make_heap(queue_.begin(), queue_.end(), std::greater<>());
  while (!queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
    const auto rank = static_cast<std::int32_t>(queue_.back() >> 32);
    const auto at = static_cast<std::int32_t>(queue_.back() & 0xffffffffU);
    queue_.pop_back();
    const std::int32_t right = next_[static_cast<std::size_t>(at)];
    if (ids[at] == kGone || right < 0) continue;
    const MergeTable::Merge merge = table_.find(ids[at], ids[right]);
    if (merge.rank != rank) continue;  // queued before one of the two changed
    ids[at] = merge.product;
    ids[right] = kGone;
    const std::int32_t after = next_[static_cast<std::size_t>(right)];
    next_[static_cast<std::size_t>(at)] = after;
    if (after >= 0) previous_[static_cast<std::size_t>(after)] = at;
    for (const std::int32_t left : {previous_[static_cast<std::size_t>(at)], at}) {
      if (left < 0) continue;
      const std::size_t before = queue_.size();
      push(ids, left);
      if (queue_.size() > before) std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
    }
  }
  symbols.erase(
      std::remove(symbols.begin() + static_cast<std::ptrdiff_t>(begin), symbols.end(), kGone),
      symbols.end());
}

}  // namespace thaw
