// UTF-8 as the Unicode standard defines it (table 3-7): no overlong forms, surrogates, or code
// points above U+10FFFF.
#pragma once

#include <cstddef>
#include <string_view>

namespace thaw {

struct CodePoint {
  char32_t value = 0;
  std::size_t bytes = 0;  // 0: what stands there is not UTF-8
};

// The code point that starts at text[at]; at < text.size().
CodePoint code_point_at(std::string_view text, std::size_t at);

// How many bytes at the start of `text` are valid UTF-8, and how many are not.
std::size_t valid_utf8_prefix(std::string_view text);
std::size_t invalid_utf8_prefix(std::string_view text);

// What Python's str.isspace() calls white space, which is Unicode White_Space and U+001C to U+001F.
bool is_space(char32_t code_point);

}  // namespace thaw
