// thaw chat: a conversation, line by line.
#include <algorithm>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/conversation.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/line_input.h"
#include "cli/options.h"
#include "cli/session.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "cli/watch.h"
#include "cli/writing.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr std::string_view kQuotes = "\"\"\"";

struct Options {
  CommonOptions common;
  RecoveryFlags recovery;
  InputOptions first;
  SamplerOptions sampler;
  WatchOptions watch;
  std::optional<std::uint64_t> seed;
  int max_tokens = -1;
  std::optional<std::string> system, session, history;
  bool verbose = false;
};

void add_chat_flags(Flags& flags, Options& o) {
  flags.section("Model and conversation");
  add_model_flag(flags, o.common,
                 "a .gguf file, or a Hugging Face directory with config.json, tokenizer.json and "
                 "*.safetensors");
  flags.text(o.first.text, "-p, --prompt", "TEXT", "the first message");
  flags.path(o.first.file, "-f, --file", "FILE", "read the first message from FILE");
  flags.text(o.system, "--system", "TEXT",
             "the system message; by default the model's own, \"\" for none");
  flags.integer(o.max_tokens, "-n, --max-tokens",
                "most tokens of an answer; -1: until the context is full", -1, 1 << 24);
  flags.path(o.session, "--session", "FILE",
             "go on with the conversation in FILE, if it is there, and save it there at the end");
  flags.text(o.history, "--history", "FILE",
             "where typed lines are kept for the arrow keys; by default "
             "~/.local/state/thaw/chat_history, \"\" for nowhere");
}

bool parse(const Args& args, Options& o) {
  Flags flags(
      "chat", "-m MODEL [flags]",
      "A conversation: each line that you type, or that standard input holds, is a message, and "
      "its answer goes to standard output. A message of several lines stands between \"\"\" and "
      "\"\"\". A line that begins with / is a command, and /help lists them; with // it is a "
      "message that begins with /. Ctrl-C ends an answer, Ctrl-D the conversation.");
  add_chat_flags(flags, o);
  add_sampling_flags(flags, o.sampler, o.seed);
  add_kv_flags(flags, o.common,
               "most tokens of the conversation; by default the model's context. Memory is taken "
               "only as tokens arrive");
  add_recovery_flags(flags, o.recovery);
  add_run_flags(flags, o.common);
  flags.section("Output");
  flags.toggle(o.common.quiet, "-q, --quiet", "no progress and no statistics on standard error");
  flags.toggle(o.verbose, "-v, --verbose", "statistics after each answer");
  add_watch_flags(flags, o.watch);
  add_heat_flag(flags, o.watch);
  flags.examples(
      "  thaw chat -m model.gguf\n"
      "  thaw chat -m model.gguf --system \"Answer in French.\" --temp 0\n"
      "  thaw chat -m model.gguf -f letter.txt      # talk about a text\n"
      "  printf 'Hello.\\nAnd in Welsh?\\n' | thaw chat -m model.gguf -q\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  check_kv({o.common.kv});
  check_recovery(o.recovery);
  require_two_files("--report", o.watch.report, "--trace", o.watch.trace);
  require_two_files("--report", o.watch.report, "--session", o.session);
  require_two_files("--trace", o.watch.trace, "--session", o.session);
  if (o.common.quiet && o.verbose) throw UsageError("expected -q or -v, found both");
  if (o.first.text && o.first.file) throw UsageError("expected -p or -f, found both");
  o.sampler.seed = o.seed ? *o.seed : std::random_device{}();
  return true;
}

// What is said of a line that cannot be taken; nothing has changed then.
struct Refused : Error {
  using Error::Error;
};

// The conversation, and what the user asks of it.
class Chat {
 public:
  Chat(const Options& o, const Model& model, const Tokenizer& tokenizer)
      : o_(o),
        model_(model),
        tokenizer_(tokenizer),
        transformer_(model, make_backend(o.common, model)),
        kv_(make_kv_store(transformer_.backend(), o.common.kv, model.config,
                          context_tokens(o.common, model.config))),
        talk_(tokenizer, transformer_, *kv_, o.sampler,
              o.system.value_or(default_system_message(tokenizer))),
        recovery_(o.recovery.params(o.common.kv.policy)),
        watch_(o.watch, transformer_, *kv_),
        lines_(o.history ? std::filesystem::path(*o.history) : default_history()) {
    if (o.system) warn_of_missing(tokenizer, {*o.system, "--system"});
  }

  int run();

 private:
  struct Command {
    const char *name, *argument, *help;
    void (Chat::*run)(const std::string& argument);
  };
  static const Command kCommands[];

  void take(const std::string& line);
  std::optional<std::string> read_block(std::string line);
  void obey(const std::string& line);
  static void attempt(const std::function<void()>& work);
  void say(const Input& message);
  void answer();
  void note(const std::string& text) const { std::cerr << text << "\n"; }

  void help(const std::string&);
  void retry(const std::string&);
  void undo(const std::string&);
  void reset(const std::string&);
  void stats(const std::string&);
  void save(const std::string& path);
  void load(const std::string& path);
  void quit(const std::string&) { quits_ = true; }

  const Options& o_;
  const Model& model_;
  const Tokenizer& tokenizer_;
  Transformer transformer_;
  std::unique_ptr<KvStore> kv_;
  Conversation talk_;
  Recovery recovery_;
  Watch watch_;
  LineInput lines_;
  bool quits_ = false, interrupted_ = false;
  int n_read_ = 0, n_first_ = 0, n_steps_ = 0;  // tokens of prompts, of the first; decode steps
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
  if (lines_.is_terminal() && !o_.common.quiet)
    note("Type a message, or /help. Ctrl-C ends an answer, Ctrl-D the conversation.");
  if (o_.session && std::filesystem::exists(*o_.session)) load(*o_.session);
  if (o_.system && *o_.system != talk_.system())
    note("warning: --system: the conversation has begun with another system message, which stays");
  if (o_.first.text || o_.first.file) {
    const Input message = read_input(o_.first, "the first message");
    if (lines_.is_terminal() && o_.first.text) note("> " + *o_.first.text);
    say(message);
  }
  while (!quits_ && !interrupted_) {
    std::string line;
    catch_interrupt();
    const LineInput::State state = lines_.read("> ", line);
    if (state == LineInput::State::kEnd) break;
    if (state == LineInput::State::kInterrupted)
      interrupted_ = !lines_.is_terminal();
    else
      take(line);
  }
  if (!o_.common.quiet) stats("");
  if (o_.session) save(*o_.session);
  watch_.finish(tokenizer_, talk_.tokens(),
                std::min(n_first_, static_cast<int>(talk_.tokens().size())));
  return interrupted_ ? kInterruptedExit : 0;
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
  }
}

