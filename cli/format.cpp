#include "cli/format.h"

#include <nlohmann/json.hpp>

namespace thaw {

std::string json_line(const nlohmann::ordered_json& document) {
  return document.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

}  // namespace thaw
