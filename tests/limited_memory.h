// Runs something with little memory left.
#pragma once

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>

#include "tests/sanitized.h"

namespace thaw::testing {

// Whether action() returns true in a child process that may allocate 64 MB and run 5 seconds.
// (AddressSanitizer reserves terabytes of addresses, so only time is limited there; it has its own
// limit for one allocation.)
template <class Action>
bool holds_in_64mb(Action&& action) {
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit seconds{5, 5};
    ::setrlimit(RLIMIT_CPU, &seconds);
    const rlimit bytes{64 << 20, 64 << 20};
    if (!sanitized()) ::setrlimit(RLIMIT_DATA, &bytes);
    bool holds = false;
    try {
      holds = action();
    } catch (...) {
    }
    ::_exit(holds ? 0 : 1);
  }
  int status = 1;
  return child > 0 && ::waitpid(child, &status, 0) == child && WIFEXITED(status) &&
         WEXITSTATUS(status) == 0;
}

}  // namespace thaw::testing
