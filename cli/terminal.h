// Standard output, standard error and Ctrl-C.
#pragma once

#include <atomic>
#include <functional>
#include <string>
#include <string_view>

namespace thaw {

// Makes sure that descriptors 0, 1 and 2 are open, so that no file can take the place of a closed
// one, and that writing to a closed pipe or beyond `ulimit -f` is an error and not a signal. Called
// once, first of all.
void prepare_standard_streams();

// Writes all of `text` to standard output, at once. Throws Error when it cannot.
void write_stdout(std::string_view text);

// The same after write_files(), which may throw: what was computed is shown all the same.
void write_stdout_after(const std::function<void()>& write_files, std::string_view text);

bool stdin_is_terminal();
bool stdout_is_terminal();
bool stderr_is_terminal();

// From now on Ctrl-C (SIGINT) sets the returned flag, which this clears. The one that is number
// `deadly` ends the process, as the one before it says where that is not the first; 0: none does.
const std::atomic<bool>& catch_interrupt(int deadly = 2);

// From now on the first SIGHUP, SIGQUIT or SIGTERM, unless it is ignored, sets that flag for good:
// for who has something to save. A second one ends the process. ended_by(): which came, or 0.
void catch_end();
int ended_by();

// Waits until standard input can be read, or Ctrl-C comes, or came, or a signal of EditSignals.
enum class Ready { kInput, kInterrupted, kSignal };
Ready wait_for_stdin();

// While a line is edited: Ctrl-Z (SIGTSTP, unless it is ignored) waits until the editor has left
// the terminal as it was, and the editor learns of windows that change (SIGWINCH).
class EditSignals {
 public:
  EditSignals();
  ~EditSignals();
  EditSignals(const EditSignals&) = delete;
  EditSignals& operator=(const EditSignals&) = delete;

  static int take();      // which came since, Ctrl-Z first; 0: none
  static void suspend();  // what Ctrl-Z does; returns when the program goes on
};

// One line on standard error that is written over; gone when this is. Nothing at all when standard
// error is no terminal, or quiet.
class Progress {
 public:
  explicit Progress(bool quiet);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(const std::string& line);
  void clear();

 private:
  bool enabled_;
  bool shown_ = false;
};

}  // namespace thaw
