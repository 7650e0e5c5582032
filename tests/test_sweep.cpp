// Combinations of flags, and what is made of their figures: csv, tables, the plot.
#include "cli/sweep.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/pareto.h"
#include "cli/table.h"

namespace thaw {
namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

int occurrences(const std::string& text, const std::string& part) {
  int n = 0;
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++n;
  return n;
}

TEST_CASE("sweep: every combination, the first name slowest") {
  const Sweep sweep = parse_sweep({"kv-type=f16,f32", "stay=1,2,3"});
  CHECK(sweep.names == std::vector<std::string>{"kv-type", "stay"});
  REQUIRE(sweep.points.size() == 6);
  CHECK(sweep.points[0] == std::vector<std::string>{"f16", "1"});
  CHECK(sweep.points[1] == std::vector<std::string>{"f16", "2"});
  CHECK(sweep.points[5] == std::vector<std::string>{"f32", "3"});
  CHECK(parse_sweep({}).points == std::vector<std::vector<std::string>>{{}});
}

TEST_CASE("sweep: what is no NAME=VALUE,... is wrong usage") {
  for (const std::string word : {"", "stay", "stay=", "=1", "stay=1,", "stay=,1", "stay=1,,2"}) {
    CAPTURE(word);
    CHECK_THROWS_WITH_AS(parse_sweep({word}),
                         join("--sweep: expected NAME=VALUE,VALUE,..., found ", word).c_str(),
                         UsageError);
  }
  CHECK_THROWS_WITH_AS(parse_sweep({"stay=1", "stay=2"}),
                       "--sweep: expected each name once, found stay again", UsageError);
  std::vector<std::string> many;
  for (int i = 0; i < 40; ++i) many.push_back(join("x", i, "=1,2"));  // 2^40 combinations
  CHECK_THROWS_WITH_AS(parse_sweep(many), "--sweep: expected at most 256 combinations, found more",
                       UsageError);
}

TEST_CASE("sweep: a point's values are checked as the flags themselves are, and replace them") {
  CommonOptions base;
  base.kv.type_name = "q8_0";
  base.threads = 3;
  const Sweep sweep = parse_sweep({"policy=thaw,asr", "window=7"});
  const CommonOptions at = at_point(base, sweep, 1);
  CHECK(at.kv.policy == "asr");
  CHECK(at.kv.window == 7);
  CHECK(at.kv.type_name == "q8_0");
  CHECK(at.threads == 3);
  CHECK_THROWS_WITH_AS(at_point(base, parse_sweep({"wnidow=1"}), 0),
                       "unknown flag --wnidow (did you mean --window?)", UsageError);
  CHECK_THROWS_AS(at_point(base, parse_sweep({"policy=none"}), 0), UsageError);
  CHECK_THROWS_AS(at_point(base, parse_sweep({"context=64"}), 0), UsageError);
}

TEST_CASE("csv: one header, a line a row, quotes where a value needs them") {
  CHECK(to_csv({{{"a", "x"}, {"b", 1.5}}, {{"a", "y,\"z\""}, {"b", 2}}}) ==
        "a,b\nx,1.5\n\"y,\"\"z\"\"\",2\n");
}

TEST_CASE("table: columns line up, whatever bytes a letter has") {
  CHECK(markdown_table({"name", "n"}, {{"a", "1.0 \u00b1 2"}, {"longer", "3"}}, 1) ==
        "| name   |       n |\n"
        "|--------|--------:|\n"
        "| a      | 1.0 \u00b1 2 |\n"
        "| longer |       3 |\n");
}

TEST_CASE("pareto: the frontier is what nothing beats") {
  const std::vector<ParetoPoint> points = {{20, 0.1, "a", ""}, {10, 0.5, "b", ""},
                                           {15, 0.6, "c", ""}, {30, 0.1, "d", ""},
                                           {40, 0.01, "e", ""}, {10, 0.7, "f", ""}};
  CHECK(frontier(points) == std::vector<std::size_t>{1, 0, 4});
  CHECK(frontier({{1, 1, "", ""}, {1, 1, "", ""}}) == std::vector<std::size_t>{0});
}

TEST_CASE("pareto: labels stand beside their points, or in a list where there is no room") {
  ParetoPlot plot{"title <&>", "x", "y", {}};
  plot.points = {{20, 0.1, "first", "g"}, {30, 0.001, "second 'x'", "h"}};
  const std::string few = pareto_svg(plot);
  CHECK(few.starts_with("<svg xmlns='http://www.w3.org/2000/svg'"));
  CHECK(few.ends_with("</svg>\n"));
  CHECK(contains(few, "title &lt;&amp;&gt;"));
  CHECK(contains(few, ">second &#39;x&#39;</text>"));
  CHECK(occurrences(few, "<circle") == 2 + 2);  // the points, and the legend of two groups
  for (int i = 0; i < 60; ++i) plot.points.push_back({20 + i * 0.01, 0.1, "a long label", "g"});
  const std::string many = pareto_svg(plot);
  CHECK(occurrences(many, "<circle") == 62 + 2);
  CHECK(contains(many, ">62  a long label: 20.6 %, 0.1</text>"));
}

TEST_CASE("pareto: odd numbers make a picture of finite ones") {
  for (const auto& [x, y] : {std::pair{0.0, 0.0}, {100.0, -1e-17}, {1e9, 1e9}, {12.5, 1e-300}}) {
    ParetoPlot plot{"", "", "", {{x, y, "p", "g"}}};
    const std::string svg = pareto_svg(plot);
    CHECK_FALSE(contains(svg, "nan"));
    CHECK_FALSE(contains(svg, "inf"));
    CHECK(svg.size() < 30000);
  }
}

}  // namespace
}  // namespace thaw
