// The one error type. Every failure that a user can cause ends as one line on stderr, so a message
// names the file, the field, what was expected, and what was found. `main` catches and prints it.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>

namespace thaw {

// A failure: exit code 1.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A wrong command line: exit code 2.
struct UsageError : Error {
  using Error::Error;
};

// A device that failed. Its context is broken: whoever goes on after other errors ends with this.
struct DeviceError : Error {
  using Error::Error;
};

// Joins its arguments as operator<< prints them.
template <class... Parts>
std::string join(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

// Throws Error with the joined arguments: fail(path, ": version: expected 2 or 3, found ", v).
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw Error(join(parts...));
}

// Text from a file, fit for a message: at most `limit` bytes, all but printable ASCII as \xNN.
inline std::string printable(std::string_view text, std::size_t limit = 60) {
  constexpr char kHex[] = "0123456789abcdef";
  std::string out;
  for (const char c : text.substr(0, limit)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte >= 0x20 && byte < 0x7f) {
      out += c;
    } else {
      out += {'\\', 'x', kHex[byte >> 4], kHex[byte & 15]};
    }
  }
  return text.size() > limit ? out + "..." : out;
}

// Text that the user gave, such as a path, on one line: control characters as \xNN.
inline std::string one_line(std::string_view text) {
  std::string out;
  for (const char c : text) {
    const bool control = static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
    out += control ? printable({&c, 1}) : std::string(1, c);
  }
  return out;
}

// A shape in a comment is also a check in code: require(x.cols == dim, "x.cols: expected ", dim,
// ...).
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (!holds) fail(parts...);
}

}  // namespace thaw
