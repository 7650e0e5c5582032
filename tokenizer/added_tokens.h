// Finds added tokens ("<|im_start|>") in text.
#pragma once

#include <array>
#include <cstddef>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace thaw {

class AddedTokens {
 public:
  struct Match {
    std::size_t begin = std::string_view::npos;  // npos: there is none
    std::size_t bytes = 0;
    TokenId id = -1;
  };

  // The texts outlive this object; each is there once, none is empty.
  explicit AddedTokens(std::vector<std::pair<std::string_view, TokenId>> tokens);

  // The leftmost token in text[from..], and the longest of those that start there.
  Match find(std::string_view text, std::size_t from) const;

 private:
  Match match_at(std::string_view text, std::size_t at) const;

  std::vector<std::pair<std::string_view, TokenId>> tokens_;  // sorted by text
  std::array<bool, 256> starts_{};  // whether a token starts with the byte
};

}  // namespace thaw
