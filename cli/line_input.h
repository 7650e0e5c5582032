// Lines that a person types, or that a pipe holds.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace thaw {

// Where the lines of earlier chats are kept: thaw/chat_history in $XDG_STATE_HOME or
// ~/.local/state; empty when neither is known.
std::filesystem::path default_history();

// Standard input, line by line. When it and standard error are terminals, lines are edited
// (libedit; ~/.editrc is honoured), those of earlier runs come back with the arrow keys, and what
// is pasted is part of one line, also where it has several.
class LineInput {
 public:
  enum class State { kLine, kEnd, kInterrupted };

  // history: a file that nobody but the user can read; empty: none. Throws Error where there is a
  // file that is none.
  explicit LineInput(const std::filesystem::path& history);
  ~LineInput();  // writes the history, where it can

  bool is_terminal() const { return editor_ != nullptr; }

  // Puts the next line into `line`, without its end, after `prompt` on a terminal. kInterrupted:
  // Ctrl-C, after catch_interrupt(). Throws Error when standard input cannot be read, or a line is
  // longer than kMaxInput (cli/input.h).
  State read(const char* prompt, std::string& line);
  void drop() { held_.clear(), used_ = 0; }  // what was typed or pasted ahead

 private:
  class Editor;
  friend class Editor;

  // The next byte; none at the end, or when interrupted.
  std::optional<char> next_byte();
  bool fill();                          // reads more; likewise false
  bool takes(std::string_view marker);  // whether it came next, and then it is taken
  State read_plain(std::string& line);

  std::string held_;          // bytes that were read,
  std::size_t used_ = 0;      // of which so many were asked for
  bool interrupted_ = false;  // in the line that is read
  std::unique_ptr<Editor> editor_;
};

}  // namespace thaw
