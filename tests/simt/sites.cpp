// Names sites. SIMT_SKIP=SITE in the environment: the one that does nothing; SIMT_SITES=FILE: where
// those that were reached are added when the process ends, one a line. A site is FILE:LINE:COLUMN,
// or 0xOFFSET in the program for calls of the host.
#include "tests/simt/sites.h"

#ifdef SIMT_RACE

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/simt/memory.h"

extern "C" const char __executable_start;  // from the linker

namespace simt {
namespace {

// Nothing is allocated: ThreadSanitizer takes that for the memory of the thread that runs.
struct Site {
  const char* what = nullptr;     // a file's name, or an address in the program
  unsigned line = 0, column = 0;  // of the file
  bool skipped = false;
  std::array<char, 120> name() const {
    std::array<char, 120> text = {};
    if (line == 0) {
      std::snprintf(text.data(), text.size(), "0x%tx", what - &__executable_start);
    } else {
      std::snprintf(text.data(), text.size(), "%s:%u:%u", what, line, column);
    }
    return text;
  }
};

class Sites {
 public:
  ~Sites() {
    const char* path = std::getenv("SIMT_SITES");
    FILE* file = path == nullptr ? nullptr : std::fopen(path, "a");
    if (file == nullptr) return;
    for (const Site& site : all_)
      if (site.what != nullptr) std::fprintf(file, "%s\n", site.name().data());
    std::fclose(file);
  }

  bool is_skipped(const char* what, unsigned line, unsigned column) {
    std::size_t at = reinterpret_cast<std::uintptr_t>(what) / 8 + line * 31 + column;
    for (std::size_t n = 0; n < all_.size(); ++n, ++at) {
      Site& site = all_[at % all_.size()];
      if (site.what == nullptr) {
        site = {what, line, column, false};
        const char* skip = std::getenv("SIMT_SKIP");
        site.skipped = skip != nullptr && std::strcmp(site.name().data(), skip) == 0;
      }
      if (site.what == what && site.line == line && site.column == column) return site.skipped;
    }
    fatal("more sites than there is room for");
  }

 private:
  std::array<Site, 2048> all_;  // a hash table
};
Sites sites;

}  // namespace

bool skipped(const Where& where) {
  return sites.is_skipped(where.file_name(), where.line(), where.column());
}
bool skipped(const void* return_address) {
  return sites.is_skipped(static_cast<const char*>(return_address), 0, 0);
}

}  // namespace simt

#endif
