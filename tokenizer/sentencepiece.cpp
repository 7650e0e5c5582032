#include "tokenizer/sentencepiece.h"

#include <charconv>

namespace thaw {

std::string from_space_marks(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const bool mark = text.starts_with(kSpaceMark);
    out += mark ? ' ' : text.front();
    text.remove_prefix(mark ? kSpaceMark.size() : 1);
  }
  return out;
}

std::optional<char> byte_named(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text.back() != '>') return std::nullopt;
  unsigned byte = 0;
  const char* const end = text.data() + 5;
  const auto [stop, error] = std::from_chars(text.data() + 3, end, byte, 16);
  if (error != std::errc() || stop != end) return std::nullopt;
  return static_cast<char>(byte);
}

}  // namespace thaw
