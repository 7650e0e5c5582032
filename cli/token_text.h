// Tokens as text that is safe to show one by one.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace thaw {

// One text a token, valid UTF-8: control tokens by name; control characters but newline and tab,
// characters that change the direction of text, and bytes that are no UTF-8 as \xNN. A character
// that is spread over several tokens stands whole at the first of them, and the others are "".
std::vector<std::string> token_texts(const Tokenizer& tokenizer, std::span<const TokenId> tokens);

// The same of texts that are given as bytes.
std::vector<std::string> readable_pieces(std::span<const std::string> pieces);

}  // namespace thaw
