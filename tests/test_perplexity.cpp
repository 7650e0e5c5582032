// thaw perplexity: all tokens in batches, and under KV policies beside full.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "cli/compare.h"
#include "cli/kv_flags.h"
#include "cli/statistics.h"
#include "cli/tokenizer_source.h"
#include "model/forward.h"
#include "tests/compare.h"
#include "tests/file_limit.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;

std::string file(const std::string& name) { return TinyCli::get().path(name); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::string slurp(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream out;
  out << in.rdbuf();
  return out.str();
}

RunResult perplexity(std::vector<std::string> args) {
  args.insert(args.begin(), {"perplexity", "-m", TinyCli::get().model()});
  return run_thaw(args);
}

json perplexity_json(std::vector<std::string> args) {
  args.push_back("--json");
  const RunResult r = perplexity(std::move(args));
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  return json::parse(r.out);
}

void check_fails(const std::vector<std::string>& args, int exit_code, const std::string& message) {
  const RunResult r = perplexity(args);
  CAPTURE(r.err);
  CHECK(r.exit_code == exit_code);
  CHECK(r.out.empty());
  CHECK(contains(r.err, message));
}

// 120 letters, a token each, no two windows of them alike.
std::string letters(int n = 120) {
  std::string text;
  for (int i = 0; i < n; ++i) text += "XbqkzJvwyQ-"[(i * i + i / 7) % 11];
  return text;
}

// What the library makes of the same tokens.
struct Library {
  Model model = load_model(TinyCli::get().model());
  Tokenizer tokenizer = load_tokenizer(model);
  Transformer transformer{model, 1};

  std::unique_ptr<KvStore> store(const KvFlags& flags, int capacity) const {
    const Config& c = model.config;
    return make_kv_store(kv_shape(c, capacity, flags.type()), flags.options());
  }

  // log softmax of each row, after `prefill` tokens in one batch and the rest one by one.
  std::vector<std::vector<double>> rows(const std::vector<TokenId>& tokens, int prefill,
                                        KvStore& kv) {
    std::vector<std::vector<double>> result;
    const auto add = [&](std::span<const float> logits) {
      for (std::size_t at = 0; at < logits.size(); at += 288) {
        std::vector<double> row(logits.begin() + at, logits.begin() + at + 288);
        double sum = 0;
        for (const double x : row) sum += std::exp(x);
        for (double& x : row) x -= std::log(sum);
        result.push_back(row);
      }
    };
    if (prefill > 0)
      add(transformer.forward({tokens.data(), std::size_t(prefill)}, kv, prefill, Phase::kPrefill));
    for (std::size_t i = prefill; i < tokens.size(); ++i)
      add(transformer.forward({&tokens[i], 1}, kv, 1, Phase::kDecode));
    return result;
  }

  std::vector<std::vector<double>> full_rows(const std::vector<TokenId>& tokens) {
    KvFlags flags;
    flags.policy = "full";
    return rows(tokens, static_cast<int>(tokens.size()),
                *store(flags, static_cast<int>(tokens.size())));
  }
};

// Batches other than one round otherwise in f32, which moves a key or value now and then to the
// next f16: by 2^-10 of itself, 3e-3 at most. In two heads' output that is 4e-3 of the residual
// stream, whose root mean square is 1.5, and weights of the head are 0.25: 7e-4 of a logit, and a
// third of that in the mean of ten NLLs, its standard error and the logarithm of perplexity.
constexpr double kNllError = 2.5e-4;

TEST_CASE("perplexity: exp of the mean NLL, with its standard error") {
  Library library;
  const std::vector<TokenId> ids = library.tokenizer.encode("Xbqkz-Jvwxy");
  const auto rows = library.full_rows(ids);
  std::vector<double> nll;
  for (std::size_t i = 1; i < ids.size(); ++i) nll.push_back(-rows[i - 1][ids[i]]);
  const Mean mean = mean_of(nll);
  for (const std::string prefill : {"0", "4", "1000"}) {
    const json j = perplexity_json({"-p", "Xbqkz-Jvwxy", "--prefill", prefill});
    CHECK(std::fabs(j["nll_nats"].get<double>() - mean.mean) <= kNllError);
    CHECK(std::fabs(j["nll_se_nats"].get<double>() - mean.se) <= kNllError);
    CHECK(testing::within(j["perplexity"].get<double>(), std::exp(mean.mean), kNllError));
    CHECK(j["tokens"] == ids.size() - 1);
    CHECK(j["windows"] == 1);
  }
  const RunResult r = perplexity({"-p", "Xbqkz-Jvwxy", "-q"});
  CHECK(r.out.starts_with("perplexity  "));
  CHECK(contains(r.out, "tokens      10 in 1 window\n"));
  CHECK(r.err.empty());
}

TEST_CASE("perplexity: windows count each token once, from the context its window gives") {
  Library library;
  const std::vector<TokenId> ids = library.tokenizer.encode("XbqkzJvwxyzQ");
  REQUIRE(ids.size() == 12);
  // Windows of 6 every 4: [0, 6) counts 1..5, [4, 10) counts 6..9, [8, 12) counts 10 and 11.
  double sum = 0, of_two = 0;
  for (const auto& [begin, first, end] : {std::tuple{0, 1, 6}, {4, 6, 10}, {8, 10, 12}}) {
    const auto rows = library.full_rows({ids.begin() + begin, ids.begin() + end});
    if (begin == 8) of_two = sum;
    for (int i = first; i < end; ++i) sum -= rows[i - begin - 1][ids[i]];
  }
  const std::vector<std::string> args = {"-p", "XbqkzJvwxyzQ", "-c", "6", "--stride", "4"};
  const json j = perplexity_json(args);
  CHECK(j["windows"] == 3);
  CHECK(j["tokens"] == 11);
  CHECK(std::fabs(j["nll_nats"].get<double>() - sum / 11) <= kNllError);
  std::vector<std::string> two = args;
  two.insert(two.end(), {"--windows", "2"});
  CHECK(perplexity_json(two)["tokens"] == 9);
  CHECK(std::fabs(perplexity_json(two)["nll_nats"].get<double>() - of_two / 9) <= kNllError);
}

// The figures of windows of 200 tokens every 50, of which the first 150 are prefilled, in a text of
// 310. In the fourth and last 9 are decoded: the text's last token is only predicted.
struct Expected {
  std::vector<double> nll, difference, kl;
  double same = 0;
  KvCounters counters;
  KvUsage usage;

  Expected(const std::vector<TokenId>& ids, const KvFlags& flags) {
    Library library;
    for (const int begin : {0, 50, 100, 150}) {
      const int end = std::min(begin + 200, 309);
      const std::vector<TokenId> tokens(ids.begin() + begin, ids.begin() + end);
      const auto kv = library.store(flags, 200);
      const auto rows = library.rows(tokens, 150, *kv), full = library.full_rows(tokens);
      for (int i = 150; i < end - begin; ++i) add(rows[i], full[i], ids[begin + i + 1]);
      counters.steps += kv->counters().steps;
      counters.attended += kv->counters().attended;
      counters.visible += kv->counters().visible;
      counters.recalled += kv->counters().recalled;
      counters.thawed += kv->counters().thawed;
      counters.cold_bytes_read += kv->counters().cold_bytes_read;
      counters.cold_bytes_visible += kv->counters().cold_bytes_visible;
      usage.resident += kv->usage().resident;
      usage.hot += kv->usage().hot;
      usage.ghosts += kv->usage().ghosts;
    }
  }

  void add(const std::vector<double>& row, const std::vector<double>& full, TokenId next) {
    nll.push_back(-row[next]);
    difference.push_back(full[next] - row[next]);
    kl.push_back(0);
    for (std::size_t i = 0; i < row.size(); ++i)
      kl.back() += std::exp(full[i]) * (full[i] - row[i]);
    same += std::max_element(row.begin(), row.end()) - row.begin() ==
            std::max_element(full.begin(), full.end()) - full.begin();
  }
};

TEST_CASE("perplexity: under a policy, every figure is that of the definition") {
  const std::string text = letters(310);
  const std::vector<TokenId> ids = Library().tokenizer.encode(text);
  REQUIRE(ids.size() == 310);
  for (const std::string policy : {"window", "thaw"}) {
    CAPTURE(policy);
    KvFlags flags;
    flags.policy = policy;
    flags.window = 8;
    flags.sinks = 2;
    if (policy == "thaw") flags.epsilon = 0.02f;
    const Expected e(ids, flags);
    std::vector<std::string> args = {"-p",       text,   "-c",       "200", "--prefill", "150",
                                     "--policy", policy, "--window", "8",   "--sinks",   "2"};
    if (policy == "thaw") args.insert(args.end(), {"--epsilon", "0.02"});
    const json j = perplexity_json(args);
    const auto near = [&](const std::string& key, double value, double epsilon = 1e-3) {
      CAPTURE(key);
      CHECK(j[key].get<double>() == doctest::Approx(value).epsilon(epsilon).scale(1e-6));
    };
    const Mean log_ratio = mean_of(e.difference);
    const auto steps = static_cast<double>(e.counters.steps), n = static_cast<double>(e.nll.size());
    const auto cold_read = static_cast<double>(e.counters.cold_bytes_read);
    CHECK(j["tokens"] == e.nll.size());
    CHECK(j["windows"] == 4);
    near("nll_nats", mean_of(e.nll).mean, 1e-5);
    near("full_nll_nats", mean_of(e.nll).mean - log_ratio.mean, 1e-5);
    near("ratio", std::exp(log_ratio.mean), 1e-5);
    near("ratio_se", std::exp(log_ratio.mean) * log_ratio.se);
    near("kl_mean_nats", mean_of(e.kl).mean);
    near("kl_se_nats", mean_of(e.kl).se);
    near("kl_p99_nats", quantile(e.kl, 0.99));
    near("top1_agreement_pct", 100 * e.same / n);
    near("attended_pct", 100 * e.counters.attended / e.counters.visible);
    near("resident_bytes", static_cast<double>(e.usage.resident) / 4);
    near("hot_bytes", static_cast<double>(e.usage.hot) / 4);
    near("ghost_bytes", static_cast<double>(e.usage.ghosts) / 4);
    near("f16_bytes", (3 * 200 + 159) * 256 / 4.0);
    near("resident_pct", 100 * static_cast<double>(e.usage.resident) / ((3 * 200 + 159) * 256));
    near("recalls_per_layer_step", e.counters.recalled / steps / 2);
    near("thaws_per_layer_step", e.counters.thawed / steps / 2);
    near("cold_bytes_per_step", cold_read / steps);
    near("cold_read_pct", 100 * cold_read / e.counters.cold_bytes_visible);
    REQUIRE(j["layers"].size() == 2);
    double hot = 0, recalled = 0;
    for (const json& layer : j["layers"]) {
      hot += layer["hot_tokens"].get<double>() / 2;
      recalled += layer["recalled_tokens_per_step"].get<double>() / 2;
      CHECK(layer["entropy_nats"] > 0.1);
    }
    CHECK(hot >= 10);
    CHECK(hot * 256 <= j["hot_bytes"].get<double>());
    CHECK(recalled == doctest::Approx(e.counters.recalled / steps / 2).epsilon(1e-3).scale(1e-6));
    CHECK(mean_of(e.kl).mean > 1e-5);  // the policy shows
    CHECK(j["attended_pct"].get<double>() < 70);
    CHECK((e.counters.recalled > 0) == (policy == "thaw"));
  }
}

TEST_CASE("perplexity: full beside itself is full") {
  const json j = perplexity_json({"-p", letters(), "--sweep", "policy=full,window", "--prefill",
                                  "100", "--window", "1", "--sinks", "0"});
  REQUIRE(j["results"].size() == 2);
  const json full = j["results"][0], window = j["results"][1];
  CHECK(full["policy"] == "full");
  CHECK(full["tokens"] == 19);
  CHECK(full["ratio"].get<double>() == doctest::Approx(1).epsilon(1e-12));
  CHECK(std::fabs(full["kl_mean_nats"].get<double>()) < 1e-12);
  CHECK(full["top1_agreement_pct"] == 100);
  CHECK(full["attended_pct"] == 100);
  CHECK(full["resident_pct"].get<double>() == doctest::Approx(100));
  CHECK(full["f16_bytes"] == 119 * 2 * 2 * 32 * 2);
  CHECK(window["kl_mean_nats"].get<double>() > 1e-4);
}

TEST_CASE("perplexity: bounds of the hot tier are for the policies that have one") {
  const json j = perplexity_json(
      {"-p", letters(), "--sweep", "policy=full,asr", "--prefill", "100", "--hot-fraction", "0.6"});
  CHECK(j["results"][0]["attended_pct"] == 100);
  CHECK(j["results"][1]["attended_pct"].get<double>() < 65);
}

TEST_CASE("perplexity: a store in another type is compared with f16, policy full or not") {
  testing::TinyOptions wide;
  wide.head_dim = 32;  // a block of q8_0 and q4_0
  testing::write_file(file("wide.gguf"),
                      testing::tiny_gguf(testing::make_tiny_model(wide)).bytes());
  const json j = perplexity_json({"-m", file("wide.gguf"), "-p", letters(), "--prefill", "60",
                                  "--policy", "full", "--sweep", "kv-type=f32,bf16,q8_0,q4_0"});
  REQUIRE(j["results"].size() == 4);
  std::vector<double> kl, resident;
  for (const json& row : j["results"]) {
    CHECK(row["full_nll_nats"] == j["results"][0]["full_nll_nats"]);
    kl.push_back(row["kl_mean_nats"]);
    resident.push_back(row["resident_pct"]);
  }
  CHECK(kl[3] > 3 * kl[2]);
  CHECK(kl[2] > kl[0]);
  CHECK(resident[0] == doctest::Approx(200));
  CHECK(resident[1] == doctest::Approx(100));
  CHECK(resident[2] < 60);
  CHECK(resident[3] < 35);
}

TEST_CASE("perplexity: half of a window is prefilled unless --prefill says otherwise") {
  const RunResult r = perplexity({"-p", letters(), "--policy", "window"});
  CHECK(r.exit_code == 0);
  CHECK(contains(r.err, "prefill  59 tokens, half of a window, and then 60 one by one"));
  CHECK(contains(r.out, "\nwith full   "));
  CHECK(contains(r.out,
                 "tokens      60 decoded one by one in 1 window of 119, each after a prefill "
                 "of 59\n"));
  CHECK(perplexity({"-p", letters(), "--policy", "window", "-q"}).err.empty());
}

TEST_CASE("perplexity: --no-full gives the same figures without the comparison") {
  std::vector<std::string> args = {"-p", letters(), "--policy", "window", "--prefill", "20"};
  const json with = perplexity_json(args);
  args.push_back("--no-full");
  const json without = perplexity_json(args);
  CHECK(without["nll_nats"].get<double>() ==
        doctest::Approx(with["nll_nats"].get<double>()).epsilon(1e-12));
  CHECK(without["attended_pct"] == with["attended_pct"]);
  CHECK(without["resident_bytes"] == with["resident_bytes"]);
  CHECK_FALSE(without.contains("ratio"));
  CHECK_FALSE(contains(perplexity(args).out, "ratio"));
}

TEST_CASE("perplexity: a comparison can be stopped after any batch of a prefill") {
  Library library;
  const std::vector<TokenId> ids = library.tokenizer.encode(letters());
  Transformer transformer(library.model, 1, 16);
  KvFlags flags;
  flags.policy = "window";
  std::vector<std::unique_ptr<KvStore>> stores;
  stores.push_back(library.store(flags, 100));
  flags.policy = "full";
  const std::unique_ptr<KvStore> full = library.store(flags, 100);
  const DecodeWindows windows{.context = 100, .prefill = 50, .stride = 50, .most = 1};
  const auto stop_after = [&](int calls) {
    return compare_policies(transformer, stores, full.get(), ids, windows, [&](int, int decoded) {
      CHECK(decoded == 0);
      return --calls > 0;
    });
  };
  CHECK(stop_after(2).interrupted);
  CHECK(full->length() == 32);
  CHECK(stop_after(7).interrupted);
  CHECK(full->length() == 50);
  CHECK(stores[0]->length() == 48);
}

TEST_CASE("perplexity: a sweep runs every combination as it would run alone") {
  const std::string csv = file("sweep.csv"), svg = file("sweep.svg"), page = file("sweep.html");
  const std::vector<std::string> base = {"-p", letters(), "--policy", "window", "--prefill", "60"};
  std::vector<std::string> args = base;
  args.insert(args.end(),
              {"--sweep", "window=4,16", "--sweep", "sinks=0,2", "--csv", csv, "--plot", svg});
  const json j = perplexity_json(args);
  REQUIRE(j["results"].size() == 4);
  const json third = j["results"][2];
  CHECK(third["window"] == "16");
  CHECK(third["sinks"] == "0");
  args = base;
  args.insert(args.end(), {"--window", "16", "--sinks", "0"});
  json alone = perplexity_json(args);
  for (const char* key : {"nll_nats", "kl_mean_nats", "ratio_se", "attended_pct", "resident_pct"})
    CHECK(alone[key] == third[key]);

  std::istringstream lines(slurp(csv));
  std::vector<std::string> read;
  for (std::string line; std::getline(lines, line);) read.push_back(line);
  REQUIRE(read.size() == 5);
  CHECK(read[0].starts_with("window,sinks,policy,kv_type,perplexity,perplexity_se,nll_nats"));
  CHECK(read[3].starts_with("16,0,window,f16," + third["perplexity"].dump() + ","));
  CHECK(contains(slurp(svg), ">16 0</text>"));
  args = base;
  args.insert(args.end(), {"--sweep", "window=4,16", "--plot", page});
  const RunResult r = perplexity(args);
  CHECK(r.out.starts_with("| window | resident % | attended % |"));
  CHECK(slurp(page).starts_with("<!doctype html>"));
  CHECK(contains(slurp(page), "<td>16</td>"));
}

TEST_CASE("perplexity: a file that cannot be completed costs no figures") {
  TinyCli::get().model();  // is written before files must be small
  const testing::FileLimit limit(20);
  const std::string csv = file("large.csv");
  const RunResult r = perplexity({"-p", letters(), "--policy", "window", "--csv", csv});
  CHECK(r.exit_code == 1);
  CHECK(contains(r.err, "thaw: " + csv + ": cannot write: File too large\n"));
  CHECK(contains(r.out, "\nwith full   "));
}

TEST_CASE("perplexity: flags of policies that make no sense are told before anything is computed") {
  const auto fails = [](std::vector<std::string> args, const std::string& message,
                        int exit_code = 2) {
    args.insert(args.begin(), {"-p", letters()});
    check_fails(args, exit_code, message);
  };
  fails({"--policy", "window", "--prefill", "119"}, "-p: expected at least 121 tokens with", 1);
  fails({"--policy", "window", "-c", "40", "--prefill", "40"},
        "--prefill: expected less than the 40 tokens of a window, found 40");
  fails({"--policy", "window", "-c", "40", "--stride", "19"},
        "--stride: expected at least the 20 tokens that a window decodes, found 19");
  fails({"--sweep", "window"}, "--sweep: expected NAME=VALUE,VALUE,..., found window");
  fails({"--sweep", "window=-1"}, "--window: expected a whole number");
  fails({"--sweep", "windoww=1"}, "unknown flag --windoww (did you mean --window?)");
  fails({"--policy", "window", "--plot", "x.png"}, "--plot: expected FILE.svg or FILE.html");
  fails({"--policy", "window", "--plot", "x.svg", "--no-full"}, "--plot: expected the comparison");
  fails({"--policy", "window", "--csv", file("no/x.csv")}, "no/x.csv: cannot write", 1);
}

}  // namespace
}  // namespace thaw
