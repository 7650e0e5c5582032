// thaw chat: a conversation, line by line.
#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cli/chat_flags.h"
#include "cli/commands.h"
#include "cli/conversation.h"
#include "cli/format.h"
#include "cli/line_input.h"
#include "cli/session.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "cli/writing.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr std::string_view kQuotes = "\"\"\"";

// What other programs call a command.
constexpr std::pair<const char*, const char*> kElsewhere[] = {
    {"/clear", "/reset"}, {"/new", "/reset"}, {"/q", "/quit"},
    {"/exit", "/quit"},   {"/bye", "/quit"},  {"/regen", "/retry"}};

// "~/x" in the home directory, as a shell has it.
std::string at_home(const std::string& path) {
  const char* home = std::getenv("HOME");
  return home && path.starts_with("~/") ? home + path.substr(1) : path;
}

// What a file says, fit for a terminal: no control characters but ends of lines and tabs.
std::string visible(std::string_view text) {
  std::string out;
  for (const char c : text)
    if (static_cast<unsigned char>(c) >= 0x20 || c == '\n' || c == '\t') out += c;
  return out;
}

// What is said of a line that cannot be taken; nothing has changed then.
struct Refused : Error {
  using Error::Error;
};

// The conversation, and what the user asks of it.
class Chat {
 public:
  Chat(const ChatOptions& o, const Model& model, const Tokenizer& tokenizer)
      : o_(o),
        model_(model),
        tokenizer_(tokenizer),
        transformer_(model, make_backend(o.common, model)),
        kv_(make_kv_store(transformer_.backend(), o.common.kv, model.config,
                          context_tokens(o.common, model.config))),
        talk_(tokenizer, transformer_, *kv_, o.sampler),
        recovery_(o.recovery.params(o.common.kv.policy)),
        watch_(o.watch, transformer_, *kv_),
        lines_(o.history ? std::filesystem::path(*o.history) : default_history()) {
    talk_.begin(system());
    if (o.system) warn_of_missing(tokenizer, {*o.system, "--system"});
  }

  int run();

 private:
  struct Command {
    const char *name, *argument, *help;
    void (Chat::*run)(const std::string& argument);
  };
  static const Command kCommands[];

  void open();
  void converse();
  bool close();
  void keep();
  void take(const std::string& line);
  std::optional<std::string> read_block(std::string line);
  void obey(const std::string& line);
  static void attempt(const std::function<void()>& work);
  void say(const Input& message);
  void answer();
  // What the alarm knows, and what it began, is of other tokens.
  void taken_back() {
    recovery_ = Recovery(recovery_.params());
    kv_->reset(Rung::kNone);
  }
  void note(const std::string& text) const { std::cerr << text << "\n"; }
  std::string system() const { return o_.system.value_or(default_system_message(tokenizer_)); }

  void help(const std::string&);
  void retry(const std::string&);
  void undo(const std::string&);
  void reset(const std::string&);
  void stats(const std::string&);
  void save(const std::string& path);
  void load(const std::string& path);
  void quit(const std::string&) { quits_ = true; }

  const ChatOptions& o_;
  const Model& model_;
  const Tokenizer& tokenizer_;
  Transformer transformer_;
  std::unique_ptr<KvStore> kv_;
  Conversation talk_;
  Recovery recovery_;
  Watch watch_;
  LineInput lines_;
  bool quits_ = false, interrupted_ = false, opened_ = false, greeted_ = false, warned_ = false;
  int n_read_ = 0, n_steps_ = 0;  // tokens of prompts, decode steps
  double read_seconds_ = 0, decode_seconds_ = 0;
};

const Chat::Command Chat::kCommands[] = {
    {"/help", "", "this list", &Chat::help},
    {"/retry", "", "answer the last message again", &Chat::retry},
    {"/undo", "", "take back the last message and its answer", &Chat::undo},
    {"/reset", "", "begin a new conversation", &Chat::reset},
    {"/stats", "", "tokens, speed and memory so far", &Chat::stats},
    {"/save", "FILE", "write the conversation to FILE, with its keys and values", &Chat::save},
    {"/load", "FILE", "go on with the conversation in FILE", &Chat::load},
    {"/quit", "", "end, as Ctrl-D does", &Chat::quit},
};

int Chat::run() {
  try {
    open();
    do {
      converse();
    } while (!close());
  } catch (const DeviceError&) {
    throw;
  } catch (const std::exception&) {
    if (opened_) keep();
    throw;
  }
  const Said& said = talk_.said();
  watch_.finish(tokenizer_, said.tokens,
                static_cast<int>(said.turns.empty() ? said.tokens.size() : said.turns[0].reply));
  return ended_by() != 0 ? 128 + ended_by() : interrupted_ ? kInterruptedExit : 0;
}

