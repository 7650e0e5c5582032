// The flags of one command, declared once: they parse the command line, check every value, and
// print the help page.
#pragma once

#include <charconv>
#include <cmath>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include "device/error.h"

namespace thaw {

// The number that all of `text` spells, or nothing. No spaces, no leading +, no NaN, no infinity.
template <class T>
std::optional<T> parse_number(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return {};
  if constexpr (std::is_floating_point_v<T>) {
    if (!std::isfinite(value)) return {};
  }
  return value;
}

// The one of `candidates` that `word` is most likely a slip for, or "".
std::string closest(std::string_view word, const std::vector<std::string>& candidates);

class Flags {
 public:
  // usage: what follows "thaw COMMAND" in the first line of the help page.
  Flags(std::string command, std::string usage, std::string summary);

  // Names are one long and at most one short one: "-n, --tokens" or "--temp". A flag given twice
  // counts as given last. Targets must outlive parse(); their values then are the defaults that the
  // help page shows (an empty optional shows none).
  void section(std::string title);
  void toggle(bool& value, std::string names, std::string help);
  void text(std::optional<std::string>& value, std::string names, std::string placeholder,
            std::string help);
  void texts(std::vector<std::string>& value, std::string names, std::string placeholder,
             std::string help);  // may be repeated
  void choice(std::string& value, std::string names, std::vector<std::string> choices,
              std::string help);
  template <class T>  // T: an integer type, or std::optional of one
  void integer(T& value, std::string names, std::string help, std::int64_t min, std::int64_t max);
  void seed(std::optional<std::uint64_t>& value, std::string names, std::string help);
  void real(float& value, std::string names, std::string help, std::string expected,
            std::function<bool(double)> accepts);
  // Lets "-" stand among the flags.
  void dash(bool& value);
  // Closes the list of flags with --help, and the help page with these lines.
  void examples(std::string text);

  // False when help was asked for; it has been printed. Throws UsageError.
  bool parse(const std::vector<std::string>& args);
  std::string help() const;

 private:
  struct Flag {
    std::string section, short_name, long_name;
    std::string placeholder;  // empty: takes no value
    std::string help;
    std::string expected;                       // what a value must be; for messages
    std::function<bool(std::string_view)> set;  // false: not that
  };
  Flag& add(std::string names, std::string placeholder, std::string help);
  const Flag& find(const std::string& name, const std::string& arg) const;

  std::string command_, usage_, summary_, section_ = "Options", examples_;
  std::vector<Flag> flags_;
  bool* dash_ = nullptr;
  bool help_wanted_ = false;
};

template <class T>
void Flags::integer(T& value, std::string names, std::string help, std::int64_t min,
                    std::int64_t max) {
  constexpr bool kOptional = !std::is_integral_v<T>;
  if constexpr (!kOptional) help += join(" (default ", value, ")");
  Flag& flag = add(std::move(names), "N", std::move(help));
  flag.expected = join("a whole number from ", min, " to ", max);
  flag.set = [&value, min, max](std::string_view text) {
    const auto number = parse_number<std::int64_t>(text);
    if (!number || *number < min || *number > max) return false;
    value = static_cast<int>(*number);
    return true;
  };
}

}  // namespace thaw
