// Runs the thaw binary as a shell would.
#pragma once

#include <csignal>
#include <functional>
#include <string>
#include <vector>

namespace thaw::testing {

struct RunResult {
  int exit_code = -1;  // 128 + signal when a signal ended it
  std::string out;
  std::string err;
};

struct RunOptions {
  std::string input = "";    // its standard input, then end of file; at most 64 KiB
  int interrupt_after = -1;  // `signal` once there are more bytes than this on standard output
  int signal = SIGINT;
  std::string stdout_path = "";  // "": captured; "closed": not open; else this file
};

// $THAW_BIN, or `thaw` beside the test binary.
std::string thaw_binary();
RunResult run_thaw(const std::vector<std::string>& args, const RunOptions& options = {});

// Runs it in a terminal (a pty): each step waits until `shown` has appeared since the step before,
// and then does `first`, makes the window `columns` wide, and types `keys`. Returns all that the
// terminal showed, as `out`. A step that waits in vain ends it after a minute.
struct Keys {
  std::string shown, keys;
  std::function<void()> first = [] {};
  unsigned short columns = 0;  // 0: as wide as before
};
RunResult run_thaw_in_terminal(const std::vector<std::string>& args,
                               const std::vector<Keys>& steps);

}  // namespace thaw::testing
