// Texts with keys, what is made of answers, and the grid on a tiny and on a real model.
#include <doctest/doctest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "cli/needle_report.h"
#include "cli/needle_text.h"
#include "cli/tokenizer_source.h"
#include "device/error.h"
#include "tests/file_limit.h"
#include "tests/run_thaw.h"
#include "tests/sanitized.h"
#include "tests/tiny_cli.h"
#include "tests/weights.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;

const Tokenizer& tokenizer() {
  static const Tokenizer instance = load_tokenizer(std::filesystem::path(TinyCli::get().model()));
  return instance;
}

NeedleSpec spec_of(std::vector<double> depths, int context = 3000) {
  NeedleSpec spec;
  spec.context = context;
  spec.depths = std::move(depths);
  return spec;
}

std::string text_of(const NeedleText& text) { return tokenizer().decode(text.tokens, true); }

TEST_CASE("needle: a text fills its context, and each key stands at its depth, told twice") {
  const NeedleSpec spec = spec_of({0, 0.25, 1});
  const NeedleText text = make_needle_text(tokenizer(), spec);
  CHECK(text.tokens.size() <= 3000);
  CHECK(text.tokens.size() > 2880);  // a sentence of this tokenizer's is about 80 tokens
  REQUIRE(text.keys.size() == 3);
  for (const NeedleKey& key : text.keys) {
    CHECK(key.digits.size() == 7);
    CHECK(key.digits[0] != '0');
    const std::string from = tokenizer().decode(
        std::vector<TokenId>(text.tokens.begin() + key.position, text.tokens.end()));
    const std::string said = " The pass key of " + key.owner + " is " + key.digits +
                             ". Remember it. " + key.digits + " is the pass key of " + key.owner +
                             ".";
    CHECK(from.substr(0, said.size()) == said);
  }
  CHECK(text.keys[0].owner != text.keys[1].owner);
  CHECK(text.keys[1].position > 0.2 * 3000);
  CHECK(text.keys[1].position < 0.4 * 3000);
  CHECK(text_of(text).ends_with(" is the pass key of " + text.keys[2].owner + "."));
}

TEST_CASE("needle: the same seed gives the same text, another one other keys and sentences") {
  NeedleSpec spec = spec_of({0.5});
  const NeedleText text = make_needle_text(tokenizer(), spec);
  CHECK(make_needle_text(tokenizer(), spec).tokens == text.tokens);
  spec.seed = 2;
  const NeedleText other = make_needle_text(tokenizer(), spec);
  CHECK(other.keys[0].digits != text.keys[0].digits);
  CHECK(other.tokens != text.tokens);
}

TEST_CASE("needle: made-up sentences differ, repeated ones repeat, a user's text is his") {
  const auto sentences = [](const NeedleSpec& spec) {
    std::istringstream in(text_of(make_needle_text(tokenizer(), spec)));
    std::multiset<std::string> found;
    for (std::string line; std::getline(in, line, '.');) found.insert(line);
    return found;
  };
  NeedleSpec spec = spec_of({0.5});
  const auto made_up = sentences(spec);
  std::set<std::string> distinct(made_up.begin(), made_up.end());
  CHECK(made_up.size() > 30);
  CHECK(distinct.size() == made_up.size());
  spec.filler = Filler::kRepeated;
  CHECK(sentences(spec).count(" The grass is green") > 10);
  spec.filler = Filler::kText;
  for (int i = 0; i < 400; ++i) spec.text += "Line " + std::to_string(i) + ".\n";
  CHECK(sentences(spec).count("\nLine 17") == 1);
}

TEST_CASE("needle: distractors are numbers of other things, and the key stays the only pass key") {
  NeedleSpec spec = spec_of({0.5});
  spec.distractors = 4;
  const NeedleText text = make_needle_text(tokenizer(), spec);
  const std::string all = text_of(text);
  CHECK(text.keys.size() == 1);
  for (const char* part : {" The phone number of Ivan is ", " The ticket number of Julia is ",
                           " The account number of Karl is ", " The locker code of Laura is "}) {
    CHECK(all.find(part) != std::string::npos);
  }
  CHECK(all.find("pass key is") == all.rfind("pass key is"));
  CHECK(text.tokens.size() <= 3000);
}

