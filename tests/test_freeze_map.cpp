// The freeze map: what is recorded, how it is packed, and the page that carries it.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/freeze_map.h"
#include "cli/freeze_map_page.h"
#include "cli/token_text.h"
#include "device/half.h"
#include "tests/tiny_files.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::Random;
using testing::TemporaryDirectory;

std::string unbase64(const std::string& text) {
  const std::string digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  unsigned bits = 0, n = 0;
  for (const char c : text) {
    if (c == '=') break;
    bits = bits << 6 | static_cast<unsigned>(digits.find(c));
    n += 6;
    if (n < 8) continue;
    n -= 8;
    bytes += static_cast<char>(bits >> n & 255);
  }
  return bytes;
}

// The columns of a layer, as cli/cell_stream.h describes them, read by other code than the one that
// writes them.
std::vector<std::vector<Cell>> decode(const std::string& bytes) {
  std::size_t at = 0;
  const auto byte = [&] { return static_cast<unsigned char>(bytes.at(at++)); };
  const auto varint = [&] {
    int value = 0;
    for (int shift = 0;; shift += 7) {
      const int b = byte();
      value += (b % 128) << shift;
      if (b < 128) return value;
    }
  };
  std::vector<std::vector<Cell>> columns;
  while (at < bytes.size()) {
    std::vector<Cell>& cells = columns.emplace_back();
    int next = 0;
    for (int n = varint(); n > 0; --n) {
      Cell cell;
      cell.token = next + varint();
      next = cell.token + 1;
      const int bits = byte();
      cell.level = bits % 32;
      cell.recalled = bits / 32 % 2 == 1;
      cell.detailed = bits / 64 % 2 == 1;
      if (cell.detailed) {
        cell.probability = byte();
        cell.hits = varint();
        cell.timer = varint();
        cell.step = varint();
      }
      cells.push_back(cell);
    }
  }
  return columns;
}

// A history of random events, and what it means, kept in the plainest way.
struct History {
  static constexpr int kLayers = 3, kHeads = 2;
  struct State {
    int heads = 0;  // hot after the step
    bool recalled = false;
    float probability = -1;  // of the event to be shown; -1: none
    int hits = 0, timer = 0;
  };
  using Table = std::map<std::pair<int, int>, State>;  // by layer and token
  std::vector<Table> steps;
  std::map<int, int> recalls;
  std::vector<int> lengths;

  History(FreezeMap& map, int n_prompt, int n_steps, std::uint64_t seed, double rate = .05) {
    Random random(seed);
    bool hot[kLayers][kHeads][1024] = {};
    for (int s = 0; s < n_steps; ++s) {
      const int length = n_prompt + s + 1;
      Table& table = steps.emplace_back();
      for (int l = 0; l < kLayers; ++l) {
        for (int h = 0; h < kHeads; ++h) {
          for (int t = 0; t < length; ++t) {
            const bool born = t == length - 1;
            if (!born && random.uniform() > rate) continue;
            bool& state = hot[l][h][t];
            const auto kind = state   ? KvEvent::kFreeze
                              : born  ? KvEvent::kAppend
                              : t % 2 ? KvEvent::kThaw
                                      : KvEvent::kRecall;
            state = !state;
            const float p = born ? 0.0f : static_cast<float>(random.uniform());
            const int hits = born ? 0 : random.below(300), timer = born ? 0 : 1 + random.below(20);
            map.event({kind, s, static_cast<std::int16_t>(l), static_cast<std::int16_t>(h), t, p,
                       hits, timer});
            State& cell = table[{l, t}];
            cell.recalled = cell.recalled || kind == KvEvent::kRecall;
            recalls[t] += kind == KvEvent::kRecall;
            const bool later = probability_code(p) >= probability_code(cell.probability);
            if (!born && (cell.probability < 0 || later)) {
              cell.probability = p, cell.hits = hits, cell.timer = timer;
            }
          }
        }
      }
      for (int l = 0; l < kLayers; ++l) {
        for (int t = 0; t < length; ++t) {
          if (hot[l][0][t] || hot[l][1][t]) table[{l, t}].heads = hot[l][0][t] + hot[l][1][t];
        }
      }
      KvStep step{s, length, std::vector<KvStep::Layer>(kLayers), 1000 + s, 10 * s, 7};
      for (int l = 0; l < kLayers; ++l) {
        step.layers[static_cast<std::size_t>(l)] = {
            static_cast<float>(l + s), .25f, .003f, 12, 0, 1, 2, 3};
      }
      map.step(step);
      lengths.push_back(length);
    }
  }
  State at(int step, int layer, int token) const {
    const Table& table = steps[static_cast<std::size_t>(step)];
    const auto found = table.find({layer, token});
    return found == table.end() ? State{} : found->second;
  }
};

