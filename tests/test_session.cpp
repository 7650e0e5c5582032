// Conversations in files: what is saved goes on, and what is damaged is refused.
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/session.h"
#include "cli/terminal.h"
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
using testing::read_file;
using testing::run_thaw;
using testing::RunResult;
using testing::TinyCli;
using testing::write_file;
using Tokens = std::vector<std::int32_t>;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// Answers of 40 tokens, which end before at none.
struct Talk : testing::Talk {
  explicit Talk(KvType type = KvType::kF16, int capacity = 512)
      : testing::Talk(type, capacity, 40) {}

  // Whether keys and values were taken.
  bool resume(const std::filesystem::path& path) {
    const Session session = read_session(path);
    Resumed next = resumed(session, model, talk);
    talk.resume(std::move(next.said), next.rows ? &session.rows : nullptr);
    return next.rows;
  }
};

struct Saved {
  testing::TemporaryDirectory directory;
  std::filesystem::path path = directory.path() / "talk";
  Tokens answer;  // to "More", by the conversation that went on

  Saved() {
    Talk talk;
    talk.say("Hi");
    const std::int64_t n_bytes = write_session(path, talk.model, talk.talk);
    CHECK(n_bytes == static_cast<std::int64_t>(std::filesystem::file_size(path)));
    answer = talk.say("More");
  }
};

TEST_CASE("session: a conversation that is loaded goes on as it would have") {
  const Saved saved;
  Talk talk;
  talk.say("Something else");
  CHECK(talk.resume(saved.path));
  REQUIRE(talk.talk.said().turns.size() == 1);
  CHECK(talk.talk.said().turns[0].message == "Hi");
  CHECK(talk.talk.said().system == "Be");
  const auto n = std::ssize(talk.talk.said().tokens);
  CHECK(n == 71);  // 31, and the answer's
  CHECK(talk.kv->length() == n - Conversation::kReadAgain);
  CHECK(talk.say("More") == saved.answer);
  CHECK(talk.n_read == Conversation::kReadAgain + std::ssize(talk.talk.said().tokens) - n - 40);
  CHECK(talk.talk.undo());
  CHECK(talk.say("More") == saved.answer);
  CHECK(talk.talk.undo());
  CHECK(talk.talk.undo());
  CHECK(talk.kv->length() == 0);
}

TEST_CASE("session: keys and values go to a store of another type") {
  const Saved saved;
  Talk talk(KvType::kF32);
  CHECK(talk.resume(saved.path));
  CHECK(talk.say("More") == saved.answer);
  write_session(saved.path, talk.model, talk.talk);
  Talk back(KvType::kBF16);
  CHECK(back.resume(saved.path));
  CHECK(back.talk.said().turns.size() == 2);
}

TEST_CASE("session: with other weights its text is read anew") {
  const Saved saved;
  Talk talk;
  talk.model.weights.final_norm[0] += 1;
  CHECK_FALSE(talk.resume(saved.path));
  CHECK(talk.kv->length() == 0);
  CHECK(talk.talk.said().turns.size() == 1);
  const auto n = std::ssize(talk.talk.said().tokens);
  talk.say("More");
  const auto more = encode_reply(talk.tokenizer, ChatFormat::kChatML, {"user", "More"});
  CHECK(talk.n_read == n + std::ssize(more));
  CHECK(talk.talk.said().turns[1].first == static_cast<std::size_t>(n));
}

TEST_CASE("session: one that is longer than the context is refused, and nothing changes") {
  const Saved saved;
  Talk talk(KvType::kF16, 64);
  talk.say("x");
  const auto tokens = talk.talk.said().tokens;
  CHECK(contains(error_of([&] { talk.resume(saved.path); }),
                 ": expected at most 64 tokens (the context), found 71"));
  CHECK(talk.talk.said().tokens == tokens);
  CHECK(talk.talk.said().turns[0].message == "x");
}

TEST_CASE("session: one that filled its context comes back, to be taken back") {
  testing::TemporaryDirectory directory;
  Talk full(KvType::kF16, 50), again(KvType::kF16, 50);
  full.options.max_tokens = -1;
  full.say("Hi");
  REQUIRE(full.talk.said().tokens.size() == 51);  // the newest needs no room
  write_session(directory.path() / "talk", full.model, full.talk);
  CHECK(again.resume(directory.path() / "talk"));
  CHECK(error_of([&] { again.talk.add({"x", "test"}); }) == "the context of 50 tokens is full");
  CHECK(again.talk.undo());
  again.say("x");
}

