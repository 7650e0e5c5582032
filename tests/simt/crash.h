// Tests of what ends the process: a case marked doctest::skip() is run in a process of its own.
#pragma once

#include <unistd.h>

#include <array>
#include <cstdio>
#include <string>

namespace simt {

// Everything that this program prints when it runs only the skipped test case `name`, and in the
// end "exit N".
inline std::string output_of(const std::string& name) {
  std::array<char, 4096> path = {};
  if (readlink("/proc/self/exe", path.data(), path.size() - 1) < 0) return "";
  const std::string command =
      std::string(path.data()) + " --no-skip --test-case='" + name + "' 2>&1";
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return "";
  std::string output;
  std::array<char, 4096> part;
  while (const std::size_t n = fread(part.data(), 1, part.size(), pipe))
    output.append(part.data(), n);
  const int status = pclose(pipe);
  return output + "exit " + std::to_string(WIFEXITED(status) ? WEXITSTATUS(status) : -1);
}

inline bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) std::fprintf(stderr, "expected '%s' in:\n%s\n", part.c_str(), text.c_str());
  return found;
}

}  // namespace simt
