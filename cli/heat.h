// Text for a terminal, each token coloured by how long it was hot.
#pragma once

#include <span>
#include <string>

namespace thaw {

// texts: of the tokens, safe to print (cli/token_text.h). hot: share of its life in which each was
// hot, 0 .. 1. Returns the text in colours of the 256-colour palette between a legend and a
// newline.
std::string heat_text(std::span<const std::string> texts, std::span<const double> hot);

}  // namespace thaw