void Chat::open() {
  catch_end();
  if (lines_.is_terminal() && !o_.common.quiet)
    note("Type a message, or /help. Ctrl-C ends an answer, Ctrl-D the conversation.");
  if (o_.session) require_writable_session(*o_.session);
  if (o_.session && has_session(*o_.session)) load(*o_.session);
  opened_ = true;
  if (o_.system && *o_.system != talk_.said().system)
    note("warning: --system: the conversation has begun with another system message, which stays");
}

void Chat::converse() {
  if (!std::exchange(greeted_, true) && (o_.first.text || o_.first.file)) {
    const Input message = read_input(o_.first, "the first message");
    if (lines_.is_terminal() && o_.first.text) note("> " + *o_.first.text);
    say(message);
  }
  quits_ = false;
  while (!quits_ && !interrupted_ && ended_by() == 0) {
    std::string line;
    catch_interrupt(0);
    const LineInput::State state = lines_.read("> ", line);
    if (state == LineInput::State::kEnd) break;
    if (state == LineInput::State::kInterrupted)
      interrupted_ = !lines_.is_terminal();
    else
      take(line);
  }
}

// Whether it is over: somebody at a terminal can still say where else to save it.
bool Chat::close() {
  try {
    if (!o_.common.quiet) stats("");
    keep();
    return true;
  } catch (const Refused& error) {
    if (!lines_.is_terminal() || ended_by() != 0 || std::exchange(warned_, true)) throw;
    note(join("thaw: ", one_line(error.what()), "; /save FILE saves it elsewhere"));
    return false;
  }
}

// What --session is for.
void Chat::keep() {
  if (o_.session && !talk_.said().turns.empty()) save(*o_.session);
}

// A message, a command, or nothing at all.
void Chat::take(const std::string& line) {
  if (line.find_first_not_of(" \t") == line.npos) return;
  try {
    if (line.starts_with(kQuotes)) {
      if (const auto block = read_block(line.substr(kQuotes.size()))) say({*block, "the message"});
    } else if (line.starts_with("/") && !line.starts_with("//")) {
      obey(line);
    } else {
      say({line.substr(line.starts_with("//")), "the message"});
    }
  } catch (const Refused& error) {
    if (!lines_.is_terminal()) throw;
    note(join("thaw: ", one_line(error.what())));
    lines_.drop();
  }
}

// The lines up to the closing quotes, or to the end of the input; nothing after Ctrl-C.
std::optional<std::string> Chat::read_block(std::string line) {
  std::string block;
  while (!line.ends_with(kQuotes)) {
    block += line + "\n";
    if (block.size() > kMaxInput)
      throw Refused(join("the message: expected at most ", kMaxInput, " bytes, found more"));
    const LineInput::State state = lines_.read(". ", line);
    if (state == LineInput::State::kInterrupted) {
      interrupted_ = !lines_.is_terminal();
      return {};
    }
    if (state == LineInput::State::kEnd) break;
  }
  if (line.ends_with(kQuotes)) block += line.substr(0, line.size() - kQuotes.size());
  return block.substr(block.starts_with('\n'));
}

void Chat::obey(const std::string& line) {
  const std::size_t space = std::min(line.find(' '), line.size());
  const std::string name = line.substr(0, space);
  const std::size_t begin = std::min(line.find_first_not_of(' ', space), line.size());
  const std::string argument = line.substr(begin, line.find_last_not_of(' ') + 1 - begin);
  std::vector<std::string> names;
  for (const Command& command : kCommands) {
    names.emplace_back(command.name);
    if (name != command.name) continue;
    const bool takes_one = *command.argument != '\0';
    if (takes_one == argument.empty())
      throw Refused(join(name, ": expected ", takes_one ? command.argument : "nothing after it",
                         ", found ", takes_one ? "nothing" : printable(argument)));
    return (this->*command.run)(argument);
  }
  std::string guess = closest(name, names);
  for (const auto& [theirs, ours] : kElsewhere)
    if (name == theirs) guess = ours;
  throw Refused(join("unknown command ", printable(name),
                     guess.empty() ? "; /help lists them, and // begins a message with /"
                                   : "; did you mean " + guess + "?"));
}

// Work that changes nothing where it fails, unless a device is what failed.
void Chat::attempt(const std::function<void()>& work) {
  try {
    work();
  } catch (const DeviceError&) {
    throw;
  } catch (const std::bad_alloc&) {
    throw Refused("out of memory");
  } catch (const std::exception& error) {
    throw Refused(error.what());
  }
}

void Chat::say(const Input& message) {
  attempt([&] { talk_.add(message); });
  answer();
}

