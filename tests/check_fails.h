// A command line that must fail as it should.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/run_thaw.h"

namespace thaw::testing {

// Fails with `exit_code`, nothing on standard output, and one line that contains `message`.
inline void check_fails(const std::vector<std::string>& args, int exit_code,
                        const std::string& message, const std::string& input = "") {
  const RunResult r = run_thaw(args, {.input = input});
  std::string line;
  for (const std::string& arg : args) line += " " + arg;
  CAPTURE(line);
  CAPTURE(r.err);
  CHECK(r.exit_code == exit_code);
  CHECK(r.out.empty());
  CHECK(r.err.starts_with("thaw: "));
  CHECK(std::count(r.err.begin(), r.err.end(), '\n') == 1);
  CHECK(r.err.find(message) != std::string::npos);
  if (exit_code == 2) CHECK(r.err.find("; see 'thaw ") != std::string::npos);
}

}  // namespace thaw::testing