TEST_CASE("needle: what does not fit is an error that says what would") {
  CHECK_THROWS_WITH_AS(make_needle_text(tokenizer(), spec_of({0.5}, 100)),
                       "--context: expected at least 165 tokens, which the keys and the rest take "
                       "without filler, found 100",
                       UsageError);
  NeedleSpec spec = spec_of({0.5}, 1000);
  spec.filler = Filler::kText;
  spec.text = "Too short.";
  CHECK_THROWS_WITH_AS(make_needle_text(tokenizer(), spec),
                       "-f: expected a text of at least 835 tokens, found 9", UsageError);
}

TEST_CASE("needle: in a chat, context and questions are what the template makes of the messages") {
  NeedleSpec spec = spec_of({0.5}, 600);
  spec.chat = true;
  const NeedleText text = make_needle_text(tokenizer(), spec);
  const std::string all =
      text_of(text) +
      tokenizer().decode(needle_question(tokenizer(), text.keys[0], true, false), true);
  const std::string user = "<|im_start|>user\n";
  const std::size_t begin = all.find(user) + user.size();
  const std::string message = all.substr(begin, all.find("<|im_end|>", begin) - begin);
  CHECK(message.ends_with("\n\nWhat is the pass key?"));
  const std::vector<TokenId> rendered =
      encode_chat(tokenizer(), recognise_chat_format(tokenizer()), {{"user", message}});
  CHECK(all == tokenizer().decode(rendered, true) + "The pass key is");

  CHECK(tokenizer().decode(needle_question(tokenizer(), text.keys[0], true, true), true) ==
        "<|im_end|>\n<|im_start|>user\nWhat is the pass key?<|im_end|>\n<|im_start|>assistant\n"
        "The pass key is");
}

TEST_CASE("needle: an answer is its first number, compared digit by digit") {
  CHECK(first_number(" is 123. Remember 456") == "123");
  CHECK(first_number("none") == "");
  CHECK(digits_right("1234567", "1234567") == 7);
  CHECK(digits_right("1934", "1234567") == 3);
  CHECK(digits_right("12345678", "1234567") == 7);
  CHECK(digits_right("", "1234567") == 0);
}

NeedleRun run_of(const std::string& policy, const std::vector<std::string>& numbers) {
  NeedleRun run;
  run.policy = policy;
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    NeedleAnswer a;
    a.context = i < 2 ? 1500 : 4096;
    a.key = {"", "77", i % 2 == 0 ? 0.25 : 0.75, 0};
    a.number = numbers[i];
    a.text = numbers[i] + " <b>&";
    a.share = digits_right(a.number, "77") / 2.0;
    a.least_lead = 0.5 + static_cast<double>(i);
    run.answers.push_back(a);
  }
  run.n_layers = 2;
  run.usage.resident = 30, run.f16_bytes = 100;
  run.counters.steps = 10, run.counters.attended = 5, run.counters.visible = 20;
  run.counters.recalled = 50;
  return run;
}

TEST_CASE("needle: the text report has a cell for each context and depth, and the comparison") {
  const std::vector<NeedleRun> runs = {run_of("full", {"77", "77", "71", "77"}),
                                       run_of("thaw", {"77", "", "77", "77"})};
  const std::string kMeans =
      "; resident 30 % of f16, 25 % attended exactly, 2.5 recalls a layer and step";
  CHECK(needle_text_report(runs, false) ==
        "full           25 %   75 %\n"
        "       1500     100    100\n"
        "       4096      50    100\n"
        "3 of 4 answers right, 88 % of the digits" +
            kMeans +
            "\n\n"
            "thaw           25 %   75 %\n"
            "       1500     100      0\n"
            "       4096     100    100\n"
            "3 of 4 answers right, 75 % of the digits" +
            kMeans +
            "\n\n"
            "thaw answers 2 of the 3 that full answers, and all where full's tokens led by more "
            "than 1.500 nats\n");
  CHECK(needle_text_report(runs, true).find("\x1b[30;48;2;76;175;80m    100\x1b[0m") !=
        std::string::npos);
  const NeedleAgreement a = agreement(runs[1], runs[0]);
  CHECK(a.reference == 3);
  CHECK(a.both == 2);
  CHECK(a.lead == 1.5);
  std::vector<NeedleRun> talk = {run_of("full", {"77", "77"}), run_of("thaw", {"1", "2"})};
  for (NeedleRun& run : talk) run.answers[1].question = 2;
  CHECK(agreement(talk[1], talk[0]).lead == 0.5);
  CHECK(needle_text_report({runs[1], run_of("full", {"77", "1", "77", "77"})}, false)
            .ends_with("thaw answers everything that full answers: 3\n"));
}

