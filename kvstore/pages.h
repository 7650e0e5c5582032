// Memory in large zeroed pages: what the tiers grow by.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

namespace thaw {

class PageSource {
 public:
  virtual ~PageSource() = default;  // gives every page back
  // Zeroed, aligned to 64 bytes, valid as long as this. Throws Error that says what it was for.
  virtual std::byte* take(std::size_t bytes, const char* what) = 0;
};

std::unique_ptr<PageSource> make_memory_pages();

// Pages of a new file at `path`, mapped. The file's name is gone at once, so that nothing is left
// when the program ends in whatever way; its space is claimed page by page before it is used.
// Throws Error when something is at `path` already, or it cannot be created.
std::unique_ptr<PageSource> make_file_pages(const std::string& path);

}  // namespace thaw
