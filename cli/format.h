// Numbers for people, documents for programs.
#pragma once

#include <cstdint>
#include <iomanip>
#include <nlohmann/json_fwd.hpp>
#include <sstream>
#include <string>
#include <utility>

namespace thaw {

// With so many digits after the point.
inline std::string fixed(double value, int digits) {
  std::ostringstream out;
  out << std::fixed << std::setprecision(digits) << value;
  return std::move(out).str();
}

// 16 hexadecimal digits.
inline std::string hex(std::uint64_t value) {
  std::ostringstream out;
  out << std::hex << std::setw(16) << std::setfill('0') << value;
  return std::move(out).str();
}

// "1 token", "2 tokens"
inline std::string count(std::int64_t n, const std::string& noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

// One line; bytes that are not UTF-8 become U+FFFD.
std::string json_line(const nlohmann::ordered_json& document);

// "1.5 GiB"
inline std::string format_bytes(std::int64_t bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  for (; value >= 1023.95; ++unit) value /= 1024;
  return fixed(value, unit == 0 ? 0 : 1) + " " + kUnits[unit];
}

}  // namespace thaw