struct Page {
  std::string html;
  json data;
};

Page page_of(const FreezeMap& map, const std::vector<std::string>& texts,
             const PageHead& head = {}) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "page.html";
  OutputFile file(path);
  write_page(file, head, map, texts);
  file.finish();
  Page page{testing::read_file(path), {}};
  const std::string open = R"(<script type="application/json" id="data">)";
  const std::size_t from = page.html.find(open) + open.size();
  page.data = json::parse(page.html.substr(from, page.html.find("</script>", from) - from));
  return page;
}

std::size_t occurrences(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++n;
  return n;
}

TEST_CASE("The page holds exactly the cells that were recorded") {
  FreezeMap map(History::kLayers, History::kHeads);
  const History history(map, 20, 60, 1);
  const Page page = page_of(map, std::vector<std::string>(80, "x"));
  CHECK(page.data["stride"] == 1);
  CHECK(page.data["steps"] == 60);
  for (int l = 0; l < History::kLayers; ++l) {
    const auto columns = decode(unbase64(page.data["cells"][static_cast<std::size_t>(l)]));
    REQUIRE(columns.size() == 60);
    std::vector<int> level(80);
    for (int s = 0; s < 60; ++s) {
      std::vector<Cell> now(80);
      for (const Cell& cell : columns[static_cast<std::size_t>(s)]) {
        now[static_cast<std::size_t>(cell.token)] = cell;
        level[static_cast<std::size_t>(cell.token)] = cell.level;
      }
      for (int t = 0; t < 80; ++t) {
        CAPTURE(l);
        CAPTURE(s);
        CAPTURE(t);
        const History::State expected = history.at(s, l, t);
        const Cell& cell = now[static_cast<std::size_t>(t)];
        CHECK(level[static_cast<std::size_t>(t)] == expected.heads * kHotLevels / History::kHeads);
        CHECK(cell.recalled == expected.recalled);
        CHECK(cell.detailed == (expected.probability >= 0));
        if (!cell.detailed) continue;
        CHECK(cell.probability == probability_code(expected.probability));
        CHECK(cell.hits == expected.hits);
        CHECK(cell.timer == expected.timer);
      }
    }
  }
}

TEST_CASE("A history that is too large keeps its means in wider columns") {
  FreezeMap map(History::kLayers, History::kHeads, 12000);
  const int n_steps = 203;
  const History history(map, 40, n_steps, 2);
  const int stride = map.stride();
  CHECK(stride >= 2);
  CHECK(!map.detailed());
  const int n_columns = (n_steps + stride - 1) / stride;
  CHECK(map.columns() == n_columns);
  const std::vector<double> series = map.series();  // the last column is not full
  const std::size_t width = map.series_width();
  REQUIRE(series.size() == static_cast<std::size_t>(n_columns) * width);
  CHECK(series[series.size() - std::size(FreezeMap::kStoreSeries)] == 40 + n_steps);
  CHECK(series[width + 1] == .25);  // the ghost mass of layer 0
  CHECK(series[width] == stride + (stride - 1) / 2.0);  // its entropy, which is the step
  std::size_t size = 0;
  for (int l = 0; l < History::kLayers; ++l) {
    const auto columns = decode(map.cells(l));
    size += map.cells(l).size();
    REQUIRE(std::ssize(columns) == n_columns);
    std::vector<int> level(300);
    for (int c = 0; c < n_columns; ++c) {
      std::vector<bool> recalled(300);
      for (const Cell& cell : columns[static_cast<std::size_t>(c)]) {
        level[static_cast<std::size_t>(cell.token)] = cell.level;
        recalled[static_cast<std::size_t>(cell.token)] = cell.recalled;
        CHECK(!cell.detailed);
      }
      const int first = c * stride, end = std::min(first + stride, n_steps);
      for (int t = 0; t < 40 + end; ++t) {
        double heads = 0;
        bool any = false;
        for (int s = first; s < end; ++s) {
          heads += history.at(s, l, t).heads;
          any = any || history.at(s, l, t).recalled;
        }
        CAPTURE(l);
        CAPTURE(c);
        CAPTURE(t);
        const double mean = heads * kHotLevels / History::kHeads / (end - first);
        // Each doubling rounds once.
        CHECK(std::abs(level[static_cast<std::size_t>(t)] - mean) <= .5 * std::log2(stride) + .01);
        CHECK(recalled[static_cast<std::size_t>(t)] == any);
      }
    }
  }
  CHECK(size < 2 * 12000);
}