TEST_CASE("needle: the page holds every answer as text, and valid UTF-8") {
  NeedleRun run = run_of("full", {"77", "12"});
  run.answers[1].text = "12\xff\xc3<script>";
  const std::string page = needle_page({run}, "a & b");
  CHECK(page.find("a &amp; b") != std::string::npos);
  CHECK(page.find("77 &lt;b&gt;&amp;") != std::string::npos);
  CHECK(page.find("<script") == std::string::npos);
  CHECK(page.find("12\xef\xbf\xbd") != std::string::npos);
  CHECK(page.find('\xff') == std::string::npos);
  CHECK(page.find("http") == std::string::npos);
}

RunResult run(std::vector<std::string> args) {
  args.insert(args.begin(), {"needle", "-m", TinyCli::get().model()});
  return run_thaw(args);
}

TEST_CASE("needle: --json has each depth once and second questions about the next key") {
  const RunResult r = run({"--context", "900,700", "--depths", "3", "--needles", "2", "--second",
                           "--digits", "3", "--policy", "full", "--json", "-q"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const json j = json::parse(r.out);
  REQUIRE(j["policies"].size() == 1);
  const json& answers = j["policies"][0]["answers"];
  CHECK(j["policies"][0]["asked"] == answers.size());
  std::multiset<std::string> cells;
  for (const json& a : answers) {
    CHECK(a["key"].get<std::string>().size() == 3);
    CHECK(a["least_lead_nats"] > 0);
    cells.insert(a["context_tokens"].dump() + " " +
                 std::to_string(a["depth_percent"].get<double>()).substr(0, 2) + " " +
                 a["question"].dump());
  }
  CHECK(cells == std::multiset<std::string>{"700 16 1", "700 50 1", "700 83 1", "700 16 2",
                                            "700 50 2", "700 83 2", "900 16 1", "900 50 1",
                                            "900 83 1", "900 16 2", "900 50 2", "900 83 2"});
}

TEST_CASE("needle: wrong lists and numbers are wrong usage") {
  const auto error = [](std::vector<std::string> args) {
    const RunResult r = run(std::move(args));
    CHECK(r.exit_code == 2);
    CHECK(r.out.empty());
    return r.err;
  };
  const std::string numbers = ": expected whole numbers from ";
  CHECK(error({"--context", "1500,x"})
            .find("--context" + numbers +
                  "1 to 16777216 between commas, "
                  "found \"1500,x\"") != std::string::npos);
  CHECK(error({"--context", ""}).find("--context" + numbers) != std::string::npos);
  CHECK(error({"--depths", "0"}).find("--depths: expected at least 1 place, found 0") !=
        std::string::npos);
  CHECK(error({"--depths", "10,101"}).find("--depths" + numbers + "0 to 100") != std::string::npos);
  CHECK(error({"--digits", "65"}).find("--digits") != std::string::npos);
}

TEST_CASE("needle: recovery is watched under the policies that freeze, and reported") {
  const RunResult r = run({"--context", "400", "--depths", "1", "--policy", "full,asr",
                           "--recovery", "full", "--recovery-z", "0.1", "--json", "-q"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const json j = json::parse(r.out)["policies"];
  CHECK(j[0]["policy"] == "full");
  CHECK(j[0]["recovery_alarms"] == 0);
  CHECK(j[0]["attended_pct"] == 100);
  CHECK(j[0]["answers_all_that_full_answers"] == true);
  CHECK(j[1]["policy"] == "asr");
  CHECK(j[1]["recovery_alarms"] > 3);
  CHECK(j[1]["right_under_full"] == j[0]["right"]);
  const json& answer = j[1]["answers"][0];
  REQUIRE(!answer["recovery"].empty());
  for (const json& fired : answer["recovery"]) CHECK(fired["token"] > 300);
}

TEST_CASE("needle: bounds of the hot tier are for the policies that have one") {
  const RunResult r = run({"--context", "400", "--depths", "1", "--policy", "full,h2o",
                           "--hot-tokens", "40", "--json", "-q"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  CHECK(json::parse(r.out)["policies"][1]["attended_pct"] < 30);
}

TEST_CASE("needle: a page that cannot be written is told first, and later costs no answers") {
  const std::string nowhere = TinyCli::get().path("no/x.html");
  const RunResult early = run({"--context", "10", "--html", nowhere});  // no text is so short
  CHECK(early.exit_code == 1);
  CHECK(early.err == "thaw: " + nowhere + ": cannot write: No such file or directory\n");
  const std::string page = TinyCli::get().path("large.html");
  const testing::FileLimit limit(100);
  const RunResult late =
      run({"--context", "400", "--depths", "1", "--policy", "full", "--html", page, "-q"});
  CHECK(late.exit_code == 1);
  CHECK(late.err == "thaw: " + page + ": cannot write: File too large\n");
  CHECK(late.out.find("of 1 answer right") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(page));
}

// Under sanitizers they take minutes, and go the ways of the small models.
TEST_CASE("needle: the real model finds its keys, and a page shows them" *
          doctest::skip(testing::sanitized())) {
  const auto model = weights_file(kSmolLM2File);
  if (!model) return;
  const std::string page = TinyCli::get().path("needle.html");
  const RunResult r = run_thaw({"needle", "-m", model->string(), "--context", "400", "--needles",
                                "2", "--depths", "30,70", "--html", page});
  CAPTURE(r.err);
  CAPTURE(r.out);
  CHECK(r.exit_code == 0);
  for (const char* part :
       {"full           30 %   70 %\n        400     100    100\n2 of 2 answers right, ",
        "thaw           30 %   70 %\n        400     100    100\n2 of 2 answers right, ",
        "thaw answers everything that full answers: 2\n"}) {
    CHECK(r.out.find(part) != std::string::npos);
  }
  std::ifstream in(page);
  std::stringstream html;
  html << in.rdbuf();
  CHECK(html.str().find("<td class=\"right\">") != std::string::npos);
}

TEST_CASE("needle: a rewalk finds the key that a policy which forgets has lost without it" *
          doctest::skip(testing::sanitized())) {
  const auto model = weights_file(kSmolLM2File);
  if (!model) return;
  const auto answer = [&](const std::string& recovery) {
    const RunResult r = run_thaw({"needle", "-m", model->string(), "--context", "300", "--depths",
                                  "25,25", "--prefill", "32", "--policy", "window", "--recovery",
                                  recovery, "--recovery-z", "1.5", "--json", "-q"});
    CAPTURE(r.err);
    REQUIRE(r.exit_code == 0);
    return json::parse(r.out)["policies"][0]["answers"][0];
  };
  const json lost = answer("off"), found = answer("rewalk");
  CHECK(lost["digits_right_share"] == 0);
  CHECK(lost["recovery"].empty());
  CHECK(found["right"] == true);
  CHECK(found["recovery"].back()["rung"] == "rewalk");
}

TEST_CASE("needle: a policy that forgets finds the key where its tokens are verified" *
          doctest::skip(testing::sanitized())) {
  const auto model = weights_file(kSmolLM2File);
  if (!model) return;
  const RunResult r = run_thaw({"needle", "-m", model->string(), "--context", "300", "--depths",
                                "25,75", "--prefill", "32", "--policy", "full,window", "--verify",
                                "16", "--second", "--json", "-q"});
  CAPTURE(r.err);
  REQUIRE(r.exit_code == 0);
  const json window = json::parse(r.out)["policies"][1];
  CHECK(window["right"] == 4);
  CHECK(window["answers_all_that_full_answers"] == true);
  CHECK(window["checks"] >= 4 + 280 / 16);
}

}  // namespace
}  // namespace thaw
