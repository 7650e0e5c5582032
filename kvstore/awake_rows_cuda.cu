#include <algorithm>

#include "kvstore/awake_rows_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {

void CudaAwakeRows::begin(int first, int kv_len) {
  rows_.reserve(kv_len);
  const int full = first / kTierTokens, saved = n_saved_ / kTierTokens;
  if (!is_here_) {  // a context that was longer, and frozen
    const auto pages = cold_.host().rows(0, first).pages;
    for (int i = 0; i < tier_pages(first); ++i)
      copy_to_device(rows_.page(i), pages[static_cast<std::size_t>(i)], rows_.page_bytes(),
                     stream_);
    n_saved_ = first;
  } else if (full > saved) {
    copy_pages(saved, full);
    n_saved_ = full * kTierTokens;
  }
  is_here_ = true;
}

void CudaAwakeRows::copy_pages(int first, int last) {
  ready_.record(stream_);
  side_.wait(ready_);  // the rows are written
  const auto pages = cold_.host().rows(0, last * kTierTokens).pages;
  for (int i = first; i < last; ++i)
    copy_to_host(const_cast<std::byte*>(pages[static_cast<std::size_t>(i)]), rows_.page(i),
                 rows_.page_bytes(), side_);
}

void CudaAwakeRows::save(int n_tokens) {
  if (n_tokens > n_saved_) copy_pages(n_saved_ / kTierTokens, tier_pages(n_tokens));
  n_saved_ = std::max(n_saved_, n_tokens);
  side_.synchronize();
}

void CudaAwakeRows::cut(int position) {
  if (position >= n_saved_) return;
  n_saved_ = position;
  ready_.record(side_);
  stream_.wait(ready_);
}

void CudaAwakeRows::release() {
  rows_.release();
  is_here_ = false, n_saved_ = 0;
}

}  // namespace thaw