TEST_CASE("Long runs have at most so many columns") {
  FreezeMap map(1, 1, 1 << 20, 64);
  for (int s = 0; s < 1000; ++s) map.step({s, s + 1, std::vector<KvStep::Layer>(1), 0, 0, 0});
  CHECK(map.stride() == 16);
  CHECK(map.columns() == 63);
}

TEST_CASE("A map has as many layers as a model may have") {
  constexpr int kLayers = 1 << 16;
  FreezeMap map(kLayers, 1);
  map.step({0, 1, std::vector<KvStep::Layer>(kLayers), 0, 0, 0, true});
  CHECK(map.tokens()[0].hot_steps == kLayers);
  map.step({1, 1, std::vector<KvStep::Layer>(kLayers), 0, 0, 0, true});
  CHECK(map.tokens()[0].hot_steps == 2 * kLayers);
}

TEST_CASE("A token's time in the hot tier is counted exactly") {
  FreezeMap map(History::kLayers, History::kHeads, 5000);  // whatever happens to columns
  const History history(map, 20, 100, 3);
  const std::vector<FreezeMap::Token> tokens = map.tokens();
  REQUIRE(tokens.size() == 120);
  for (int t = 0; t < 120; ++t) {
    CAPTURE(t);
    const FreezeMap::Token& token = tokens[static_cast<std::size_t>(t)];
    std::int64_t hot = 0;
    for (int s = 0; s < 100; ++s) {
      for (int l = 0; l < History::kLayers; ++l) hot += history.at(s, l, t).heads;
    }
    CHECK(token.hot_steps == hot);
    CHECK(token.born == std::max(0, t - 20));
    const double life = 100 - std::max(0, t - 20);
    CHECK(map.hot_share(token) ==
          doctest::Approx(static_cast<double>(hot) / life / History::kLayers / History::kHeads));
    const auto recalls = history.recalls.find(t);
    CHECK(token.recalls == (recalls == history.recalls.end() ? 0 : recalls->second));
  }
}

TEST_CASE("A rewind forgets the tokens that it takes away") {
  FreezeMap map(1, 1);
  const auto event = [&](KvEvent::Kind kind, int token) {
    map.event({kind, 0, 0, 0, token, 0, 5, 0});
  };
  const auto step = [&](int length) {
    map.step({0, length, std::vector<KvStep::Layer>(1), 0, 0, 0});
  };
  for (int t = 0; t < 4; ++t) {
    event(KvEvent::kAppend, t);
    step(t + 1);
  }
  map.event({KvEvent::kRewind, 4, -1, -1, 2, 0, 0, 0});
  event(KvEvent::kAppend, 2);
  step(3);
  const auto tokens = map.tokens();
  REQUIRE(tokens.size() == 3);
  CHECK(tokens[0].hot_steps == 5);
  CHECK(tokens[2].hot_steps == 1);  // the new one
  CHECK(tokens[2].born == 4);
  const auto columns = decode(map.cells(0));
  REQUIRE(columns.size() == 5);
  REQUIRE(columns[4].size() == 2);
  CHECK(columns[4][0].level == kHotLevels);
  CHECK(columns[4][1].token == 3);
  CHECK(columns[4][1].level == 0);
}

