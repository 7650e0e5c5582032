#include "cli/chat_flags.h"

#include <random>

#include "cli/writing.h"
#include "device/error.h"

namespace thaw {
namespace {

void add_chat_flags(Flags& flags, ChatOptions& o) {
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
  flags.output(o.session, "--session", "FILE",
               "go on with the conversation in FILE, if it is there, and at the end save there "
               "what the conversation then is, unless it is empty");
  flags.text(o.history, "--history", "FILE",
             "where typed lines are kept for the arrow keys; by default "
             "~/.local/state/thaw/chat_history, \"\" for nowhere");
  flags.is_path(o.history, "--history", true);
}

}  // namespace

bool parse_chat(const Args& args, ChatOptions& o) {
  Flags flags(
      "chat", "-m MODEL [flags]",
      "A conversation: each line that you type, or that standard input holds, is a message, and "
      "its answer goes to standard output. A message of several lines is pasted, or "
      "stands between \"\"\" and \"\"\". A line that begins with / is a command, and /help lists "
      "them; with // it is a "
      "message that begins with /. Ctrl-C ends an answer, three of them the program; Ctrl-D ends "
      "the conversation.");
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
  check_recovery(o.recovery, {o.common.kv.policy});
  if (o.common.quiet && o.verbose) throw UsageError("expected -q or -v, found both");
  if (o.first.text && o.first.file) throw UsageError("expected -p or -f, found both");
  o.sampler.seed = o.seed ? *o.seed : std::random_device{}();
  return true;
}

}  // namespace thaw