void Chat::answer() {
  Progress progress(o_.common.quiet);
  GenerateOptions options =
      writing_options(model_, tokenizer_, o_.recovery, recovery_, progress, catch_interrupt(3));
  options.max_tokens = o_.max_tokens;
  bool line_ended = true;
  watch_.attach(options);
  const Generation g = talk_.answer(options, [&](std::string_view piece) {
    write_stdout(piece);
    if (!piece.empty()) line_ended = piece.back() == '\n';
  });
  progress.clear();
  if (!line_ended) write_stdout("\n");
  n_read_ += g.prompt_tokens, read_seconds_ += g.prefill_seconds;
  n_steps_ += g.decode_steps, decode_seconds_ += g.decode_seconds;
  if (g.finish == Finish::kInterrupted) {
    interrupted_ = !lines_.is_terminal();
    lines_.drop();
    if (g.tokens.empty()) note("(interrupted before an answer: /retry answers, /undo takes back)");
  }
  if (g.finish == Finish::kContext)
    note(join("(the context of ", kv_->shape().capacity,
              " tokens is full: /undo takes back, /reset begins anew)"));
  if (g.finish == Finish::kLength) note("(-n reached)");
  if (o_.verbose) stats("");
}

void Chat::help(const std::string&) {
  for (const Command& command : kCommands) {
    const std::string call = join(command.name, *command.argument ? " " : "", command.argument);
    note("  " + call + std::string(14 - call.size(), ' ') + command.help);
  }
  note("  \"\"\"           opens and closes a message of several lines");
  note("  //            begins a message that begins with /");
}

void Chat::retry(const std::string&) {
  const auto& turns = talk_.said().turns;
  const auto capacity = static_cast<std::size_t>(kv_->shape().capacity);
  if (!turns.empty() && turns.back().reply > capacity)
    throw Refused(join("/retry: the context of ", capacity, " tokens is full"));
  if (!talk_.unanswer()) throw Refused("/retry: expected a message before it, found none");
  taken_back();
  answer();
}

void Chat::undo(const std::string&) {
  if (!talk_.undo()) throw Refused("/undo: expected a message before it, found none");
  taken_back();
  const auto& turns = talk_.said().turns;
  note(turns.empty() ? "(the conversation is empty)"
                     : "(back after \"" + printable(turns.back().message) + "\")");
}

void Chat::reset(const std::string&) {
  talk_.begin(system());
  taken_back();
  note("(a new conversation)");
}

void Chat::save(const std::string& path) {
  attempt([&] {
    const std::int64_t n_bytes = write_session(at_home(path), model_, talk_);
    if (!o_.common.quiet) note(join("(saved in ", path, ": ", format_bytes(n_bytes), ")"));
  });
}

void Chat::load(const std::string& path) {
  std::optional<Session> session;
  Resumed next = {};
  attempt([&] {
    session = read_session(at_home(path));
    next = resumed(*session, model_, talk_);
  });
  const bool is_new = next.said.turns.empty();
  if (is_new) next.said.system = system();
  if (!is_new && !next.rows)
    note(join("(saved with other weights, of ", printable(session->model),
              ": the next message reads all of it anew)"));
  talk_.resume(std::move(next.said), next.rows ? &session->rows : nullptr);
  taken_back();
  const Said& said = talk_.said();
  if (!is_new && lines_.is_terminal())
    note(join("> ", visible(said.turns.back().message), "\n", visible(said.turns.back().answer)));
  if (!o_.common.quiet)
    note(join("(", count(std::ssize(said.turns), "message"), ", ",
              count(std::ssize(said.tokens), "token"), ")"));
}

void Chat::stats(const std::string&) {
  const int capacity = kv_->shape().capacity;
  note(join("chat     ", count(std::ssize(talk_.said().turns), "message"), ", ",
            std::min<std::int64_t>(std::ssize(talk_.said().tokens), capacity), " of ", capacity,
            " tokens"));
  note(join("speed    ", count(n_read_, "token"), " read at ",
            fixed(rate(n_read_, read_seconds_), 1), " tok/s, ", n_steps_, " written at ",
            fixed(rate(n_steps_, decode_seconds_), 1), " tok/s"));
  note(join("kv       ", count(kv_->length(), "token"), ", ",
            describe_kv(o_.common.kv, kv_->usage(), kv_->counters(), model_.config.n_layers)));
  if (recovery_.on()) note(join("recovery ", describe(recovery_)));
  note(join("seed     ", o_.sampler.seed));
}

}  // namespace

int run_chat(const Args& args) {
  ChatOptions o;
  if (!parse_chat(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  return Chat(o, model, tokenizer).run();
}

}  // namespace thaw