TEST_CASE("session: numbers that are none are refused") {
  const Saved saved;
  std::string bytes = read_file(saved.path);
  bytes.back() = '\x7f', bytes[bytes.size() - 2] = '\0';  // infinity as f16 is 7c00
  write_file(saved.path, bytes);
  Talk talk;
  CHECK(
      error_of([&] { talk.resume(saved.path); }) ==
      saved.path.string() +
          ": keys and values: expected numbers that are finite in the store's type, found others");
}

TEST_CASE("session: numbers that the store's type cannot hold are refused") {
  const float large = 70000;  // the largest of f16 is 65504
  const KvShape shape = {1, 1, 8, 1, KvType::kF32};
  std::vector<float> numbers(16, large);
  const SavedRows rows(std::as_bytes(std::span(numbers)), shape, 1);
  CHECK(rows.finite_as(KvType::kF32));
  CHECK(rows.finite_as(KvType::kBF16));
  CHECK(!rows.finite_as(KvType::kF16));
}

TEST_CASE("session: an empty conversation, and one of a message that has no text") {
  testing::TemporaryDirectory directory;
  const auto path = directory.path() / "talk";
  Talk talk, other;
  write_session(path, talk.model, talk.talk);
  other.say("x");
  other.resume(path);
  CHECK(other.talk.said().turns.empty());
  CHECK(other.talk.said().tokens.empty());
  talk.say("\xff");
  write_session(path, talk.model, talk.talk);
  other.resume(path);
  CHECK(other.talk.said().tokens == talk.talk.said().tokens);
}

TEST_CASE("session: what is wrong in a file is named") {
  const Saved saved;
  const std::string bytes = read_file(saved.path);
  const std::size_t end = bytes.find('\n');
  const auto error = [&](const std::function<void(nlohmann::ordered_json&)>& change) {
    auto header = nlohmann::ordered_json::parse(bytes.substr(0, end));
    change(header);
    write_file(saved.path, header.dump() + bytes.substr(end));
    Talk talk;
    return error_of([&] { talk.resume(saved.path); });
  };
  const std::string where = saved.path.string();
  using Json = nlohmann::ordered_json;
  CHECK(error([](Json&) {}).empty());
  CHECK(error([](Json& j) { j["thaw_session"] = 2; }) ==
        where + ": thaw_session: expected a whole number from 1 to 1, found 2");
  CHECK(error([](Json& j) { j.erase("tokens"); }) == where + ": tokens: expected it, found none");
  CHECK(error([](Json& j) { j["tokens"] = "a"; }) ==
        where + ": tokens: expected a list, found string");
  CHECK(error([](Json& j) { j["tokens"][3] = -1; }) ==
        where + ": tokens: expected a whole number from 0 to 2147483647, found -1");
  CHECK(error([](Json& j) { j["tokens"][3] = 18446744073709551615u; }) ==
        where +
            ": tokens: expected a whole number from 0 to 2147483647, found 18446744073709551615");
  CHECK(error([](Json& j) { j["tokens"][3] = 288; }) ==
        where + ": tokens: expected ids below 288, found 288");
  CHECK(error([](Json& j) { j["system"] = 1; }) ==
        where + ": system: expected a text, found number");
  CHECK(error([](Json& j) { j["turns"] = Json::array(); }) ==
        where + ": expected turns where there are tokens, found 0 turns and 71 tokens");
  CHECK(error([](Json& j) { j["turns"][0]["first"] = 1; }) ==
        where + ": turn 0: first: expected a whole number from 0 to 0, found 1");
  CHECK(error([](Json& j) { j["turns"][0]["reply"] = 0; }) ==
        where + ": turn 0: reply: expected a whole number from 1 to 71, found 0");
  CHECK(error([](Json& j) { j["turns"].push_back(j["turns"][0]); }) ==
        where + ": turn 1: first: expected a whole number from 31 to 70, found 0");
  CHECK(error([](Json& j) { j["turns"][0] = 5; }) ==
        where + ": turn 0: expected an object, found number");
  CHECK(error([](Json& j) { j["model"]["identity"] = "12"; }) ==
        where + ": model: identity: expected 16 hexadecimal digits, found \"12\"");
  CHECK(error([](Json& j) { j["kv"]["type"] = "f8"; }) ==
        where + ": kv: type: expected f16, bf16, f32, q8_0 or q4_0, found \"f8\"");
  CHECK(error([](Json& j) { j["kv"]["tokens"] = 72; }) ==
        where + ": kv: tokens: expected a whole number from 0 to 71, found 72");
  CHECK(error([](Json& j) { j["kv"]["tokens"] = 69; }) ==
        where + ": keys and values: expected 17664 bytes, found 17920");
  CHECK(error([](Json& j) { j["kv"]["type"] = "q8_0"; }) ==
        where + ": KV store: q8_0: expected a head_dim that 32 divides, found 16");
  CHECK(error([](Json& j) { j["kv"]["layers"] = 1, j["kv"]["heads"] = 4; }) ==
        where + ": kv: expected 2 layers of 2 heads of 16, found 1 of 4 of 16");
  CHECK(contains(error([](Json& j) {
                   for (const char* size : {"layers", "heads", "head_dim"}) j["kv"][size] = 1 << 20;
                 }),
                 " of 1048576 heads of 1048576 do not fit 64 bits"));
}

