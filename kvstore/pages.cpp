#include "kvstore/pages.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
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

  std::byte* map(std::size_t bytes, int flags, int file, off_t offset, const char* what) {
    mappings_.reserve(mappings_.size() + 1);
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, file, offset);
    if (data == MAP_FAILED)
      fail("KV store: no memory for ", what, ": ", bytes, " bytes: ", std::strerror(errno));
    mappings_.push_back({data, bytes});
    return static_cast<std::byte*>(data);
  }

 private:
  struct Mapping {
    void* data;
    std::size_t bytes;
  };
  std::vector<Mapping> mappings_;
};

class MemoryPages final : public PageSource {
 public:
  std::byte* take(std::size_t bytes, const char* what) override {
    return mappings_.map(bytes, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0, what);
  }

 private:
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
    std::byte* data = mappings_.map(bytes, MAP_SHARED, file_, end_, what);
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