// The lines up to the closing quotes, or to the end of the input; nothing after Ctrl-C.
std::optional<std::string> Chat::read_block(std::string line) {
  std::string block;
  while (!line.ends_with(kQuotes)) {
    block += line + "\n";
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
  const std::string guess = closest(name, names);
  throw Refused(join("unknown command ", printable(name),
                     guess.empty() ? "; /help lists them" : "; did you mean " + guess + "?"));
}

// Work that changes nothing where it fails, unless a device is what failed.
void Chat::attempt(const std::function<void()>& work) {
  try {
    work();
  } catch (const DeviceError&) {
    throw;
  } catch (const Error& error) {
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
      writing_options(model_, tokenizer_, o_.recovery, recovery_, progress, catch_interrupt());
  options.max_tokens = o_.max_tokens;
  bool line_ended = true;
  watch_.attach(options);
  const Generation g = talk_.answer(options, [&](std::string_view piece) {
    write_stdout(piece);
    if (!piece.empty()) line_ended = piece.back() == '\n';
  });
  progress.clear();
  if (!line_ended) write_stdout("\n");
  if (n_read_ == 0) n_first_ = g.prompt_tokens;
  n_read_ += g.prompt_tokens, read_seconds_ += g.prefill_seconds;
  n_steps_ += g.decode_steps, decode_seconds_ += g.decode_seconds;
  if (g.finish == Finish::kInterrupted) interrupted_ = !lines_.is_terminal();
  if (g.finish == Finish::kInterrupted && g.tokens.empty())
    note("(interrupted before an answer: the message is taken back)");
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
}

void Chat::retry(const std::string&) {
  if (talk_.turns().empty()) throw Refused("/retry: expected a message before it, found none");
  const std::string message = talk_.turns().back().message;
  talk_.undo();
  say({message, "the message"});
}

void Chat::undo(const std::string&) {
  if (!talk_.undo()) throw Refused("/undo: expected a message before it, found none");
  note(talk_.turns().empty() ? "(the conversation is empty)"
                             : "(back after \"" + printable(talk_.turns().back().message) + "\")");
}

void Chat::reset(const std::string&) {
  talk_.clear();
  recovery_ = Recovery(recovery_.params());
  note("(a new conversation)");
}

void Chat::save(const std::string& path) {
  attempt([&] {
    const std::int64_t n_bytes = write_session(path, model_, talk_);
    if (!o_.common.quiet) note(join("(saved in ", path, ": ", format_bytes(n_bytes), ")"));
  });
}

void Chat::load(const std::string& path) {
  attempt([&] {
    if (!resume(read_session(path), model_, talk_))
      note("(saved with other weights: the next message reads all of it anew)");
  });
  recovery_ = Recovery(recovery_.params());
  const auto& turns = talk_.turns();
  if (!turns.empty() && lines_.is_terminal())
    note(join("> ", turns.back().message, "\n", turns.back().answer));
  if (!o_.common.quiet)
    note(join("(", count(std::ssize(turns), "message"), ", ",
              count(std::ssize(talk_.tokens()), "token"), ")"));
}

void Chat::stats(const std::string&) {
  note(join("chat     ", count(std::ssize(talk_.turns()), "message"), ", ", talk_.tokens().size(),
            " of ", kv_->shape().capacity, " tokens"));
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
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  return Chat(o, model, tokenizer).run();
}

}  // namespace thaw