TEST_CASE("session: any damage to a file is an error, or harmless") {
  const Saved saved;
  const std::string bytes = read_file(saved.path);
  const std::size_t end = bytes.find('\n');
  Talk talk;
  testing::Random random(3);
  int n_errors = 0;
  for (int i = 0; i < 400; ++i) {
    std::string damaged = bytes;
    for (int n = 1 + random.below(3); n > 0; --n)
      damaged[static_cast<std::size_t>(random.below(static_cast<int>(end)))] =
          static_cast<char>(random.below(256));
    if (i % 4 == 0)
      damaged.resize(static_cast<std::size_t>(random.below(static_cast<int>(bytes.size()))));
    write_file(saved.path, damaged);
    n_errors += !error_of([&] { talk.resume(saved.path); }).empty();
  }
  CHECK(n_errors > 200);
  CHECK(n_errors < 400);  // letters of what was said
}

std::vector<std::string> chat(std::vector<std::string> more) {
  more.insert(more.begin(), {"chat", "-m", TinyCli::get().model(), "--temp", "0", "-n", "8",
                             "--history", "", "--freeze-from", "0"});
  return more;
}

TEST_CASE("chat: --session goes on where the last one ended, /save and /load by name") {
  testing::TemporaryDirectory directory;
  const std::string path = (directory.path() / "talk").string();
  const RunResult whole = run_thaw(chat({"-q"}), {.input = "Hi\nMore\nAnd\n"});
  const RunResult first = run_thaw(chat({"--session", path}), {.input = "Hi\nMore\n"});
  const RunResult second = run_thaw(chat({"--session", path}), {.input = "And\n"});
  CHECK(whole.exit_code == 0);
  CHECK(first.out + second.out == whole.out);
  CHECK(contains(first.err, "(saved in " + path + ": "));
  CHECK(contains(second.err, "(2 messages, "));
  CHECK(second.err.find("warning") == std::string::npos);
  CHECK(contains(run_thaw(chat({"--session", path, "--system", "x"})).err, "warning: --system: "));
  const RunResult third = run_thaw(
      chat({"-q"}), {.input = "Hi\n/save " + path + "\n/reset\n/load " + path + " \nMore\n"});
  CHECK(third.exit_code == 0);
  CHECK(third.out == first.out);

  check_fails(chat({"-q"}), 1, "/load: expected FILE, found nothing", "/load\n");
  check_fails(chat({"-q"}), 1, "/nowhere/x: cannot", "/save /nowhere/x\n");
  check_fails(chat({"-q"}), 1, "/nowhere: cannot open", "/load /nowhere\n");
  check_fails(chat({"-q", "--session", "/nowhere/x"}), 1, "/nowhere/x: cannot write", "Hi\n");
  check_fails(chat({"--history", path, "--session", path}), 2, "--session and --history: expected");
  write_file(path, "text of mine\n");
  check_fails(chat({"-q"}), 1,
              path +
                  ": expected a saved conversation, which begins with {\"thaw_session\":, found "
                  "\"text of mine\\x0a\"",
              "/save " + path + "\n");
  CHECK(read_file(path) == "text of mine\n");
  check_fails(chat({"-q", "--session", path}), 1, path + ": expected a saved conversation");
}

