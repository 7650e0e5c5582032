#include "kvstore/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "device/error.h"

namespace thaw {
namespace {

// Mappings that are undone at the end.
class Mappings {
 public:
  Mappings() = default;
  ~Mappings() {
    for (const Mapping& m : mappings_) ::munmap(m.data, m.bytes);
  }
  Mappings(const Mappings&) = delete;
  Mappings& operator=(const Mappings&) = delete;

  // Null when the system refuses.
  std::byte* try_map(std::size_t bytes, int flags, int file = -1, off_t offset = 0) {
    mappings_.reserve(mappings_.size() + 1);
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, offset);
    if (data == MAP_FAILED) return nullptr;
    mappings_.push_back({data, bytes});
    return static_cast<std::byte*>(data);
  }

  std::byte* map(std::size_t bytes, const char* what, int flags, int file = -1, off_t offset = 0) {
    std::byte* data = try_map(bytes, flags, file, offset);
    if (!data)
      fail("KV store: no memory for ", what, ": ", bytes, " bytes: ", std::strerror(errno));
    return data;
  }

 private:
  struct Mapping {
    void* data;
    std::size_t bytes;
  };
  std::vector<Mapping> mappings_;
};

// Pages lie side by side in regions of address space that the system is asked to back with huge
// pages: a step reads from more small ones than the CPU can look up fast.
class MemoryPages final : public PageSource {
 public:
  std::byte* take(std::size_t bytes, const char* what) override {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (bytes > left_) open_region(bytes, what);
    std::byte* page = next_;
    next_ += bytes, left_ -= bytes;
    return page;
  }

 private:
  static constexpr std::size_t kLine = 64, kHuge = std::size_t{2} << 20, kRegion = 32 * kHuge;
  static constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS;

  void open_region(std::size_t bytes, const char* what) {
    const std::size_t most = std::max(bytes + kHuge, kRegion);
    left_ = 0;
    if ((next_ = mappings_.try_map(most, kFlags))) {
      const std::size_t before = -reinterpret_cast<std::uintptr_t>(next_) % kHuge;
      next_ += before, left_ = most - before;
      ::madvise(next_, left_, MADV_HUGEPAGE);  // a wish
    } else {
      next_ = mappings_.map(bytes, what, kFlags);
      left_ = bytes;
    }
  }

  std::byte* next_ = nullptr;
  std::size_t left_ = 0;
  Mappings mappings_;
};

class FilePages final : public PageSource {
 public:
  explicit FilePages(const std::string& path) : path_(path) {
    file_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file_ < 0) fail("cold file ", printable(path), ": cannot create: ", std::strerror(errno));
    ::unlink(path.c_str());
  }
  ~FilePages() override { ::close(file_); }

  std::byte* take(std::size_t bytes, const char* what) override {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const auto size = static_cast<off_t>((bytes + page - 1) / page * page);
    if (const int error = ::posix_fallocate(file_, end_, size))
      fail("cold file ", printable(path_), ": no room for ", what, ": ", size, " bytes after ",
           end_, ": ", std::strerror(error));
    std::byte* data = mappings_.map(bytes, what, MAP_SHARED, file_, end_);
    end_ += size;
    return data;
  }

 private:
  std::string path_;
  int file_ = -1;
  off_t end_ = 0;
  Mappings mappings_;
};

}  // namespace

std::unique_ptr<PageSource> make_memory_pages() { return std::make_unique<MemoryPages>(); }

std::unique_ptr<PageSource> make_file_pages(const std::string& path) {
  return std::make_unique<FilePages>(path);
}

}  // namespace thaw
