// Bytes of tokens in, text fit for a terminal out.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace thaw {

// Bytes at the end of `text` that begin a UTF-8 character and do not finish it: 0 .. 3.
std::size_t unfinished_utf8(std::string_view text);

// Passes bytes on in whole UTF-8 characters, and holds back what could still become a stop string.
// Invalid UTF-8 passes unchanged. What is emitted, joined, does not depend on how the bytes were
// cut.
class TextStream {
 public:
  using Emit = std::function<void(std::string_view)>;

  // Empty stop strings are ignored.
  TextStream(std::vector<std::string> stops, Emit emit);

  // Returns false once a stop string was completed (the first to be completed; the longest, if
  // several are at once). What precedes it has then been emitted; the rest never is.
  bool feed(std::string_view bytes);

  // Emits what is held back, as it is: a character cut in the middle stays cut.
  void finish();

 private:
  void emit_front(std::size_t n);
  std::size_t longest_stop_at_end() const;
  std::size_t possible_stop_at_end() const;

  std::vector<std::string> stops_;
  Emit emit_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace thaw
