// --report, --trace and --heat, as a user types them.
#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/heat.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::read_file;
using testing::run_thaw;
using testing::RunOptions;
using testing::RunResult;
using testing::TemporaryDirectory;
using testing::TinyCli;

const std::string kPrompt =
    "a prompt <|im_start|> </script> of some forty tokens, so that there is "
    "something to freeze";

RunResult generate(std::vector<std::string> args, const RunOptions& options = {}) {
  args.insert(args.begin(), {"generate", "-m", TinyCli::get().model(), "-p", kPrompt, "--temp", "0",
                             "--ignore-eos"});
  if (std::find(args.begin(), args.end(), "full") == args.end())
    args.insert(args.end(), {"--freeze-from", "0"});
  return run_thaw(args, options);
}

json page_data(const std::filesystem::path& path) {
  const std::string html = read_file(path);
  const std::string open = R"(id="data">)";
  const std::size_t from = html.find(open) + open.size();
  return json::parse(html.substr(from, html.find("</script>", from) - from));
}

std::size_t files_in(const std::filesystem::path& directory) {
  std::size_t n = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) n += entry.exists();
  return n;
}

TEST_CASE("generate --report writes the text, the policy and a step for each token") {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "map.html";
  const RunResult plain = generate({"-n", "20", "--policy", "thaw", "--window", "8", "--json"});
  const RunResult r = generate(
      {"-n", "20", "--policy", "thaw", "--window", "8", "--json", "--report", path.string()});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const json run = json::parse(r.out), data = page_data(path);
  CHECK(run["text"] == json::parse(plain.out)["text"]);  // watching changes nothing
  CHECK(run["logits_fingerprint"] == json::parse(plain.out)["logits_fingerprint"]);
  std::string text;
  for (const json& token : data["tokens"]) text += token.get<std::string>();
  CHECK(text.starts_with(kPrompt));
  CHECK(data["prompt"] == run["prompt_tokens"]);
  CHECK(data["tokens"].size() == run["prompt_tokens"].get<std::size_t>() + 20);
  CHECK(data["steps"] == 19);  // the last token was never fed back
  CHECK(data["layers"] == 2);
  CHECK(data["length"][18] == run["context_tokens"]);
  CHECK(data["parameters"][0] == json::parse(R"(["policy", "thaw"])"));
  CHECK(data["output"].size() == 19);
  CHECK(!data["output"][0].is_null());
  CHECK(files_in(directory.path()) == 1);
}

TEST_CASE("With --policy full every token is hot all the time") {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "map.html";
  REQUIRE(generate({"-n", "5", "--policy", "full", "--report", path.string()}).exit_code == 0);
  const json hot = page_data(path)["hot"];
  for (const json& permille : hot) CHECK(permille == 1000);
}

TEST_CASE("generate --trace names phases, and every op of every layer") {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "trace.json";
  const RunResult r = generate({"-n", "6", "--policy", "thaw", "--trace", path.string()});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  std::map<std::string, int> spans;
  const json trace = json::parse(read_file(path));
  for (const json& event : trace["traceEvents"]) {
    if (event["ph"] == "X") ++spans[event["name"].get<std::string>()];
  }
  CHECK(spans["prefill"] == 1);
  CHECK(spans["decode"] == 5);
  CHECK(spans["sample"] == 6);
  CHECK(spans["attn_out"] == 2 * 6);
  CHECK(spans["logits"] == 6);
}

TEST_CASE("An interrupted run leaves a whole trace and a whole page") {
  const TemporaryDirectory directory;
  const auto trace = directory.path() / "trace.json", page = directory.path() / "map.html";
  const RunResult r = generate({"-n", "-1", "--trace", trace.string(), "--report", page.string()},
                               {.interrupt_after = 10});
  CHECK(r.exit_code == 130);
  CHECK(json::parse(read_file(trace))["traceEvents"].size() > 10);
  CHECK(page_data(page)["steps"] > 0);
  CHECK(files_in(directory.path()) == 2);
}

TEST_CASE("A report or trace that cannot be written ends the run before it begins") {
  const TemporaryDirectory directory;
  const std::string nowhere = (directory.path() / "no" / "file").string();
  for (const std::string flag : {"--report", "--trace"}) {
    CAPTURE(flag);
    const RunResult missing = generate({"-n", "2", flag, nowhere});
    CHECK(missing.exit_code == 1);
    CHECK(missing.out.empty());
    CHECK(missing.err == "thaw: " + nowhere + ": cannot write: No such file or directory\n");
    const RunResult taken = generate({"-n", "2", flag, directory.path().string()});
    CHECK(taken.exit_code == 1);
    CHECK(taken.err == "thaw: " + directory.path().string() +
                           ": expected a regular file or none to write, found a directory\n");
  }
  CHECK(files_in(directory.path()) == 0);
}

TEST_CASE("--heat colours the text on standard error, and only when that is wanted") {
  const RunResult quiet = generate({"-n", "4", "--heat"});
  CHECK(quiet.err.find("\x1b[") == std::string::npos);
  ::setenv("CLICOLOR_FORCE", "1", 1);
  const RunResult r = generate({"-n", "4", "--heat"});
  ::unsetenv("CLICOLOR_FORCE");
  CHECK(r.exit_code == 0);
  CHECK(r.out == quiet.out);
  CHECK(r.err.find("share of its steps that a token was hot") != std::string::npos);
  CHECK(r.err.find(kPrompt) != std::string::npos);  // it is too short for anything to freeze
}

TEST_CASE("Heat takes its colour from the share and ends it before a newline") {
  const std::vector<std::string> texts = {"cold", "\n", "hot", "hot\n", "hot"};
  const std::vector<double> shares = {0, 0, 1, 1, 1};
  const std::string heat = heat_text(texts, shares);
  const std::string text = heat.substr(heat.find('\n') + 1);
  const std::string ice = "\x1b[48;5;18;38;5;153m", ember = "\x1b[48;5;202;38;5;16m",
                    off = "\x1b[0m\n";
  CHECK(text == ice + "cold" + off + ember + "hothot" + off + ember + "hot" + off);
}

}  // namespace
}  // namespace thaw