TEST_CASE("chat: --session saves however the conversation ends, but nothing over something") {
  testing::TemporaryDirectory directory;
  const std::string path = (directory.path() / "talk").string();
  const auto n_turns = [&] {
    return std::filesystem::exists(path) ? std::ssize(read_session(path).said.turns) : -1;
  };
  const auto run = [&](const std::string& input, testing::RunOptions options = {},
                       std::vector<std::string> more = {}) {
    options.input = input;
    more.insert(more.end(), {"--session", path});
    return run_thaw(chat(more), options).exit_code;
  };
  CHECK(run("") == 0);
  CHECK(n_turns() == -1);
  write_file(path, "");
  CHECK(run("Hi\n/rety\nMore\n") == 1);
  CHECK(n_turns() == 1);
  CHECK(run("/reset\n") == 0);
  CHECK(n_turns() == 1);
  CHECK(run("More\n", {.stdout_path = "/dev/full"}) == 1);
  CHECK(n_turns() == 2);
  CHECK(std::filesystem::status(path).permissions() ==
        (std::filesystem::perms::owner_read | std::filesystem::perms::owner_write));
  for (const int signal : {SIGTERM, SIGHUP, SIGINT}) {
    std::filesystem::remove(path);
    CHECK(run("Hi\nMore\n", {.interrupt_after = 20, .signal = signal},
              {"-n", "-1", "-c", "1000000", "--presence-penalty", "-1000", "--penalty-window",
               "1"}) == 128 + signal);
    CHECK(n_turns() == 1);
  }
}

TEST_CASE("chat: a session in a terminal shows where it ended, and can be saved elsewhere") {
  testing::TemporaryDirectory directory;
  const auto in = [&](const char* name) { return (directory.path() / name).string(); };
  std::filesystem::create_directory(in("gone"));
  ::setenv("HOME", directory.path().c_str(), 1);
  const RunResult first = run_thaw(chat({"--session", in("talk")}), {.input = "H\x1bi\n"});
  REQUIRE(first.exit_code == 0);
  const RunResult r =
      testing::run_thaw_in_terminal(chat({"--session", in("gone/talk")}),
                                    {{"> ", "/load ~/talk\r"},
                                     {"> Hi\r\n", ""},
                                     {"> ", "\x04", [&] { std::filesystem::remove(in("gone")); }},
                                     {"; /save FILE saves it elsewhere", ""},
                                     {"> ", "/save ~/again\r"},
                                     {"(saved in ~/again: ", ""},
                                     {"> ", "\x04"}});
  CAPTURE(r.out);
  CHECK(r.exit_code == 1);
  CHECK(read_session(in("again")).said.turns.size() == 1);

  std::string bytes = read_file(in("again"));
  const std::size_t at = bytes.find("\"identity\":\"") + 12;
  bytes[at] = bytes[at] == '0' ? '1' : '0';
  write_file(in("again"), bytes);
  CHECK(contains(run_thaw(chat({"--session", in("again")})).err,
                 "(saved with other weights, of tiny: the next message reads all of it anew)\n"));
}

TEST_CASE("Ctrl-C: the one that is said to be deadly ends the process, none where none is") {
  const auto status_after = [](int deadly, int presses) {
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      const std::atomic<bool>& interrupted = catch_interrupt(deadly);
      for (int i = 0; i < presses; ++i) std::raise(SIGINT);
      ::_exit(interrupted ? 7 : 8);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
  };
  for (const int deadly : {2, 3}) {
    CHECK(status_after(deadly, 0) == 8);
    CHECK(status_after(deadly, deadly - 1) == 7);
    CHECK(status_after(deadly, deadly) == -SIGINT);
  }
  CHECK(status_after(0, 9) == 7);
}

}  // namespace
}  // namespace thaw
