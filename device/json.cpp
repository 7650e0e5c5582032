#include "device/json.h"

#include <nlohmann/json.hpp>
#include <set>
#include <vector>

#include "device/error.h"

namespace thaw {
namespace {

constexpr std::size_t kMaxDepth = 64;

// Watches the parser's events: `keys` holds one set for every object or array that is open.
class Guard {
 public:
  explicit Guard(const std::string& source) : source_(source) {}

  bool operator()(nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      require(keys_.size() < kMaxDepth, source_, ": JSON nesting: expected at most ", kMaxDepth,
              " levels, found more");
      keys_.emplace_back();
    } else if (event == Event::object_end || event == Event::array_end) {
      keys_.pop_back();
    } else if (event == Event::key) {
      const auto& key = parsed.get_ref<const std::string&>();
      require(keys_.back().insert(key).second, source_, ": ", printable(key),
              ": expected the key once, found it twice");
    }
    return true;
  }

 private:
  const std::string& source_;
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& source, std::size_t max_bytes) {
  require(text.size() <= max_bytes, source, ": size: expected at most ", max_bytes,
          " bytes of JSON, found ", text.size());
  Guard guard(source);
  try {
    return nlohmann::json::parse(
        text, [&](int, nlohmann::json::parse_event_t event, const nlohmann::json& parsed) {
          return guard(event, parsed);
        });
  } catch (const nlohmann::json::parse_error& e) {
    const std::size_t at = e.byte > 0 ? e.byte - 1 : 0;
    if (at >= text.size()) fail(source, ": expected JSON, found its end after byte ", text.size());
    fail(source, ": byte ", at, ": expected JSON, found \"", printable(text.substr(at), 24), "\"");
  } catch (const nlohmann::json::exception& e) {
    fail(source, ": expected JSON, found ", printable(e.what(), 120));
  }
}

}  // namespace thaw
