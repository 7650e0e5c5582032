// Cuts a long text into the parts that Meta's reader of tiktoken files encodes one by one.
#pragma once

#include <cstddef>
#include <functional>
#include <string_view>

namespace thaw {

// As llama_models/llama3/tokenizer.py: `text` is cut every max_part code points, and each of those
// parts again before a run of white space, or of anything else, would grow beyond max_run code
// points. 0 means no limit. A byte that is not UTF-8 counts as one code point that is not white
// space.
void split_long_text(std::string_view text, std::size_t max_part, std::size_t max_run,
                     const std::function<void(std::string_view)>& sink);

}  // namespace thaw
