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

// The parts between separators; one, empty, of an empty text.
std::vector<std::string> split(const std::string& text, char separator);

std::string joined(const std::vector<std::string>& parts, const char* separator);

// The one of `candidates` that `word` is most likely a slip for, or "".
std::string closest(std::string_view word, const std::vector<std::string>& candidates);

class Flags {
 public:
  using Text = const std::string&;

  // usage: what follows "thaw COMMAND" in the first line of the help page.
  Flags(Text command, Text usage, Text summary);

  // Names are one long and at most one short one: "-n, --tokens" or "--temp". A flag given twice
  // counts as given last. Targets must outlive parse(); their values then are the defaults that the
  // help page shows (an empty optional shows none).
  void section(Text title);
  void toggle(bool& value, Text names, Text help);
  void text(std::optional<std::string>& value, Text names, Text placeholder, Text help);
  void text(std::optional<std::string>& value, Text names, Text placeholder, Text help,
            const std::function<bool(Text)>& accepts, Text expected);
  void path(std::optional<std::string>& value, Text names, Text placeholder, Text help);
  // A path of what is written: parse() refuses one that another flag names, too.
  void output(std::optional<std::string>& value, Text names, Text placeholder, Text help);
  // Says of a text that it is such a path, or one of what is only read.
  void is_path(const std::optional<std::string>& value, Text names, bool is_written);
  void texts(std::vector<std::string>& value, Text names, Text placeholder, Text help);  // repeated
  void choice(std::string& value, Text names, const std::vector<std::string>& choices, Text help);
  void choice(std::optional<std::string>& value, Text names,
              const std::vector<std::string>& choices, Text help);
  // Values between commas, one or more.
  void choices(std::vector<std::string>& values, Text names,
               const std::vector<std::string>& choices, Text help);
  void integers(std::vector<int>& values, Text names, Text help, int min, int max);
  template <class T>  // T: an integer type, or std::optional of one
  void integer(T& value, Text names, Text help, std::int64_t min, std::int64_t max);
  void seed(std::optional<std::uint64_t>& value, Text names, Text help);
  template <class T>  // T: float, or std::optional of it
  void real(T& value, Text names, Text help, Text expected,
            const std::function<bool(double)>& accepts);
  void bytes(std::optional<std::int64_t>& value, Text names, Text help);  // 4096, 64M, 2G
  // Lets "-" stand among the flags.
  void dash(bool& value);
  // Closes the list of flags with --help, and the help page with these lines.
  void examples(Text text);

  // False when help was asked for; it has been printed. Throws UsageError.
  bool parse(const std::vector<std::string>& args);

 private:
  struct Flag {
    std::string section, short_name, long_name, placeholder, help, expected;
    std::function<bool(Text)> set;
  };
  // Without a placeholder it takes no value. `set` is false for a value that is not `expected`.
  void add(Text names, Text placeholder, Text help, Text expected,
           const std::function<bool(Text)>& set);
  const Flag& find(const std::string& name, const std::string& arg) const;
  void check_paths() const;
  std::string help() const;

  std::string usage_, summary_, section_ = "Options", examples_;
  std::vector<Flag> flags_;
  struct Path {
    std::string long_name;
    const std::optional<std::string>& value;
    bool is_written;
  };
  std::vector<Path> paths_;
  bool* dash_ = nullptr;
  bool help_wanted_ = false;
};

template <class T>
void Flags::integer(T& value, Text names, Text help, std::int64_t min, std::int64_t max) {
  constexpr bool kOptional = !std::is_integral_v<T>;
  std::string shown = help;
  if constexpr (!kOptional) shown += join(" (default ", value, ")");
  add(names, "N", shown, join("a whole number from ", min, " to ", max),
      [&value, min, max](Text s) {
        const auto number = parse_number<std::int64_t>(s);
        if (!number || *number < min || *number > max) return false;
        value = static_cast<int>(*number);
        return true;
      });
}

template <class T>
void Flags::real(T& value, Text names, Text help, Text expected,
                 const std::function<bool(double)>& accepts) {
  std::string shown = help;
  if constexpr (std::is_floating_point_v<T>) shown += join(" (default ", value, ")");
  add(names, "X", shown, expected, [&value, accepts](Text s) {
    const auto number = parse_number<float>(s);
    if (!number || !accepts(*number)) return false;
    value = *number;
    return true;
  });
}

}  // namespace thaw
