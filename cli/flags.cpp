#include "cli/flags.h"

#include <algorithm>
#include <cctype>
#include <numeric>
#include <sstream>
#include <utility>

#include "cli/output_file.h"
#include "cli/terminal.h"

namespace thaw {
namespace {

constexpr std::size_t kWidth = 98;       // of a help page
constexpr std::size_t kHelpColumn = 31;  // where the help of a flag begins

// Flags of llama.cpp, and what they are called here.
constexpr std::pair<const char*, const char*> kElsewhere[] = {
    {"--n-predict", "--max-tokens"}, {"--predict", "--max-tokens"}, {"--ctx-size", "--context"}};

// Insertions, deletions, replacements and swaps of neighbours that turn a into b (optimal string
// alignment distance).
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  std::iota(d[0].begin(), d[0].end(), std::size_t{0});
  for (std::size_t i = 1; i <= a.size(); ++i) {
    d[i][0] = i;
    for (std::size_t j = 1; j <= b.size(); ++j) {
      d[i][j] =
          std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

bool is_one_of(const std::string& text, const std::vector<std::string>& choices) {
  return std::find(choices.begin(), choices.end(), text) != choices.end();
}

// Appends `text` in lines that fit, each but the first indented.
void wrap(std::string& out, const std::string& text, std::size_t indent, std::size_t column) {
  std::istringstream words(text);
  bool first = true;
  for (std::string word; words >> word; first = false) {
    if (!first && column + 1 + word.size() > kWidth) {
      out.append(1, '\n').append(indent, ' ');
      column = indent;
    } else if (!first) {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
  }
  out += '\n';
}

}  // namespace

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

std::string joined(const std::vector<std::string>& parts, const char* separator) {
  std::string out;
  for (const std::string& part : parts) out += join(out.empty() ? "" : separator, part);
  return out;
}

std::string closest(std::string_view word, const std::vector<std::string>& candidates) {
  if (word.size() > 40) return "";
  std::string best;
  const std::size_t letters = word.size() - std::min(word.find_first_not_of('-'), word.size());
  std::size_t least = letters <= 4 ? 2 : 3;  // more slips than that are another word
  for (const std::string& candidate : candidates) {
    const std::size_t distance = edit_distance(word, candidate);
    if (distance < least) least = distance, best = candidate;
  }
  if (!best.empty()) return best;
  for (const std::string& candidate : candidates) {  // cut short, or with more at its end
    const std::size_t common = std::min(word.size(), candidate.size());
    if (common >= 4 && word.substr(0, common) == candidate.substr(0, common)) return candidate;
  }
  return "";
}

Flags::Flags(Text command, Text usage, Text summary)
    : usage_("thaw " + command + " " + usage), summary_(summary) {}

void Flags::section(Text title) { section_ = title; }
void Flags::dash(bool& value) { dash_ = &value; }

void Flags::examples(Text text) {
  toggle(help_wanted_, "-h, --help", "print this page");
  examples_ = text;
}

void Flags::add(Text names, Text placeholder, Text help, Text expected,
                const std::function<bool(Text)>& set) {
  const std::size_t at = names.find("--");
  flags_.push_back({section_, names.substr(0, at > 0 ? 2 : 0), names.substr(at), placeholder, help,
                    expected, set});
}

void Flags::toggle(bool& value, Text names, Text help) {
  add(names, "", help, "", [&value](Text) { return value = true; });
}

void Flags::text(std::optional<std::string>& value, Text names, Text placeholder, Text help) {
  add(names, placeholder, help, "", [&value](Text s) { return (value = s).has_value(); });
}

void Flags::texts(std::vector<std::string>& value, Text names, Text placeholder, Text help) {
  add(names, placeholder, help, "", [&value](Text s) {
    value.push_back(s);
    return true;
  });
}

void Flags::path(std::optional<std::string>& value, Text names, Text placeholder, Text help) {
  text(
      value, names, placeholder, help, [](Text s) { return !s.empty(); }, "a path");
  is_path(value, names, false);
}

void Flags::output(std::optional<std::string>& value, Text names, Text placeholder, Text help) {
  path(value, names, placeholder, help);
  paths_.back().is_written = true;
}

void Flags::is_path(const std::optional<std::string>& value, Text names, bool is_written) {
  paths_.push_back({names.substr(names.find("--")), value, is_written});
}

void Flags::check_paths() const {
  for (std::size_t i = 0; i < paths_.size(); ++i) {
    for (std::size_t j = 0; j < i; ++j) {
      const Path &a = paths_[j], &b = paths_[i];
      if ((a.is_written || b.is_written) && a.value && b.value)
        require_two_files(a.long_name, *a.value, b.long_name, *b.value);
    }
  }
}

void Flags::choice(std::string& value, Text names, const std::vector<std::string>& choices,
                   Text help) {
  const std::string list = joined(choices, "|");
  add(names, list, help + " (default " + value + ")", choices.size() == 1 ? list : "one of " + list,
      [&value, choices](Text s) { return value = s, is_one_of(s, choices); });
}

void Flags::choice(std::optional<std::string>& value, Text names,
                   const std::vector<std::string>& choices, Text help) {
  const std::string list = joined(choices, "|");
  text(
      value, names, list, help, [choices](Text s) { return is_one_of(s, choices); },
      "one of " + list);
}

void Flags::choices(std::vector<std::string>& values, Text names,
                    const std::vector<std::string>& choices, Text help) {
  const std::string list = joined(choices, "|");
  const std::string shown = values.empty() ? "" : " (default " + joined(values, ",") + ")";
  add(names, "LIST", help + shown, "some of " + list + " between commas",
      [&values, choices](Text s) {
        values = split(s, ',');
        return std::all_of(values.begin(), values.end(),
                           [&](const std::string& value) { return is_one_of(value, choices); });
      });
}

void Flags::integers(std::vector<int>& values, Text names, Text help, int min, int max) {
  std::vector<std::string> shown;
  for (const int value : values) shown.push_back(std::to_string(value));
  add(names, "LIST", help + " (default " + joined(shown, ",") + ")",
      join("whole numbers from ", min, " to ", max, " between commas"),
      [&values, min, max](Text s) {
        values.clear();
        for (const std::string& part : split(s, ',')) {
          const auto number = parse_number<int>(part);
          if (!number || *number < min || *number > max) return false;
          values.push_back(*number);
        }
        return true;
      });
}

void Flags::seed(std::optional<std::uint64_t>& value, Text names, Text help) {
  add(names, "N", help, "a whole number from 0 to 18446744073709551615",
      [&value](Text s) { return (value = parse_number<std::uint64_t>(s)).has_value(); });
}

void Flags::text(std::optional<std::string>& value, Text names, Text placeholder, Text help,
                 const std::function<bool(Text)>& accepts, Text expected) {
  add(names, placeholder, help, expected, [&value, accepts](Text s) {
    value = s;
    return accepts(s);
  });
}

void Flags::bytes(std::optional<std::int64_t>& value, Text names, Text help) {
  add(names, "N", help, "a whole number of bytes above 0, such as 65536, 64K, 16M or 2G",
      [&value](Text s) {
        const std::size_t unit = s.empty() ? 0 : std::string("KMG").find(s.back()) + 1;
        const auto number = parse_number<std::int64_t>(
            std::string_view(s).substr(0, s.size() - (unit > 0 ? 1 : 0)));
        std::int64_t total = 0;
        if (!number || *number <= 0 ||
            __builtin_mul_overflow(*number, std::int64_t{1} << (10 * unit), &total))
          return false;
        value = total;
        return true;
      });
}

const Flags::Flag& Flags::find(const std::string& name, const std::string& arg) const {
  std::vector<std::string> names;
  for (const Flag& flag : flags_) {
    if (name == flag.long_name || name == flag.short_name) return flag;
    names.push_back(flag.long_name);
  }
  std::string wanted = arg.starts_with("--") ? name : "-" + arg;
  for (const auto& [elsewhere, here] : kElsewhere)
    if (wanted == elsewhere) wanted = here;
  const std::string guess = closest(wanted, names);
  throw UsageError(join("unknown flag ", printable(arg.starts_with("--") ? name : arg),
                        guess.empty() ? "" : " (did you mean " + guess + "?)"));
}

bool Flags::parse(const std::vector<std::string>& args) {
  for (std::size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg == "-" && dash_) {
      *dash_ = true;
      continue;
    }
    if (arg.size() < 2 || arg[0] != '-') {
      throw UsageError(join("unexpected argument \"", printable(arg), "\"; usage: ", usage_));
    }
    // --name, --name=value, -n, -nvalue; and -name, which is a slip for --name.
    const bool is_long = arg[1] == '-';
    const std::size_t cut = is_long ? arg.find('=') : 2;
    const bool slip = !is_long && arg.size() > 3 &&
                      std::any_of(flags_.begin(), flags_.end(),
                                  [&](const Flag& flag) { return flag.long_name == "-" + arg; });
    const Flag& flag = find(slip ? arg : arg.substr(0, cut), arg);
    std::string value;
    const bool attached = is_long ? cut != std::string::npos : arg.size() > 2;
    if (flag.placeholder.empty()) {
      if (attached) throw UsageError(join(flag.long_name, " takes no value: ", printable(arg)));
    } else if (attached) {
      value = arg.substr(is_long ? cut + 1 : cut);
    } else if (++i < args.size()) {
      value = args[i];
    } else {
      throw UsageError(join(arg, " needs a value: ", flag.placeholder));
    }
    if (!flag.set(value)) {
      if (!is_long && attached && std::isalpha(static_cast<unsigned char>(value[0])))
        throw UsageError(join("unknown flag ", printable(arg), ", and ", flag.long_name,
                              ": expected ", flag.expected, ", found \"", printable(value), "\""));
      throw UsageError(
          join(flag.long_name, ": expected ", flag.expected, ", found \"", printable(value), "\""));
    }
    if (help_wanted_) {
      write_stdout(help());
      return false;
    }
  }
  check_paths();
  return true;
}

std::string Flags::help() const {
  std::string out;
  wrap(out, "Usage: " + usage_, 7, 0);
  out += '\n';
  wrap(out, summary_, 0, 0);
  std::string section;
  for (const Flag& flag : flags_) {
    if (flag.section != section) out += join("\n", section = flag.section, ":\n");
    std::string left = flag.short_name.empty() ? "      " : join("  ", flag.short_name, ", ");
    left += flag.long_name + (flag.placeholder.empty() ? "" : " " + flag.placeholder);
    left += left.size() + 2 > kHelpColumn ? "\n" + std::string(kHelpColumn, ' ')
                                          : std::string(kHelpColumn - left.size(), ' ');
    out += left;
    wrap(out, flag.help, kHelpColumn, kHelpColumn);
  }
  return out + "\nExamples:\n" + examples_;
}

}  // namespace thaw
