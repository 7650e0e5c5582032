#include <algorithm>

#include "device/error.h"
#include "kvstore/exact_tier_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {

CudaExactTier::CudaExactTier(const KvShape& shape, const Stream& stream)
    : shape_(shape),
      stream_(stream),
      table_(static_cast<std::size_t>(tier_pages(shape.capacity)), "KV store"),
      host_table_(table_.size(), "KV store") {
  pages_.reserve(table_.size());
}

std::size_t CudaExactTier::page_bytes() const {
  return kTierTokens * static_cast<std::size_t>(shape_.bytes_per_token());
}

int CudaExactTier::room() const { return static_cast<int>(pages_.size()) * kTierTokens; }

std::int64_t CudaExactTier::bytes() const {
  return std::ssize(pages_) * static_cast<std::int64_t>(page_bytes());
}

void CudaExactTier::reserve(int n_tokens) {
  const std::size_t had = pages_.size();
  const auto wanted = static_cast<std::size_t>(tier_pages(n_tokens));
  try {
    while (pages_.size() < wanted) {
      pages_.emplace_back(page_bytes(), "KV store");
      host_table_.data()[pages_.size() - 1] = pages_.back().data();
    }
  } catch (const Error& error) {
    const int fits = std::min(room(), shape_.capacity);
    pages_.resize(had);
    fail(error.what(), "; ", n_tokens, " tokens were asked for, ", fits, " would fit");
  }
  if (wanted > had)
    copy_to_device(table_.data() + had, host_table_.data() + had, wanted - had, stream_);
}

DeviceRows CudaExactTier::rows(int layer) const {
  const std::size_t row = kv_row_bytes(shape_.type, shape_.head_dim);
  DeviceRows rows = {};
  rows.pages = table_.data();
  rows.row_bytes = row;
  rows.value_offset = kTierTokens * row;
  rows.head_stride = 2 * kTierTokens * row;
  rows.offset = static_cast<std::size_t>(layer) * shape_.n_kv_heads * rows.head_stride;
  rows.page_shift = kTierShift;
  return rows;
}

// Page by page, through a copy of the layer's part of it.
void CudaExactTier::read(int layer, int first, int n_tokens, std::byte* to) const {
  const DeviceRows all = rows(layer);
  std::vector<std::byte> part(static_cast<std::size_t>(shape_.n_kv_heads) * all.head_stride);
  const std::byte* const here_page = part.data();
  const KvRows here = {{&here_page, 1}, 0,          all.value_offset, all.head_stride,
                       all.row_bytes,   kTierShift, kTierTokens};
  for (int token = first, end = first + n_tokens; token < end;) {
    const int at = token % kTierTokens, n = std::min(kTierTokens - at, end - token);
    copy_to_host(part.data(), page(token / kTierTokens) + all.offset, part.size(), stream_);
    copy_rows(to, shape_, here, at, n);
    to += std::size_t{2} * all.row_bytes * static_cast<std::size_t>(shape_.n_kv_heads * n);
    token += n;
  }
}

void CudaExactTier::check() const {
  std::vector<const std::byte*> table(pages_.size());
  copy_to_host(table.data(), table_.data(), table.size(), stream_);
  for (std::size_t i = 0; i < table.size(); ++i)
    require(table[i] == pages_[i].data(), "KV check: page ", i, ": the device's table is wrong");
}

}  // namespace thaw
