#include "cli/token_text.h"

#include <algorithm>

#include "device/error.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

bool is_safe(char32_t c) {
  if (c < 0x20) return c == '\n' || c == '\t';
  const bool control = c >= 0x7f && c < 0xa0;
  const bool direction = c == 0x200e || c == 0x200f || (c >= 0x202a && c <= 0x202e) ||
                         (c >= 0x2066 && c <= 0x2069) || c == 0x061c;
  return !control && !direction;
}

}  // namespace

std::vector<std::string> readable_pieces(std::span<const std::string> pieces) {
  std::string all;
  for (const std::string& piece : pieces) all += piece;
  std::vector<std::string> texts;
  std::size_t at = 0, end = 0;
  for (const std::string& piece : pieces) {
    end += piece.size();
    std::string& text = texts.emplace_back();
    while (at < end) {
      const CodePoint c = code_point_at(all, at);
      const std::size_t n = std::max<std::size_t>(c.bytes, 1);
      const std::string bytes = all.substr(at, n);
      text += c.bytes > 0 && is_safe(c.value) ? bytes : printable(bytes);
      at += n;
    }
  }
  return texts;
}

std::vector<std::string> token_texts(const Tokenizer& tokenizer, std::span<const TokenId> tokens) {
  std::vector<std::string> pieces;
  for (const TokenId id : tokens) pieces.emplace_back(tokenizer.decode(id, true));
  return readable_pieces(pieces);
}

}  // namespace thaw
