// Flags that are refused before anything is computed, and what is told of the input.
#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/check_fails.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;

std::string tiny() { return TinyCli::get().model(); }
std::string file(const std::string& name) { return TinyCli::get().path(name); }

void check_usage(const std::vector<std::string>& args, const std::string& message) {
  testing::check_fails(args, 2, message);
}

TEST_CASE("cli: the ends of a range are in it") {
  for (const auto& [flag, value] : {std::pair{"--repeat-penalty", "0.01"},
                                    {"--repeat-penalty", "100"},
                                    {"--presence-penalty", "-1000"},
                                    {"--frequency-penalty", "1000"},
                                    {"--softness", "0.01"}}) {
    CAPTURE(flag);
    CAPTURE(value);
    CHECK(run_thaw({"generate", "-m", tiny(), "-p", "aaa", "-n", "9", "--ignore-eos", "--policy",
                    "asr", flag, value})
              .exit_code == 0);
  }
}

TEST_CASE("cli: a flag that nothing would read is wrong usage") {
  const std::string m = tiny();
  const std::string never = ": expected another --policy than full, which never freezes";
  check_usage({"generate", "-m", m, "-p", "a", "--policy", "full", "--epsilon", "1e-3"},
              "--epsilon" + never);
  check_usage({"logits", "-m", m, "-p", "a", "-o", "x", "--policy", "full", "--window", "9"},
              "--window" + never);
  check_usage({"perplexity", "-m", m, "-p", "abc", "--sweep", "epsilon=1e-3,3e-3"},
              "--epsilon" + never);
  check_usage({"perplexity", "-m", m, "-p", "abc", "--preset", "economy"}, "--preset" + never);
  check_usage({"bench", "-m", m, "--softness", "1"}, "--softness" + never);
  check_usage({"needle", "-m", m, "--policy", "full", "--hot-tokens", "40"},
              "--hot-tokens" + never);
  check_usage({"generate", "-m", m, "-p", "a", "--policy", "window", "--epsilon", "1e-3"},
              "--epsilon: expected --policy thaw, which alone reads it");
  check_usage({"needle", "-m", m, "--policy", "full,thaw", "--softness", "1"},
              "--softness: expected --policy asr, which alone reads it");
  check_usage({"generate", "-m", m, "-p", "a", "--policy", "full", "--recovery", "rewalk"},
              "--recovery" + never);
  check_usage({"bench", "-m", m, "--weights", "q8_0"}, "--weights needs --random");
  check_usage({"generate", "-m", m, "-p", "a", "--recovery-z", "2"},
              "--recovery-z needs --recovery");
  check_usage({"generate", "-m", m, "-p", "a", "--recovery", "soft", "--rewalk-tokens", "2"},
              "--rewalk-tokens needs --recovery rewalk");
  check_usage({"needle", "-m", m, "-f", "x", "--filler", "repeat"},
              "expected -f or --filler, found both");
  check_usage({"needle", "-m", m, "--prefill-all", "--prefill", "3"},
              "expected --prefill or --prefill-all, found both");
  for (const char* command : {"perplexity", "logits", "bench", "needle"})
    check_usage({command, "-m", m, "-v"}, "unknown flag -v");
}

TEST_CASE("cli: an empty path is wrong usage, and the flag is named") {
  const std::string m = tiny();
  for (const auto& [command, flag] : {std::pair{"generate", "--cold-file"},
                                      {"generate", "--file"},
                                      {"generate", "--report"},
                                      {"generate", "--trace"},
                                      {"perplexity", "--csv"},
                                      {"perplexity", "--plot"},
                                      {"needle", "--html"},
                                      {"needle", "--file"},
                                      {"bench", "--file"},
                                      {"logits", "--tokens"}}) {
    check_usage({command, "-m", m, flag, ""}, std::string(flag) + ": expected a path, found \"\"");
  }
}

TEST_CASE("generate: bytes that no token spells are told, in a chat, too") {
  auto files = testing::tiny_hf(testing::make_tiny_model());
  nlohmann::json tokenizer = nlohmann::json::parse(files["tokenizer.json"]);
  nlohmann::json& vocab = tokenizer["model"]["vocab"];
  vocab["QQQ"] = vocab["Q"];  // in its place
  vocab.erase("Q");
  files["tokenizer.json"] = tokenizer.dump();
  testing::save(file("mute"), files);
  const auto warnings = [](std::vector<std::string> args) {
    args.insert(args.begin(), {"generate", "-m", file("mute"), "-n", "1", "-q"});
    const RunResult r = run_thaw(args);
    CHECK(r.exit_code == 0);
    return r.err;
  };
  const std::string lost = " that this vocabulary cannot spell\n";
  CHECK(warnings({"-p", "aQ"}) == "warning: -p: 1 byte" + lost);
  CHECK(warnings({"--chat", "-p", "QaQ"}) == "warning: -p: 2 bytes" + lost);
  CHECK(warnings({"--chat", "-p", "a", "--system", "Q"}) == "warning: --system: 1 byte" + lost);
  CHECK(warnings({"--chat", "-p", "a", "--system", ""}).empty());
}

}  // namespace
}  // namespace thaw
