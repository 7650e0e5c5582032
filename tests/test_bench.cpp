// thaw bench: which tests it runs, in which order, and the bytes that it counts.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/model.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;

RunResult bench(std::vector<std::string> args) {
  args.insert(args.begin(), {"bench", "-m", TinyCli::get().model(), "-r", "2"});
  return run_thaw(args);
}

json results(std::vector<std::string> args) {
  args.push_back("--json");
  const RunResult r = bench(std::move(args));
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  return json::parse(r.out)["results"];
}

TEST_CASE("bench: a prompt and a decode at every depth, for every policy in turn") {
  const json list = results({"-p", "8", "-n", "4", "-d", "0,32", "--policy", "full,window"});
  std::vector<std::string> found;
  for (const json& row : list) {
    std::vector<std::string> keys;
    for (const auto& [key, value] : row.items()) keys.push_back(key);
    CHECK(keys == std::vector<std::string>{"backend", "gb_s", "pct_peak", "policy", "sd", "test",
                                           "threads", "tok_s"});
    found.push_back(row["test"].get<std::string>() + " " + row["policy"].get<std::string>());
    CHECK(row["tok_s"] > 0);
    CHECK(row["gb_s"].is_null() == row["test"].get<std::string>().starts_with("pp"));
  }
  CHECK(found == std::vector<std::string>{"pp8 full", "pp8 window", "tg4 full", "tg4 window",
                                          "pp8@d32 full", "pp8@d32 window", "tg4@d32 full",
                                          "tg4@d32 window"});
}

TEST_CASE("bench: GB/s counts the weights and the tokens that the policy reads") {
  const Model model = load_model(TinyCli::get().model());
  double weights = static_cast<double>(model.weights.output.bytes());
  for (const LayerWeights& w : model.weights.layers) {
    for (const Tensor* t : {&w.wq, &w.wk, &w.wv, &w.wo, &w.w_gate, &w.w_up, &w.w_down})
      weights += static_cast<double>(t->bytes());
  }
  const json list = results({"-p", "0", "-n", "4", "-d", "64", "--policy", "full,window",
                             "--window", "8", "--sinks", "2"});
  REQUIRE(list.size() == 2);
  const auto kv_bytes = [&](const json& row) {
    return row["gb_s"].get<double>() * 1e9 / row["tok_s"].get<double>() - weights;
  };
  const double token = 2 * 2 * 32 * 2;  // keys and values of 2 layers, 32 wide, 2 bytes each
  CHECK(kv_bytes(list[0]) == doctest::Approx(token * (64 + 2.5)));  // 65, 66, 67, 68 tokens
  // What leaves the window is still read in the step that pushes it out.
  CHECK(kv_bytes(list[1]) == doctest::Approx(token * (8 + 2 + 1)));
}

TEST_CASE("bench: the text shows mean, deviation, median and the ratio to the first policy") {
  const RunResult one = bench({"-p", "8", "-n", "4"});
  CHECK(one.out.starts_with("read bandwidth "));
  CHECK(one.out.find("| test | policy | ") != std::string::npos);
  CHECK(one.out.find("median") != std::string::npos);
  CHECK(one.out.find("/ full") == std::string::npos);
  const RunResult two = bench({"-p", "8", "-n", "0", "--policy", "full,window"});
  CHECK(two.out.find("| / full |") != std::string::npos);
  CHECK(two.out.find("| pp8  | full ") != std::string::npos);
}

TEST_CASE("bench: the tokens of a text, when it is long enough") {
  const std::string path = TinyCli::get().path("bench.txt");
  testing::write_file(path, "Xbqkz-Jvwxy");  // 11 tokens
  CHECK(results({"-p", "7", "-n", "2", "-d", "4", "-f", path}).size() == 2);
  const RunResult r = bench({"-p", "7", "-n", "2", "-d", "5", "-f", path});
  CHECK(r.exit_code == 1);
  CHECK(r.err == "thaw: " + path + ": expected at least 12 tokens, which the tests need, found 11\n");
}

TEST_CASE("bench: lists are checked value by value") {
  for (const auto& [flag, value, message] :
       {std::tuple{"-d", "1,x", "--depth: expected whole numbers from 0 to 16777216 between commas, found \"1,x\""},
        {"-d", "1,", "--depth: expected whole numbers from 0 to 16777216 between commas, found \"1,\""},
        {"-d", "", "--depth: expected whole numbers from 0 to 16777216 between commas, found \"\""},
        {"--policy", "full,none", "--policy: expected some of full|window|h2o|budget|asr|thaw"},
        {"--policy", "", "--policy: expected some of full|"}}) {
    const RunResult r = bench({flag, value});
    CAPTURE(r.err);
    CHECK(r.exit_code == 2);
    CHECK(r.err.find(message) != std::string::npos);
  }
}

}  // namespace
}  // namespace thaw
