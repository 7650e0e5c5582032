// The command line as a user types it: help, mistakes, streams, Ctrl-C.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <optional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "cli/commands.h"
#include "cli/flags.h"
#include "tests/check_fails.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using testing::check_fails;
using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;

std::string tiny() { return TinyCli::get().model(); }
std::string file(const std::string& name) { return TinyCli::get().path(name); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_CASE("cli: every help page goes to standard output and shows an example") {
  for (const Command& command : kCommands) {
    const std::string name = command.name;
    const RunResult page = run_thaw({name, "--help"});
    CHECK(page.exit_code == 0);
    CHECK(page.err.empty());
    CHECK(page.out.starts_with("Usage: thaw " + name + " -m "));
    CHECK(contains(page.out, "Examples:\n  thaw " + name));
    CHECK(run_thaw({name, "-h"}).out == page.out);
    CHECK(run_thaw({"help", name}).out == page.out);
    CHECK(contains(run_thaw({"help"}).out, name));
  }
  CHECK(run_thaw({"--help"}).out == run_thaw({"help"}).out);
}

TEST_CASE("cli: no command at all is wrong usage, and shows the commands") {
  const RunResult r = run_thaw({});
  CHECK(r.exit_code == 2);
  CHECK(r.out.empty());
  CHECK(contains(r.err, "Commands:"));
}

TEST_CASE("cli: --version names version and backends") {
  const RunResult r = run_thaw({"--version"});
  CHECK(r.exit_code == 0);
  CHECK(r.out.starts_with("thaw "));
  CHECK(contains(r.out, "backends: cpu"));
}

TEST_CASE("cli: wrong commands and flags get a hint") {
  check_fails({"genrate"}, 2, "unknown command genrate (did you mean generate?)");
  check_fails({"help", "tokenise"}, 2, "unknown command tokenise (did you mean tokenize?)");
  check_fails({"xyz"}, 2, "unknown command xyz; see 'thaw help'");
  check_fails({"--verison"}, 2, "did you mean --version?");
  check_fails({"\x1b[31m"}, 2, "unknown command \\x1b[31m");
  check_fails({"generate", "--modle", "x"}, 2, "unknown flag --modle (did you mean --model?)");
  check_fails({"generate", "-model", "x"}, 2, "unknown flag -model (did you mean --model?)");
  check_fails({"generate", "--temperature", "1"}, 2, "(did you mean --temp?)");
  check_fails({"generate", "--top_k=1"}, 2, "unknown flag --top_k (did you mean --top-k?)");
  check_fails({"generate", "-Z"}, 2, "unknown flag -Z;");
  check_fails({"generate", "-m"}, 2, "-m needs a value: PATH");
  check_fails({"generate", "--json=1"}, 2, "--json takes no value");
  check_fails({"generate", "-m", "x", "Once"}, 2,
              "unexpected argument \"Once\"; usage: thaw generate -m");
  check_fails({"inspect", "-"}, 2, "unexpected argument \"-\"");
  check_fails({""}, 2, "unknown command \"\"; see 'thaw help'");
  check_fails({"help", "generate", "extra"}, 2, "unexpected argument \"extra\"");
  for (const char* name : {"run", "gen", "complete"})
    check_fails({name}, 2, "(did you mean generate?)");
  check_fails({"generate", "--n-predict", "9"}, 2, "(did you mean --max-tokens?)");
  check_fails({"generate", "--ctx-size=9"}, 2, "(did you mean --context?)");
  check_fails({"bench", "--ctx-size=9"}, 2, "(did you mean --context?)");
  check_fails({"tokenize", "--n-predict", "9"}, 2, "unknown flag --n-predict;");
  check_fails({"needle", "--temp", "9"}, 2, "unknown flag --temp;");  // not --help
  check_fails({"generate", "-ngl", "99"}, 2, "unknown flag -ngl, and --max-tokens: expected a ");
}

TEST_CASE("cli: flags that are missing or do not go together") {
  for (const Command& command : kCommands) {
    check_fails({command.name}, 2, "expected a model: -m");
    check_fails({command.name, "-m", ""}, 2, "expected a model: -m");
  }
  const std::string m = tiny();
  check_fails({"generate", "-m", m, "-p", "a", "-f", "b"}, 2, "expected one of -p, -f and -");
  check_fails({"generate", "-m", m, "-p", "a", "-"}, 2, "expected one of -p, -f and -");
  check_fails({"generate", "-m", m, "-p", "a", "--system", "b"}, 2, "--system needs --chat");
  check_fails({"generate", "-m", m, "-p", "a", "--chat", "--special"}, 2,
              "--special has no meaning");
  check_fails({"generate", "-m", m, "-p", "a", "--chat", "--echo"}, 2, "--echo has no meaning");
  check_fails({"tokenize", "-m", m, "-p", "1", "--decode", "--bos"}, 2, "--bos has no meaning");
  check_fails({"logits", "-m", m, "-p", "a"}, 2, "-o FILE.npy");
  check_fails({"logits", "-m", m, "-p", "a", "-o", ""}, 2, "--output: expected a path");
  check_fails({"logits", "-m", m, "-p", "a", "-o", "x", "--layer", "0"}, 2, "--layer needs --dump");
  check_fails({"logits", "-m", m, "-p", "a", "--tokens", "b", "-o", "x"}, 2, "found several");
  check_fails({"logits", "-m", m, "-p", "a", "-o", "x", "--dump", "q,Q"}, 2,
              "expected names among embed, attn_norm, q, k, v,");
  check_fails({"logits", "-m", m, "-p", "a", "-o", "x", "--dump", ""}, 2, "found \"\"");
  check_fails({"logits", "-m", m, "-p", "a", "-o", "x", "--dump", "embed", "--layer", "0"}, 2,
              "--layer: expected a name that each layer has, found embed");
  check_fails({"logits", "-m", m, "-p", "a", "-o", "x", "--dump", "q", "--layer", "2"}, 2,
              "--layer: expected 0 to 1");
  check_fails({"perplexity", "-m", m, "-p", "abc", "-c", "1"}, 2, "--context: expected at least 2");
  check_fails({"perplexity", "-m", m, "-p", "abc", "-c", "8", "--stride", "9"}, 2,
              "--stride: expected");
}

TEST_CASE("cli: every number and choice is checked, and the message names the flag") {
  const auto rejects = [](const std::string& flag, const std::vector<std::string>& values,
                          const std::string& expected) {
    for (const std::string& value : values) {
      check_fails({"generate", "-m", "x", "-p", "a", flag, value}, 2,
                  flag + ": expected " + expected + ", found \"" + value + "\"");
    }
  };
  rejects("--threads", {"0", "257", "-1", "two", "", "2.5", "99999999999999999999"},
          "a whole number from 1 to 256");
  rejects("--context", {"0", "16777217", "1k"}, "a whole number from 1 to 16777216");
  rejects("--max-tokens", {"-2", "5x", " 5", "+5", "0x5"}, "a whole number from -1 to 16777216");
  rejects("--seed", {"-1", "1e3", "18446744073709551616"},
          "a whole number from 0 to 18446744073709551615");
  rejects("--temp", {"-0.1", "nan", "inf", "abc", "1,5", "1e39"}, "a number >= 0");
  rejects("--top-k", {"-1", "1.0"}, "a whole number from 0 to 16777216");
  rejects("--top-p", {"0", "1.1", "nan"}, "a number above 0, at most 1");
  rejects("--min-p", {"-0.1", "1.1"}, "a number from 0 to 1");
  rejects("--repeat-penalty", {"0", "-1", "1e-38", "100.1"}, "a number from 0.01 to 100");
  rejects("--presence-penalty", {"inf", "x", "3e38"}, "a number from -1000 to 1000");
  rejects("--frequency-penalty", {"nan", "-3e38"}, "a number from -1000 to 1000");
  rejects("--penalty-window", {"-2"}, "a whole number from -1 to 16777216");
  rejects("--kv-type", {"q5_0", "F16"}, "one of f16|bf16|f32|q8_0|q4_0");
  rejects("--backend", {"gpu"}, "one of auto|cpu|cuda|checked");
  rejects("--policy", {"Thaw", "none"}, "one of full|window|h2o|budget|asr|thaw");
  for (const char* backend : {"cuda", "checked"})
    check_fails({"generate", "-m", "x", "--backend", backend}, 1, "this build has no CUDA backend");
}

TEST_CASE("cli: values may be attached, empty, or look like flags") {
  bool json = false;
  int n = 0;
  std::optional<std::string> text;
  std::vector<std::string> stops;
  Flags flags("x", "", "");
  flags.toggle(json, "-j, --json", "");
  flags.integer(n, "-n, --count", "", -5, 5);
  flags.text(text, "-p, --prompt", "TEXT", "");
  flags.texts(stops, "--stop", "TEXT", "");
  CHECK(flags.parse({"-n-3", "--prompt=", "-j", "--stop", "--stop", "--stop=a=b"}));
  CHECK(n == -3);
  CHECK(text == "");
  CHECK(json);
  CHECK(stops == std::vector<std::string>{"--stop", "a=b"});
  CHECK(flags.parse({"--count", "4", "-n", "5", "-p", "-j"}));  // the last one counts
  CHECK(n == 5);
  CHECK(text == "-j");
}

TEST_CASE("cli: a value is taken as it is typed, whatever it looks like") {
  for (const std::string value : {"-1.5", "-j", "-prompt", "--prompt", "--prompt=", "--prompt=a=b",
                                  "-", "--", "", "=", "[a,b]", "[[11]]", "{}", "%%"}) {
    CAPTURE(value);
    for (const std::vector<std::string>& args : {std::vector<std::string>{"-p", value},
                                                 {"--prompt", value},
                                                 {"--prompt=" + value},
                                                 {"-p", "x", "--prompt=" + value}}) {
      std::optional<std::string> text;
      std::vector<std::string> stops;
      bool json = false;
      Flags flags("x", "", "");
      flags.toggle(json, "-j, --json", "");
      flags.text(text, "-p, --prompt", "TEXT", "");
      flags.texts(stops, "--stop", "TEXT", "");
      std::vector<std::string> line = args;
      line.insert(line.end(), {"--stop", value, "-j", "--stop=" + value});
      CHECK(flags.parse(line));
      CHECK(text == value);
      CHECK(stops == std::vector<std::string>{value, value});
      CHECK(json);
    }
  }
}

TEST_CASE("cli: of any kind of flag, the one given last counts") {
  std::string choice = "a";
  float real = 1;
  std::optional<std::uint64_t> seed;
  Flags flags("x", "", "");
  flags.choice(choice, "--kind", {"a", "b", "c"}, "");
  flags.real(real, "--temp", "", "a number", [](double) { return true; });
  flags.seed(seed, "--seed", "");
  CHECK(flags.parse({"--kind", "b", "--temp", "-2.5", "--seed", "7", "--temp=-0.5", "--kind=c",
                     "--seed", "18446744073709551615"}));
  CHECK(choice == "c");
  CHECK(real == -0.5f);
  CHECK(seed == 18446744073709551615u);
}

TEST_CASE("cli: help that is asked for first is given, whatever follows") {
  const RunResult r = run_thaw({"generate", "-h", "--temp", "hot", "--modle"});
  CHECK(r.exit_code == 0);
  CHECK(r.out == run_thaw({"generate", "--help"}).out);
}

TEST_CASE("cli: a help page groups the flags, in columns that fit") {
  const std::string page = run_thaw({"generate", "--help"}).out;
  std::size_t at = 0;
  for (const char* title : {"Model and prompt", "Where it ends", "Sampling, in this order",
                            "Context", "Machine", "Output", "Examples"}) {
    CAPTURE(title);
    at = page.find(std::string("\n\n") + title + ":\n  ", at);
    REQUIRE(at != std::string::npos);
  }
  CHECK(contains(page, "\n  -h, --help                   print this page\n"));
  CHECK(contains(page, "\n      --frequency-penalty X    subtract X"));
  CHECK(contains(page, "\n" + std::string(31, ' ') + "follows does"));
  std::istringstream lines(page.substr(0, at));
  for (std::string line; std::getline(lines, line);) {
    CAPTURE(line);
    CHECK(line.size() <= 98);
  }
}

TEST_CASE("cli: hostile text in an argument is shortened and escaped in the message") {
  const std::string text = "\n\x1b[2J" + std::string(1000, 'x');
  const std::string shown = "\\x0a\\x1b[2J" + std::string(55, 'x') + "...";
  check_fails({"generate", text}, 2, "unexpected argument \"" + shown + "\"");
  check_fails({"generate", "--temp", text}, 2, "a number >= 0, found \"" + shown + "\"");
}

TEST_CASE("cli: input that is missing or unfit fails with its name") {
  const std::string m = tiny();
  check_fails({"generate", "-m", file("none.gguf"), "-p", "a"}, 1, "none.gguf: ");
  check_fails({"generate", "-m", file(""), "-p", "a"}, 1, "expected a directory with config.json");
  testing::write_file(file("page.gguf"), "<!DOCTYPE html><html></html>");
  testing::write_file(file("empty.gguf"), "");
  check_fails({"generate", "-m", file("page.gguf"), "-p", "a"}, 1, "page.gguf: ");
  check_fails({"inspect", "-m", file("empty.gguf")}, 1, "empty.gguf: ");
  check_fails({"generate", "-m", m, "-f", file("none.txt")}, 1,
              "none.txt: cannot open: No such file");
  check_fails({"generate", "-m", m, "-f", file("")}, 1, "cannot read: Is a directory");
  check_fails({"generate", "-m", m, "-f", "/dev/zero"}, 1, "expected at most 256.0 MiB of text");
  check_fails({"generate", "-m", m, "-p", "abcdefgh", "-c", "7"}, 1,
              "-p: expected at most 7 tokens (the context), found 8; -c can be up to 512");
  check_fails({"tokenize", "-m", m, "--decode"}, 1,
              "standard input: token 1: expected an id from 0 to 287, found \"288\"", "7 288");
  check_fails({"tokenize", "-m", m, "--decode", "-p", "7 -1"}, 1, "found \"-1\"");
  check_fails({"perplexity", "-m", m, "-p", "a"}, 1, "-p: expected at least 2 tokens, found 1");
  check_fails({"logits", "-m", m, "-p", "", "-o", file("x.npy")}, 1,
              "expected at least 1 token, found 0");
  check_fails({"generate", "-m", "a\nb\x1b.gguf", "-p", "a"}, 1,
              "thaw: a\\x0ab\\x1b.gguf: cannot open");
}

TEST_CASE("cli: a text that cannot fit by its length alone is refused before it is encoded") {
  std::string text;  // 8 tokens with --special
  for (int i = 0; i < 8; ++i) text += "<|endoftext|>";
  const std::string longest = "<|unused_287|>";  // of the tiny vocabulary
  const std::string longer(8 * longest.size() + 1, 'x');
  testing::write_file(file("long.txt"), longer);
  const std::string message = "long.txt: expected at most 8 tokens (the context), found ";
  for (std::vector<std::string> args : {std::vector<std::string>{"generate"},
                                        {"generate", "--chat"},
                                        {"logits", "-o", file("x")}}) {
    args.insert(args.end(), {"-m", tiny(), "-f", file("long.txt"), "-c", "8"});
    check_fails(args, 1, message + "9 or more");
  }
  testing::write_file(file("long.txt"), text);
  const RunResult fits = run_thaw(
      {"generate", "-m", tiny(), "-f", file("long.txt"), "-c", "8", "-n", "1", "--special", "-q"});
  CHECK(fits.exit_code == 0);
}

TEST_CASE("cli: a model file that is cut short while in use is an error, not a crash") {
  const std::string model = file("shrinking.gguf"), pipe = file("prompt.pipe");
  std::filesystem::copy_file(tiny(), model);
  REQUIRE(::mkfifo(pipe.c_str(), 0600) == 0);
  std::thread shrink([&] {
    std::ofstream prompt(pipe);  // opens once thaw has loaded the model and reads its prompt
    std::filesystem::resize_file(model, 0);
    prompt << "Once";
  });
  const RunResult r = run_thaw({"generate", "-m", model, "-f", pipe, "-n", "1"});
  shrink.join();
  CHECK(r.exit_code == 1);
  CHECK(r.err ==
        "thaw: a model's file: expected it to stay as it was, found that it became "
        "shorter or cannot be read\n");
}

TEST_CASE("cli: standard output that cannot be written is an error") {
  for (const std::vector<std::string>& args : {std::vector<std::string>{"--version"},
                                               {"inspect", "-m", tiny()},
                                               {"generate", "-m", tiny(), "-p", "a", "-n", "5"}}) {
    for (const auto& [path, reason] : {std::pair{"/dev/full", "No space left on device"},
                                       std::pair{"closed", "Bad file descriptor"}}) {
      const RunResult r = run_thaw(args, {.stdout_path = path});
      CHECK(r.exit_code == 1);
      CHECK(r.err == std::string("thaw: standard output: cannot write: ") + reason + "\n");
    }
  }
}

TEST_CASE("cli: Ctrl-C ends the text with statistics and exit code 130") {
  const RunResult r = run_thaw(
      {"generate", "-m", tiny(), "-p", "abc", "-n", "-1", "-c", "16777216", "--ignore-eos"},
      {.interrupt_after = 20});
  CHECK(r.exit_code == 130);
  CHECK(r.out.size() > 20);
  CHECK(contains(r.err, "tok/s; interrupted\n"));
  CHECK(contains(r.err, "seed "));
  CHECK(contains(r.err, "warning: --context 16777216 is beyond the 512 tokens"));
}

}  // namespace
}  // namespace thaw
