#include <algorithm>

#include "kvstore/cold_tier_cuda.h"

namespace thaw {

CudaColdTier::CudaColdTier(const KvShape& shape, bool hashed, const Stream& stream)
    : stream_(stream),
      source_(make_pinned_pages()),
      host_(*source_, shape, hashed),
      table_(static_cast<std::size_t>(tier_pages(shape.capacity)), "KV store"),
      host_table_(table_.size(), "KV store") {}

void CudaColdTier::reserve(int n_tokens) {
  host_.reserve(n_tokens);
  const auto pages = host_.rows(0, 0).pages;
  if (pages.size() == n_sent_) return;
  std::copy(pages.begin() + static_cast<std::ptrdiff_t>(n_sent_), pages.end(),
            host_table_.data() + n_sent_);
  copy_to_device(table_.data() + n_sent_, host_table_.data() + n_sent_, pages.size() - n_sent_,
                 stream_);
  n_sent_ = pages.size();
}

DeviceRows CudaColdTier::rows(int layer) const {
  const KvRows r = host_.rows(layer, 0);
  return {table_.data(), r.offset, r.value_offset, r.head_stride, r.row_bytes, r.page_shift};
}

std::size_t CudaColdTier::layer_bytes() const {
  return host_.rows(1, 0).offset - host_.rows(0, 0).offset;
}

}  // namespace thaw
