// JSON from files that may be hostile.
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

namespace thaw {

// Parses one JSON document. Throws Error naming `source` on more than max_bytes of text, broken
// JSON, a key that stands twice in an object, or nesting deeper than 64.
nlohmann::json parse_json(std::string_view text, const std::string& source,
                          std::size_t max_bytes = std::size_t{16} << 20);

}  // namespace thaw
