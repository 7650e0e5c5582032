#include "model/file_kind.h"

#include <algorithm>

namespace thaw {

std::string_view mistaken_for(std::span<const std::byte> bytes) {
  if (bytes.empty()) return "an empty file";
  std::string_view start(reinterpret_cast<const char*>(bytes.data()),
                         std::min<std::size_t>(bytes.size(), 256));
  if (start.starts_with("version https://git-lfs")) {
    return "a git-lfs pointer (git lfs pull fetches the file)";
  }
  start.remove_prefix(std::min(start.find_first_not_of(" \t\r\n"), start.size()));
  const bool html = start.starts_with("<!") || start.starts_with("<html") ||
                    start.starts_with("<HTML") || start.starts_with("<?xml");
  return html ? "an HTML page (a download that failed?)" : "";
}

}  // namespace thaw
