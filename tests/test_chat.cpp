// Conversations: each turn continues what the store holds, and what the command makes of lines.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <atomic>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "device/error.h"
#include "tests/check_fails.h"
#include "tests/error_of.h"
#include "tests/run_thaw.h"
#include "tests/talk.h"
#include "tests/tiny_cli.h"

namespace thaw {
namespace {

using testing::check_fails;
using testing::error_of;
using testing::run_thaw;
using testing::run_thaw_in_terminal;
using testing::RunResult;
using testing::TinyCli;

std::string tiny() { return TinyCli::get().model(); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// f32: what is decoded is what a prompt would have left, but for rounding.
struct Talk : testing::Talk {
  explicit Talk(int capacity = 512) : testing::Talk(KvType::kF32, capacity, 12) {}

  // What a model answers that reads all of the conversation anew.
  std::vector<std::int32_t> anew(const std::vector<ChatMessage>& messages) {
    const auto store = make_kv_store(kv_shape(model.config, 512, KvType::kF32));
    Sampler fresh(sampler());
    const auto ids = encode_chat(tokenizer, ChatFormat::kChatML, messages);
    return generate(transformer, *store, fresh, ids, options).tokens;
  }
};

const ChatMessage kSystem = {"system", "Be"}, kFirst = {"user", "Hi"}, kSecond = {"user", "More"};

TEST_CASE("conversation: a turn is answered as if all before it were read anew") {
  Talk t;
  const auto first = t.say("Hi");
  CHECK(first == t.anew({kSystem, kFirst}));
  const ChatMessage answer = {"assistant", t.tokenizer.decode(first)};
  CHECK(t.out == answer.content);
  CHECK(t.talk.said().turns.back().answer == answer.content);
  REQUIRE(t.tokenizer.encode(answer.content) == first);
  const std::size_t read = t.talk.said().tokens.size();
  CHECK(t.say("More") == t.anew({kSystem, kFirst, answer, kSecond}));
  CHECK(t.talk.said().turns[1].first == read);
  CHECK(t.kv->length() == std::ssize(t.talk.said().tokens) - 1);
}

TEST_CASE("conversation: what is taken back leaves nothing behind") {
  Talk t;
  const auto first = t.say("Hi");
  const auto tokens = t.talk.said().tokens;
  const auto second = t.say("More");
  CHECK(t.talk.undo());
  CHECK(t.talk.said().tokens == tokens);
  CHECK(t.say("More") == second);
  CHECK(t.talk.undo());
  CHECK(t.talk.undo());
  CHECK_FALSE(t.talk.undo());
  CHECK(t.kv->length() == 0);
  CHECK(t.say("Hi") == first);
  t.talk.begin("Be");
  CHECK(t.talk.said().turns.empty());
  CHECK(t.say("Hi") == first);
}

TEST_CASE("conversation: an answer can be made again, also one that Ctrl-C came before") {
  Talk t;
  const auto first = t.say("Hi"), second = t.say("More");
  const auto tokens = t.talk.said().tokens;
  const auto again = [&] {
    CHECK(t.talk.unanswer());
    CHECK(t.talk.said().turns.back().answer.empty());
    return t.talk.answer(t.options, [](std::string_view) {}).tokens;
  };
  CHECK(again() == second);
  CHECK(t.talk.said().tokens == tokens);
  const std::atomic<bool> interrupted = true;
  t.options.interrupted = &interrupted;
  CHECK(again().empty());
  CHECK(t.talk.said().turns.size() == 2);
  t.options.interrupted = nullptr;
  CHECK(again() == second);
  CHECK(t.talk.said().tokens == tokens);
  CHECK(t.talk.undo());
  CHECK(again() == first);
  CHECK(t.talk.undo());
  CHECK_FALSE(t.talk.unanswer());
}

TEST_CASE("conversation: what fails in an answer leaves what was said before") {
  Talk t;
  t.say("Hi");
  const auto tokens = t.talk.said().tokens;
  t.talk.add({"More", "test"});
  const auto asked = t.talk.said().tokens;
  CHECK(error_of([&] {
          t.talk.answer(t.options, [](std::string_view) { throw Error("the pipe is closed"); });
        }) == "the pipe is closed");
  CHECK(t.talk.said().tokens == asked);
  CHECK(t.talk.said().turns[1].answer.empty());
  CHECK(t.kv->length() <= std::ssize(asked));
  CHECK(t.talk.undo());
  CHECK(t.talk.said().tokens == tokens);
}

TEST_CASE("conversation: a message that does not fit is refused, and nothing changes") {
  Talk t(64);
  t.say("Hi");
  const auto tokens = t.talk.said().tokens;
  const int room = 64 - static_cast<int>(tokens.size());
  const std::string most =
      join("test: expected at most ", room, " tokens, which is what the context has room for");
  CHECK(contains(error_of([&] { t.talk.add({std::string(20, 'x'), "test"}); }), most));
  CHECK(contains(error_of([&] {
                   t.talk.add({std::string(9000, 'x'), "test"});
                 }),
                 "test: expected at most "));
  CHECK(t.talk.said().tokens == tokens);
  CHECK(t.talk.said().turns.size() == 1);
}

TEST_CASE("conversation: an answer that fills the context ends there") {
  Talk t(44);
  t.options.max_tokens = -1;
  t.say("Hi");
  CHECK(t.talk.said().tokens.size() == 45);  // the last one needs no room
  CHECK(t.kv->length() == 44);
  CHECK(error_of([&] { t.talk.add({"", "test"}); }) == "the context of 44 tokens is full");
}

// thaw chat on the tiny model, which answers at random: greedy, 8 tokens.
std::vector<std::string> chat(std::vector<std::string> more = {}) {
  more.insert(more.begin(), {"chat", "-m", tiny(), "--temp", "0", "-n", "8", "--system", "Be",
                             "--history", "", "--freeze-from", "0"});
  return more;
}

// The last token of all is the most probable one: an answer without end.
std::vector<std::string> endless(std::vector<std::string> more) {
  more.insert(more.begin(), {"chat", "-m", tiny(), "--temp", "0", "--presence-penalty", "-1000",
                             "--penalty-window", "1", "-c", "1000000"});
  return more;
}

std::string generated(const std::string& message) {
  const RunResult r = run_thaw({"generate", "-m", tiny(), "--temp", "0", "-n", "8", "--system",
                                "Be", "--chat", "-p", message, "--freeze-from", "0"});
  return r.out + (r.out.ends_with('\n') ? "" : "\n");
}

TEST_CASE("chat: each line is a message, and its answer is a text of its own on standard output") {
  const RunResult r = run_thaw(chat(), {.input = "Hi\n\n   \nMore"});
  CHECK(r.exit_code == 0);
  CHECK(r.out.starts_with(generated("Hi")));
  CHECK(r.out.size() > generated("Hi").size());
  CHECK(contains(r.err, "chat     2 messages, "));
  CHECK(contains(r.err, "(-n reached)\n"));
  CHECK(run_thaw(chat({"-q", "-p", "Hi"}), {.input = "More\n"}).out == r.out);
}

TEST_CASE("chat: an answer that fills the context says so") {
  const RunResult r = run_thaw(chat({"-q", "-c", "35"}), {.input = "Hi\n"});
  CHECK(r.exit_code == 0);
  CHECK(r.err == "(the context of 35 tokens is full: /undo takes back, /reset begins anew)\n");
}

TEST_CASE("chat: commands take back, repeat, and begin anew") {
  const std::string hi = generated("Hi");
  const RunResult r = run_thaw(chat({"-q"}), {.input = "Hi\n/retry\n/undo\nHi\n/reset\nHi\n"});
  CHECK(r.exit_code == 0);
  CHECK(r.out == hi + hi + hi + hi);
  CHECK(contains(r.err, "(the conversation is empty)\n"));
  CHECK(contains(r.err, "(a new conversation)\n"));
  const RunResult help = run_thaw(chat({"-q"}), {.input = "/help\n/stats\n/quit\nHi\n"});
  CHECK(help.out.empty());
  for (const char* part : {"/retry", "/quit", "chat     0 messages, 0 of ", "seed     "})
    CHECK(contains(help.err, part));
}

TEST_CASE("chat: what is quoted or begins with two slashes is a message") {
  CHECK(run_thaw(chat({"-q"}), {.input = "\"\"\"\nHi\n\n/undo\n\"\"\"\n"}).out ==
        generated("Hi\n\n/undo\n"));
  CHECK(run_thaw(chat({"-q"}), {.input = "\"\"\"Hi\nyou\"\"\"\n"}).out == generated("Hi\nyou"));
  CHECK(run_thaw(chat({"-q"}), {.input = "\"\"\"Hi\"\"\"\r\n"}).out == generated("Hi"));
  CHECK(run_thaw(chat({"-q"}), {.input = "//undo\n"}).out == generated("/undo"));
}

TEST_CASE("chat: a line from a pipe that cannot be taken ends it") {
  check_fails(chat({"-q"}), 1, "unknown command /rest; did you mean /reset?", "/rest\nHi\n");
  check_fails(chat({"-q"}), 1, "unknown command /x\\x1b; /help lists them, and // begins",
              "/x\x1b\n");
  check_fails(chat({"-q"}), 1, "unknown command /clear; did you mean /reset?", "/clear\n");
  check_fails(chat({"-q"}), 1, "/undo: expected a message before it, found none", "/undo\n");
  check_fails(chat({"-q"}), 1, "/retry: expected a message before it, found none", "/retry\n");
  check_fails(chat({"-q"}), 1, "/help: expected nothing after it, found you", "/help you\n");
  check_fails(chat({"-q", "-c", "20"}), 1,
              "the message and the system message: expected at most 20 tokens", "Hi\n");
  check_fails(chat({"-q", "-p", "Hi", "-c", "20"}), 1,
              "-p and the system message: expected at most 20 tokens");
  check_fails(chat({"-p", "a", "-f", "b"}), 2, "expected -p or -f, found both");
  check_fails(chat({"-q", "-v"}), 2, "expected -q or -v, found both");
  check_fails(chat({"-q", "-f", "/nowhere"}), 1, "/nowhere: cannot open");
}

TEST_CASE("chat: Ctrl-C ends an answer from a pipe, and the program") {
  std::vector<std::string> args = endless({"--history", "", "-q"});
  const RunResult r = run_thaw(args, {.input = "Hi\nMore\n", .interrupt_after = 20});
  CHECK(r.exit_code == 130);
  CHECK(r.out.size() > 20);
}

TEST_CASE("chat: a map and a trace of what was said, also where some was taken back") {
  testing::TemporaryDirectory directory;
  const std::string page = (directory.path() / "map.html").string();
  const std::string trace = (directory.path() / "trace.json").string();
  const RunResult r = run_thaw(chat({"--report", page, "--trace", trace, "--recovery", "rewalk",
                                     "--rewalk-tokens", "2", "--recovery-z", "0.1", "--check-kv"}),
                               {.input = "Hi\nMore\n/undo\nMore\n/reset\nHi\nMore\n"});
  CAPTURE(r.err);
  CHECK(r.exit_code == 0);
  CHECK(contains(testing::read_file(page), "<html"));
  const auto events = nlohmann::json::parse(testing::read_file(trace))["traceEvents"];
  const auto n_answers = std::count_if(
      events.begin(), events.end(), [](const auto& event) { return event["name"] == "prefill"; });
  CHECK(n_answers == 5);
  check_fails(chat({"--report", page, "--session", page}), 2,
              "--session and --report: expected two");
}

TEST_CASE("chat: in a terminal lines are edited, Ctrl-C goes on, and lines come back") {
  testing::TemporaryDirectory directory;
  const std::string history = (directory.path() / "new" / "history").string();
  const RunResult r = run_thaw_in_terminal(
      {"chat", "-m", tiny(), "--temp", "0", "-n", "8", "--system", "Be", "--history", history},
      {{"> ", "Hoi\x7f\x7fi\r"},
       {"(-n reached)", ""},
       {"> ", "/undone\r"},
       {"did you mean /undo?", ""},
       {"> ", "what\x03"},
       {"> ", "\"\"\"\r"},
       {". ", "\x03"},
       {"> ", "\x04"}});
  CAPTURE(r.out);
  CHECK(r.exit_code == 0);
  std::string hi = generated("Hi");
  hi.pop_back();
  CHECK(contains(r.out, hi.substr(0, hi.find('\n'))));
  CHECK(contains(r.out, "chat     1 message, "));
  const RunResult pasted = run_thaw_in_terminal(
      {"chat", "-m", tiny(), "--temp", "0", "-n", "8", "--system", "Be", "--history", ""},
      {{"> ", "\x1b[200~Hi\r\x07you\x1b[20"}, {"", "1~\r"}, {"(-n reached)", ""}, {"> ", "\x04"}});
  CHECK(pasted.exit_code == 0);
  CHECK(contains(pasted.out, generated("Hi\nyou").substr(0, generated("Hi\nyou").find('\n'))));
  CHECK(contains(pasted.out, "chat     1 message, "));
  // Ctrl-Z, where nobody could let the program go on again, stops nothing.
  const RunResult disturbed = run_thaw_in_terminal(
      {"chat", "-m", tiny(), "--temp", "0", "-n", "8", "--system", "Be", "--history", ""},
      {{"> ", "Hi"},
       {"Hi", "\x1a"},
       {"\x1b[?2004l", ""},
       {"> Hi", "", [] {}, 10},
       {"> Hi", "\r"},
       {"> ", "\x04"}});
  CAPTURE(disturbed.out);
  CHECK(disturbed.exit_code == 0);
  CHECK(contains(disturbed.out, "chat     1 message, "));
  const std::string notes = (directory.path() / "notes").string();
  testing::write_file(notes, "mine");
  const RunResult other = run_thaw_in_terminal({"chat", "-m", tiny(), "--history", notes}, {});
  CHECK(other.exit_code == 1);
  CHECK(contains(other.out, notes + ": expected a history, which begins with _HiStOrY_V2_"));
  CHECK(testing::read_file(notes) == "mine");
  struct stat file {};
  REQUIRE(::stat(history.c_str(), &file) == 0);
  CHECK((file.st_mode & 0777) == 0600);

  const RunResult again = run_thaw_in_terminal(
      endless({"--history", history}),
      {{"> ", "\x1b[A\x1b[A\x1b[A"}, {"> Hi", "\r"}, {"\n\r\n\r\n", "\x03"}, {"> ", "\x04"}});
  CAPTURE(again.out);
  CHECK(again.exit_code == 0);
  CHECK(contains(again.out, "chat     1 message, "));
}

}  // namespace
}  // namespace thaw
