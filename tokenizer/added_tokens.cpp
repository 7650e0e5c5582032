#include "tokenizer/added_tokens.h"

#include <algorithm>
#include <utility>

namespace thaw {

AddedTokens::AddedTokens(std::vector<std::pair<std::string_view, TokenId>> tokens)
    : tokens_(std::move(tokens)) {
  std::sort(tokens_.begin(), tokens_.end());
  for (const auto& [text, id] : tokens_) starts_[static_cast<unsigned char>(text[0])] = true;
}

AddedTokens::Match AddedTokens::find(std::string_view text, std::size_t from) const {
  for (std::size_t at = from; at < text.size(); ++at) {
    if (!starts_[static_cast<unsigned char>(text[at])]) continue;
    if (const Match match = match_at(text, at); match.bytes > 0) return match;
  }
  return {};
}

// Narrows the range of tokens that agree with the text, byte by byte.
AddedTokens::Match AddedTokens::match_at(std::string_view text, std::size_t at) const {
  Match longest;
  auto begin = tokens_.begin(), end = tokens_.end();
  for (std::size_t i = 0; at + i < text.size() && begin != end; ++i) {
    const auto byte = static_cast<unsigned char>(text[at + i]);
    begin = std::partition_point(begin, end, [&](const auto& token) {
      return token.first.size() <= i || static_cast<unsigned char>(token.first[i]) < byte;
    });
    end = std::partition_point(begin, end, [&](const auto& token) {
      return static_cast<unsigned char>(token.first[i]) == byte;
    });
    if (begin != end && begin->first.size() == i + 1) longest = {at, i + 1, begin->second};
  }
  return longest;
}

}  // namespace thaw
