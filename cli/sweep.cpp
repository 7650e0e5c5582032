#include "cli/sweep.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace thaw {
namespace {

constexpr std::size_t kMaxPoints = 256;  // each has a KV store in memory

void add_axis(Sweep& sweep, const std::string& word) {
  const std::size_t cut = word.find('=');
  const std::string name = word.substr(0, cut);
  const std::vector<std::string> values =
      cut == std::string::npos ? std::vector<std::string>() : split(word.substr(cut + 1), ',');
  if (name.empty() || values.empty() || std::find(values.begin(), values.end(), "") != values.end())
    throw UsageError(join("--sweep: expected NAME=VALUE,VALUE,..., found ", printable(word)));
  if (std::find(sweep.names.begin(), sweep.names.end(), name) != sweep.names.end())
    throw UsageError(join("--sweep: expected each name once, found ", printable(name), " again"));
  if (values.size() > kMaxPoints / sweep.points.size())
    throw UsageError(join("--sweep: expected at most ", kMaxPoints, " combinations, found more"));
  sweep.names.push_back(name);
  std::vector<std::vector<std::string>> points;
  for (const std::vector<std::string>& point : sweep.points) {
    for (const std::string& value : values) {
      points.push_back(point);
      points.back().push_back(value);
    }
  }
  sweep.points = std::move(points);
}

std::string csv_field(const nlohmann::ordered_json& value) {
  if (!value.is_string()) return value.dump();
  std::string text = value.get<std::string>();
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  for (std::size_t at = 0; (at = text.find('"', at)) != std::string::npos; at += 2)
    text.insert(at, 1, '"');
  return '"' + text + '"';
}

}  // namespace

Sweep parse_sweep(const std::vector<std::string>& words) {
  Sweep sweep{{}, {{}}};
  for (const std::string& word : words) add_axis(sweep, word);
  return sweep;
}

CommonOptions at_point(const CommonOptions& base, const Sweep& sweep, std::size_t point) {
  CommonOptions options = base;
  Flags flags("", "", "");
  add_kv_flags(flags, options.kv);
  std::vector<std::string> args;
  for (std::size_t i = 0; i < sweep.names.size(); ++i)
    args.push_back(join("--", sweep.names[i], "=", sweep.points[point][i]));
  flags.parse(args);
  return options;
}

std::string to_csv(const std::vector<nlohmann::ordered_json>& rows) {
  std::string out;
  for (const auto& [key, value] : rows.front().items())
    out += join(out.empty() ? "" : ",", csv_field(key));
  out += '\n';
  for (const nlohmann::ordered_json& row : rows) {
    std::string line;
    for (const auto& [key, value] : row.items())
      line += join(line.empty() ? "" : ",", csv_field(value));
    out += line + '\n';
  }
  return out;
}

}  // namespace thaw
