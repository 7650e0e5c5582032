#include "cli/freeze_map_page.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <string_view>

#include "cli/format.h"
#include "device/error.h"
#include "device/half.h"

namespace thaw {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::string_view kPage =
#include "cli/freeze_map/page.html.inc"
    ;
constexpr std::string_view kScripts[] = {
#include "cli/freeze_map/data.js.inc"
    ,
#include "cli/freeze_map/page.js.inc"
    ,
#include "cli/freeze_map/map.js.inc"
};

std::string base64(std::string_view bytes) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const std::size_t n = std::min<std::size_t>(3, bytes.size() - i);
    std::uint32_t group = 0;
    for (std::size_t j = 0; j < 3; ++j) {
      group = group << 8 | (j < n ? static_cast<unsigned char>(bytes[i + j]) : 0u);
    }
    for (std::size_t j = 0; j < 4; ++j) out += j <= n ? kDigits[group >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

// Three significant digits are enough to read, and shorter.
Json rounded(double value) {
  if (!std::isfinite(value)) return nullptr;
  std::ostringstream out;
  out << std::setprecision(3) << value;
  return Json::parse(out.str());
}

// Layer by layer within a column, as f16.
Json layer_series(const FreezeMap& map, const std::vector<double>& all) {
  Json series;
  const std::size_t n_series = std::size(FreezeMap::kLayerSeries);
  for (std::size_t s = 0; s < n_series; ++s) {
    std::string halves;
    for (std::size_t c = 0; c < all.size(); c += map.series_width()) {
      for (std::size_t l = 0; l < static_cast<std::size_t>(map.n_layers()); ++l) {
        const std::uint16_t half = f32_to_f16(static_cast<float>(all[c + l * n_series + s]));
        halves += {static_cast<char>(half & 255), static_cast<char>(half >> 8)};
      }
    }
    series[FreezeMap::kLayerSeries[s]] = base64(halves);
  }
  return series;
}

void add_store_series(Json& data, const FreezeMap& map, const std::vector<double>& all) {
  const std::size_t width = map.series_width(), n = std::size(FreezeMap::kStoreSeries);
  for (std::size_t s = 0; s < n; ++s) {
    Json& values = data[FreezeMap::kStoreSeries[s]] = Json::array();
    for (std::size_t c = 0; c < all.size(); c += width) {
      values.push_back(static_cast<std::int64_t>(std::llround(all[c + width - n + s])));
    }
  }
}

// A number a column: the mean over its steps of what was reported.
Json output_series(const FreezeMap& map) {
  Json values = Json::array();
  const auto stride = static_cast<std::size_t>(map.stride());
  for (int c = 0; c < map.columns(); ++c) {
    double sum = 0;
    int n = 0;
    const std::size_t first = static_cast<std::size_t>(c) * stride;
    for (std::size_t i = first; i < std::min(first + stride, map.outputs().size()); ++i) {
      if (std::isnan(map.outputs()[i])) continue;
      sum += map.outputs()[i];
      ++n;
    }
    values.push_back(n > 0 ? rounded(sum / n) : Json());
  }
  return values;
}

void add_tokens(Json& data, const FreezeMap& map, std::span<const std::string> texts) {
  data["tokens"] = texts;
  const std::vector<FreezeMap::Token> tokens = map.tokens();
  for (const char* name : {"hot", "recalls", "hits", "probability"}) data[name] = Json::array();
  for (std::size_t t = 0; t < texts.size(); ++t) {
    const FreezeMap::Token token =
        t < tokens.size() ? tokens[t] : FreezeMap::Token{.born = map.steps()};
    data["hot"].push_back(std::lround(1000 * map.hot_share(token)));
    data["recalls"].push_back(token.recalls);
    data["hits"].push_back(token.hits);
    data["probability"].push_back(rounded(token.probability));
  }
}

Json notes(const FreezeMap& map) {
  Json notes = {
      "The hot tier holds exact keys and values in fast memory. A frozen token left it; its exact "
      "key and value stay in the cold tier, and come back when it is recalled or thawed.",
      "Probabilities of single events are rounded to a factor of 1.05, and those below 2^-16 are "
      "shown as none. Of a token's events in one column, the last step's most probable head is "
      "kept."};
  if (!map.detailed()) {
    notes.push_back(
        "Left out, to keep this page small: probability, hits and timer of single events.");
  }
  if (map.stride() > 1) {
    notes.push_back(join("Left out, to keep this page small: single steps. ", map.steps(),
                         " of them stand in ", map.columns(), " columns, each the mean of ",
                         map.stride(), "."));
  }
  return notes;
}

Json page_data(const PageHead& head, const FreezeMap& map, std::span<const std::string> texts) {
  const std::vector<double> all = map.series();
  Json data = {{"model", head.model},          {"layers", map.n_layers()}, {"heads", map.n_heads()},
               {"levels", kHotLevels},         {"steps", map.steps()},     {"stride", map.stride()},
               {"prompt", head.prompt_tokens}, {"notes", notes(map)}};
  data["parameters"] = head.parameters;
  data["figures"] = Json::array();
  for (const PageHead::Figure& f : head.figures)
    data["figures"].push_back({f.name, f.value, f.note});
  data["recovery"] = Json::array();
  for (const FreezeMap::Recovery& r : map.recoveries()) {
    data["recovery"].push_back({r.step, kRungNames[static_cast<int>(r.rung)], rounded(r.value)});
  }
  add_tokens(data, map, texts);
  add_store_series(data, map, all);
  data["output"] = output_series(map);
  data["series"] = layer_series(map, all);
  data["cells"] = Json::array();
  for (int l = 0; l < map.n_layers(); ++l) data["cells"].push_back(base64(map.cells(l)));
  return data;
}

// JSON that no HTML parser takes for the end of its element, whatever its strings say.
std::string inert(const std::string& json) {
  std::string out;
  out.reserve(json.size());
  for (const char c : json) {
    if (c == '<') {
      out += "\\u003c";
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

void write_page(OutputFile& file, const PageHead& head, const FreezeMap& map,
                std::span<const std::string> texts) {
  constexpr std::string_view kData = "/*DATA*/", kScript = "/*SCRIPT*/";
  constexpr std::size_t data = kPage.find(kData), script = kPage.find(kScript);
  static_assert(data < script && script < kPage.size());
  file.write(kPage.substr(0, data));
  file.write(inert(json_line(page_data(head, map, texts))));
  file.write(kPage.substr(data + kData.size(), script - data - kData.size()));
  for (const std::string_view part : kScripts) file.write(part);
  file.write(kPage.substr(script + kScript.size()));
}

}  // namespace thaw