TEST_CASE("The page holds the series of layers and store, outputs and recoveries") {
  FreezeMap map(History::kLayers, History::kHeads);
  const History history(map, 20, 10, 4);
  map.output(3, 1.25f);
  map.recovery(7, Rung::kWindow, 4.5f);
  const json data = page_of(map, {"a", "b"}).data;
  CHECK(data["length"] == json(history.lengths));
  CHECK(data["hot_bytes"][9] == 1009);
  CHECK(data["ghost_bytes"][9] == 90);
  CHECK(data["cold_bytes_read"][9] == 7);
  CHECK(data["thawed"][9] == 6);
  CHECK(data["frozen"][9] == 9);
  CHECK(data["output"][3] == 1.25);
  CHECK(data["output"][4].is_null());
  CHECK(data["recovery"] == json::parse(R"([[7, "window", 4.5]])"));
  const std::string entropy = unbase64(data["series"]["entropy"]);
  REQUIRE(entropy.size() == 10 * History::kLayers * 2);
  const auto half = [&](std::size_t i) {
    return f16_to_f32(
        static_cast<std::uint16_t>(static_cast<unsigned char>(entropy[2 * i]) |
                                   static_cast<unsigned char>(entropy[2 * i + 1]) << 8));
  };
  CHECK(half(9 * History::kLayers + 2) == 11);  // step 9, layer 2
  CHECK(half(4 * History::kLayers + 1) == 5);
}

TEST_CASE("Hostile text is inert on the page") {
  FreezeMap map(1, 1);
  map.step({0, 2, std::vector<KvStep::Layer>(1), 0, 0, 0});
  const std::vector<std::string> hostile = {"</script><script>alert(1)</script>", "<!--<script",
                                            "]]>\"'\\", "\xe2\x80\xa8", "\xff\xfe"};
  const std::vector<std::string> harmless(hostile.size(), "x");
  const PageHead bad = {
      hostile[0], {{hostile[1], hostile[0]}}, {{hostile[0], hostile[1], "\xff"}}, 0};
  const Page page = page_of(map, hostile, bad), plain = page_of(map, harmless);
  for (const char* part : {"<script", "</script", "<!--", "alert(1)</"}) {
    CAPTURE(part);
    CHECK(occurrences(page.html, part) == occurrences(plain.html, part));
  }
  CHECK(page.data["tokens"][0] == hostile[0]);
  CHECK(page.data["tokens"][3] == hostile[3]);
  CHECK(page.data["model"] == hostile[0]);
}

TEST_CASE("The page asks nothing of the network") {
  FreezeMap map(1, 1);
  const std::string html = page_of(map, {"x"}).html;
  for (const char* part : {"http:", "https:", "//cdn", " src=", "url(", "@import", "import(",
                           "fetch(", "XMLHttpRequest", "<link"}) {
    CAPTURE(part);
    CHECK(html.find(part) == std::string::npos);
  }
  CHECK(html.find("default-src 'none'") != std::string::npos);
}

TEST_CASE("Tokens become text that is safe one by one") {
  const std::vector<std::string> pieces = {"a\n",          "\x1b[31m", "\xf0\x9f",
                                           "\x98\x80!",    "\xff",     "\xc2\x9b",
                                           "\xe2\x80\xae", "",         "\xe2\x82"};
  CHECK(readable_pieces(pieces) == std::vector<std::string>{"a\n", "\\x1b[31m", "\xf0\x9f\x98\x80",
                                                            "!", "\\xff", "\\xc2\\x9b",
                                                            "\\xe2\\x80\\xae", "", "\\xe2\\x82"});
}

TEST_CASE("freeze map: tokens are hot until something freezes") {
  FreezeMap map(2, 1);
  const auto step = [&](int length, bool all_hot) {
    map.step({0, length, std::vector<KvStep::Layer>(2), 0, 0, 0, all_hot});
  };
  step(3, true), step(4, true);
  for (int layer = 0; layer < 2; ++layer)
    for (const int token : {0, 4}) map.event({KvEvent::kSeed, 2, layer, -1, token, 0, 0, 0});
  step(5, false), step(5, false);
  std::vector<std::int64_t> hot;
  for (const FreezeMap::Token& token : map.tokens()) hot.push_back(token.hot_steps);
  CHECK(hot == std::vector<std::int64_t>{8, 4, 4, 2, 4});  // layers x steps
  map.event({KvEvent::kRewind, 4, -1, -1, 3, 0, 0, 0});
  step(4, true);
  hot.clear();
  for (const FreezeMap::Token& token : map.tokens()) hot.push_back(token.hot_steps);
  CHECK(hot == std::vector<std::int64_t>{10, 6, 6, 2});
}

}  // namespace
}  // namespace thaw
