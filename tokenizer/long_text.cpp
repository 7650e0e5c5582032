#include "tokenizer/long_text.h"

#include <algorithm>

#include "tokenizer/utf8.h"

namespace thaw {

void split_long_text(std::string_view text, std::size_t max_part, std::size_t max_run,
                     const std::function<void(std::string_view)>& sink) {
  if (max_part == 0 || max_run == 0 || text.size() <= std::min(max_part, max_run)) {
    return sink(text);
  }
  std::size_t begin = 0;    // of the part, in bytes
  std::size_t in_part = 0;  // code points since the last cut by max_part
  std::size_t run = 0;      // code points of the same kind up to here
  bool run_is_space = false;
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    const bool space = c.bytes > 0 && is_space(c.value);
    if (in_part == max_part) {
      sink(text.substr(begin, at - begin));
      begin = at;
      in_part = run = 0;
    }
    if (run == 0 || space != run_is_space) {
      run = 1;
      run_is_space = space;
    } else if (++run > max_run) {
      sink(text.substr(begin, at - begin));
      begin = at;
      run = 1;
    }
    ++in_part;
    at += std::max<std::size_t>(c.bytes, 1);
  }
  sink(text.substr(begin));
}

}  // namespace thaw
