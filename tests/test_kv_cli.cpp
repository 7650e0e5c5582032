// Budgets and cold files that cannot be, as a user types them: one line, and exit 1 or 2.
#include <doctest/doctest.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "cli/kv_flags.h"
#include "tests/file_limit.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw::testing {
namespace {

std::string run_out(const std::vector<std::string>& kv_args, int exit_code) {
  auto& files = TinyCli::get();
  std::vector<std::string> args = {"generate", "-m", files.model(), "-p", "abc", "-n", "3"};
  args.insert(args.end(), kv_args.begin(), kv_args.end());
  const RunResult result = run_thaw(args);
  CAPTURE(result.err);
  CHECK(result.exit_code == exit_code);
  CHECK(result.out.empty());
  CHECK(std::count(result.err.begin(), result.err.end(), '\n') == 1);
  return result.err;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace

TEST_CASE("kv flags: a budget that cannot be is refused in one line") {
  CHECK(contains(run_out({"--hot-tokens", "0", "--ghost", "off", "--policy", "thaw"}, 2),
                 "--hot-tokens"));
  CHECK(contains(run_out({"--hot-tokens", "1", "--policy", "thaw"}, 1),
                 "--hot-tokens: expected room for at least 21 tokens a layer"));
  CHECK(contains(run_out({"--hot-bytes", "1", "--policy", "h2o"}, 1), "--hot-bytes"));
  CHECK(contains(run_out({"--hot-bytes", "0", "--policy", "thaw"}, 2), "--hot-bytes"));
  CHECK(contains(run_out({"--hot-fraction", "0", "--policy", "thaw"}, 2), "--hot-fraction"));
  CHECK(contains(run_out({"--hot-fraction", "1.5", "--policy", "thaw"}, 2), "--hot-fraction"));
  CHECK(contains(run_out({"--hot-tokens", "64", "--hot-bytes", "1M", "--policy", "thaw"}, 2),
                 "at most one"));
  CHECK(contains(run_out({"--hot-tokens", "64", "--policy", "full"}, 2),
                 "--hot-tokens: expected another --policy than full"));
  CHECK(contains(run_out({"-c", "64", "--window", "65", "--policy", "thaw"}, 2),
                 "--window: expected at most the context of 64 tokens, found 65"));
  CHECK(contains(run_out({"-c", "64", "--sinks", "65", "--policy", "thaw"}, 2), "--sinks"));
  CHECK(contains(run_out({"--caution", "-1", "--policy", "thaw"}, 2), "--caution"));
  CHECK(contains(run_out({"--verify", "-1"}, 2), "--verify"));
  CHECK(contains(run_out({"--verify", "8", "--recovery", "soft"}, 2), "without --recovery"));
  CHECK(contains(run_out({"--ghost", "k5v2", "--policy", "thaw"}, 2), "--ghost"));
  CHECK(contains(run_out({"--kv-type", "q8_0", "--policy", "thaw"}, 1), "head_dim"));
}

TEST_CASE("kv flags: heads that are too wide for ghosts are told what runs without") {
  const std::string wide = TinyCli::get().path("wide-heads.gguf");
  write_file(wide, tiny_gguf(make_tiny_model({.head_dim = 258})).bytes());
  const auto run = [&](const std::vector<std::string>& kv_args) {
    std::vector<std::string> args = {"generate", "-m", wide, "-p", "abc", "-n", "3", "-q"};
    args.insert(args.end(), kv_args.begin(), kv_args.end());
    return run_thaw(args);
  };
  const RunResult refused = run({"--policy", "thaw"});
  CHECK(refused.exit_code == 1);
  CHECK(contains(refused.err,
                 "--ghost: expected a head_dim of at most 256, or --ghost off or "
                 "--policy full, found a head_dim of 258\n"));
  CHECK(run({"--policy", "thaw", "--ghost", "off"}).exit_code == 0);
  CHECK(run({"--policy", "full"}).exit_code == 0);
}

TEST_CASE("generate: --json says counts that are means of lanes with at most six decimals") {
  const std::string three = TinyCli::get().path("three-lanes.gguf");
  const TinyOptions options = {.dim = 96, .n_heads = 6, .n_kv_heads = 3};
  write_file(three, tiny_gguf(make_tiny_model(options)).bytes());
  const RunResult result =
      run_thaw({"generate", "-m", three, "-p", std::string(200, 'a'), "-n", "60", "--policy",
                "thaw", "--window", "8", "--sinks", "2", "--epsilon", "0.0001", "--freeze-from",
                "130", "--ignore-eos", "--json"});
  const nlohmann::json json = nlohmann::json::parse(result.out);
  for (const char* key : {"recalled_tokens", "thawed_tokens"}) {
    CAPTURE(key);
    const std::string shown = json[key].dump();
    CAPTURE(shown);
    CHECK(json[key] > 0);
    CHECK(shown.size() - shown.find('.') <= 7);
  }
}

TEST_CASE("kv flags: a preset has its own caution, which --caution replaces") {
  KvFlags flags;
  flags.policy = "thaw";
  CHECK(flags.options().policy.caution == 3);
  flags.preset = "economy";
  CHECK(flags.options().policy.caution == 1.5f);
  flags.caution = 0;
  CHECK(flags.options().policy.caution == 0);
}

TEST_CASE("kv flags: --verify writes what full writes, and says how often it checked") {
  const auto text = [](const std::vector<std::string>& kv_args) {
    std::vector<std::string> args = {
        "generate", "-m", TinyCli::get().model(), "-p",     "abcdefghijklmnop",
        "-n",       "40", "--ignore-eos",         "--seed", "5",
        "--json",   "-q"};
    args.insert(args.end(), kv_args.begin(), kv_args.end());
    const RunResult result = run_thaw(args);
    CAPTURE(result.err);
    REQUIRE(result.exit_code == 0);
    return nlohmann::json::parse(result.out);
  };
  const std::vector<std::string> window = {"--policy", "window",       "--window",
                                           "4",        "--hot-tokens", "9"};
  std::vector<std::string> verified = window;
  verified.insert(verified.end(), {"--verify", "6"});
  const nlohmann::json full = text({"--policy", "full", "--verify", "6"}), drafts = text(window);
  const nlohmann::json checked = text(verified);
  CHECK(drafts["tokens"] != full["tokens"]);
  CHECK(checked["tokens"] == full["tokens"]);
  CHECK(checked["text"] == full["text"]);
  CHECK(full["checks"] == 0);
  CHECK(drafts["checks"] == 0);
  CHECK(checked["checks"] >= 7);
  CHECK(checked["corrected"] > 0);
}

TEST_CASE("kv flags: a cold file that cannot be made or filled is named, and nothing is left") {
  const TemporaryDirectory directory;
  const std::string path = directory.path().string();
  CHECK(contains(run_out({"--cold-file", path}, 1), "cold file " + path));
  CHECK(contains(run_out({"--cold-file", path + "/no/cold"}, 1), "No such file or directory"));
  const FileLimit limit(1000);
  CHECK(contains(run_out({"--cold-file", path + "/cold"}, 1), "no room for the cold tier"));
  CHECK(std::filesystem::is_empty(directory.path()));
}

}  // namespace thaw::testing
