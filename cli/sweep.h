// One command, run for every combination of some flags' values.
#pragma once

#include <string>
#include <vector>

#include "cli/format.h"
#include "cli/options.h"

namespace thaw {

struct Sweep {
  std::vector<std::string> names;                // of flags, without dashes: "kv-type"
  std::vector<std::vector<std::string>> points;  // values, one for each name
};

// Each word is NAME=VALUE,VALUE,...; the first name's values change last. No words: one point
// without values. Throws UsageError that names --sweep.
Sweep parse_sweep(const std::vector<std::string>& words);

// `base` with the point's values, as if these had been given as flags of the KV store. Throws
// UsageError where a flag of the command line would be refused.
CommonOptions at_point(const CommonOptions& base, const Sweep& sweep, std::size_t point);

// Comma-separated values (RFC 4180, but lines end in \n): the keys of the first row, then the
// values of every row, all objects with the same keys.
std::string to_csv(const std::vector<nlohmann::ordered_json>& rows);

}  // namespace thaw
