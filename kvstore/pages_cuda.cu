#include <cstdio>
#include <cstring>
#include <vector>

#include "device/error.h"
#include "kvstore/pages_cuda.h"

namespace thaw {
namespace {

class DevicePages final : public PageSource {
 public:
  explicit DevicePages(const Stream& stream) : stream_(stream) {}
  std::byte* take(std::size_t bytes, const char* what) override {
    DeviceBuffer<std::byte> page(bytes, what);
    fill_device(page.data(), 0, bytes, stream_);
    pages_.push_back(std::move(page));
    return pages_.back().data();
  }

 private:
  const Stream& stream_;
  std::vector<DeviceBuffer<std::byte>> pages_;
};

class PinnedPages final : public PageSource {
 public:
  std::byte* take(std::size_t bytes, const char* what) override {
    if (plain_ == nullptr) {
      try {
        PinnedBuffer<std::byte> page(bytes, what);
        std::memset(page.data(), 0, bytes);
        pages_.push_back(std::move(page));
        return pages_.back().data();
      } catch (const Error& error) {
        if (!reads_plain_memory()) throw;
        std::fprintf(stderr,
                     "thaw: %s; plain memory instead: reading it, for prompts and recalls, "
                     "may be several times slower\n",
                     error.what());
        plain_ = make_memory_pages();
      }
    }
    return plain_->take(bytes, what);
  }

 private:
  std::vector<PinnedBuffer<std::byte>> pages_;
  std::unique_ptr<PageSource> plain_;  // once pinned memory was refused
};

}  // namespace

std::unique_ptr<PageSource> make_device_pages(const Stream& stream) {
  return std::make_unique<DevicePages>(stream);
}

std::unique_ptr<PageSource> make_pinned_pages() { return std::make_unique<PinnedPages>(); }

PageTable::PageTable(PageSource& source, std::size_t page_bytes, std::size_t max_pages,
                     const char* what)
    : source_(source),
      page_bytes_(page_bytes),
      what_(what),
      table_(max_pages, what),
      host_table_(max_pages, what) {}

void PageTable::reserve(std::size_t n, const Stream& stream) {
  for (; n_pages_ < n; ++n_pages_) host_table_.data()[n_pages_] = source_.take(page_bytes_, what_);
  if (n_sent_ == n_pages_) return;
  copy_to_device(table_.data() + n_sent_, host_table_.data() + n_sent_, n_pages_ - n_sent_, stream);
  n_sent_ = n_pages_;
}

}  // namespace thaw
