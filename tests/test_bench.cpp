// thaw bench: which tests it runs, in which order, and the bytes that it counts.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/backend_timed.h"
#include "model/forward.h"
#include "model/random_model.h"
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

TEST_CASE("bench: bounds of the hot tier are for the policies that have one") {
  const json list = results({"-p", "0", "-n", "4", "-d", "64", "--policy", "full,h2o",
                             "--hot-tokens", "30"});
  REQUIRE(list.size() == 2);
  CHECK(list[0]["gb_s"].get<double>() / list[0]["tok_s"].get<double>() >
        list[1]["gb_s"].get<double>() / list[1]["tok_s"].get<double>());
}

TEST_CASE("bench: the text shows mean, deviation, median and the ratio to the first policy") {
  const RunResult one = bench({"-p", "8", "-n", "4"});
  CHECK(one.out.starts_with("backend cpu, memory "));
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

TEST_CASE("bench --op: each call of an op, and the bytes of one") {
  const std::string model = TinyCli::get().model();
  const RunResult r = run_thaw({"bench", "-m", model, "--op", "append,project_add,logits,attend,settle",
                                "-n", "2", "-d", "16,40", "--policy", "full,thaw", "--freeze-from", "0", "--json"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const Config config = load_model(model).config;
  const json list = json::parse(r.out)["ops"];
  REQUIRE(list.size() == 2 * 2 * 5);
  for (std::size_t i = 0; i < list.size(); ++i) {
    const json& row = list[i];
    const std::string op = row["op"];
    CHECK(row["depth"] == (i < 10 ? 16 : 40));
    CHECK(row["policy"] == (i % 10 < 5 ? "full" : "thaw"));
    const int calls = op == "logits" ? 1 : op == "project_add" ? 2 * config.n_layers : config.n_layers;
    CHECK(row["calls"] == 2 * calls);
    CHECK(row["median_us"] > 0);
    CHECK(row["gb_s"].is_null() == (op == "settle"));
    const double bytes = op == "append" ? 2.0 * 2 * config.kv_dim() : 0;
    if (bytes > 0)
      CHECK(row["gb_s"].get<double>() ==
            doctest::Approx(bytes / row["mean_us"].get<double>() / 1e3));
  }
}

TEST_CASE("bench --op: the bytes of a call are the mean of layers of different formats") {
  testing::TinyModel tiny = testing::make_tiny_model({.type = DType::kF16});
  Tensor& w = tiny.model.weights.layers[1].w_down;
  std::vector<float> values(static_cast<std::size_t>(w.rows * w.cols));
  dequantize(values.data(), w.data, w.type, w.rows * w.cols);
  tiny.storage.push_back(testing::encode(values, DType::kF32));
  w.type = DType::kF32, w.data = tiny.storage.back().data();
  const std::string path = TinyCli::get().path("mixed.gguf");
  testing::write_file(path, testing::tiny_gguf(tiny).bytes());
  const RunResult r = run_thaw({"bench", "-m", path, "--op", "project_add", "-n", "1", "-d", "1", "--json"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const json row = json::parse(r.out)["ops"][0];
  const LayerWeights& l = tiny.model.weights.layers[0];
  const auto bytes = static_cast<double>(2 * l.wo.bytes() + l.w_down.bytes() + w.bytes()) / 4;
  CHECK(row["gb_s"].get<double>() == doctest::Approx(bytes / row["mean_us"].get<double>() / 1e3));
}

TEST_CASE("bench: ops and random weights that cannot be") {
  const auto error = [](std::vector<std::string> args) {
    args.insert(args.begin(), "bench");
    const RunResult r = run_thaw(args);
    CHECK(r.exit_code == 2);
    CHECK(r.out.empty());
    return r.err;
  };
  CHECK(error({"--random", "nine"}).find("--random: expected tiny, 135m, 1b or 8b") != std::string::npos);
  CHECK(error({"--random", "tiny", "-m", "x"}).find("expected -m or --random") != std::string::npos);
  CHECK(error({"--random", "tiny", "-f", "x"}).find("-f: expected a model that has") != std::string::npos);
  CHECK(error({"--random", "tiny", "--op", "qk"}).find("--op: expected some of embed|") != std::string::npos);
  CHECK(error({"--random", "tiny", "-p", "0", "-n", "0"}).find("found -p 0 and -n 0") !=
        std::string::npos);
  CHECK(error({"--random", "tiny", "--op", "qkv", "-n", "0"}).find("--op: expected at least one") !=
        std::string::npos);
}

TEST_CASE("timed ops compute what the backend computes") {
  ThreadPool pool(1);
  const Model model = make_random_model("tiny", DType::kQ8_0, 3, pool);
  OpTimes times;
  Transformer plain(model, 1);
  Transformer timed(model, std::make_unique<TimedBackend>(make_cpu_backend(model, 1), kTimedOps, times));
  const KvShape shape = kv_shape(model.config, 64);
  const auto a = plain.backend().make_kv_store(shape, {}), b = timed.backend().make_kv_store(shape, {});
  const std::vector<std::int32_t> prompt = {3, 1, 4, 1, 5};
  plain.prefill(prompt, *a), timed.prefill(prompt, *b);
  CHECK(times.empty());  // a prompt is no step
  for (std::int32_t token : {9, 2, 6}) {
    const auto x = plain.forward({&token, 1}, *a, 1, Phase::kDecode);
    const auto y = timed.forward({&token, 1}, *b, 1, Phase::kDecode);
    CHECK(std::equal(x.begin(), x.end(), y.begin(), y.end()));
  }
  CHECK(times.size() == kTimedOps.size());
  CHECK(times["project_add"].size() == 3 * 2 * 2);
}

TEST_CASE("random models: the same for any number of threads, of the size that is promised") {
  ThreadPool one(1), three(3);
  for (const DType type : testing::kAllTypes) {
    CAPTURE(dtype_info(type).name);
    const Model a = make_random_model("tiny", type, 7, one), b = make_random_model("tiny", type, 7, three);
    const Tensor &w = a.weights.layers[1].w_down, &same = b.weights.layers[1].w_down;
    const Tensor& other = a.weights.layers[0].w_down;
    CHECK(w.type == type);  // 256 columns; 128 are no whole block of a K-quant
    CHECK(a.weights.embedding.type == (is_k_quant(type) ? DType::kQ8_0 : type));
    CHECK(std::equal(w.data, w.data + w.bytes(), same.data));
    CHECK_FALSE(std::equal(w.data, w.data + w.bytes(), other.data));
    std::vector<float> x(static_cast<std::size_t>(w.rows * w.cols));
    for (std::int64_t r = 0; r < w.rows; ++r)
      dequantize(x.data() + r * w.cols, w.row(r), type, w.cols);
    double sum = 0, squares = 0;
    for (const float e : x) sum += e, squares += double{e} * e;
    const auto n = static_cast<double>(x.size());  // 32,768: the mean's deviation is 0.0055 rms
    CHECK(std::sqrt(squares / n) == doctest::Approx(0.02).epsilon(0.02).scale(0));
    // Without a least one, codes are half a step below zero on average.
    const double half_a_step = type == DType::kQ4_0   ? 0.5 / 4.61
                               : type == DType::kQ5_0 ? 0.5 / 9.23
                               : type == DType::kQ6_K ? 0.5 / 18.5
                                                      : 0.5 / 73.9;
    CHECK(std::fabs(sum / n) < 0.02 * (5 * 0.0055 + half_a_step));
  }
}

}  // namespace
}  // namespace thaw
