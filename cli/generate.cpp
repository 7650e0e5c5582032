// thaw generate: streams a completion, or the answer to a message.
#include "model/generate.h"

#include <cmath>
#include <iostream>
#include <nlohmann/json.hpp>
#include <random>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/text_stream.h"
#include "cli/tokenizer_source.h"
#include "cli/watch.h"
#include "cli/writing.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

struct Options {
  CommonOptions common;
  RecoveryFlags recovery;
  InputOptions input;
  SamplerOptions sampler;
  WatchOptions watch;
  std::optional<std::uint64_t> seed;
  int max_tokens = 256;
  std::vector<std::string> stops;
  bool ignore_eos = false;
  bool chat = false;
  std::optional<std::string> system;
  bool special = false;
  bool echo = false;
  bool verbose = false;
};

void add_prompt_flags(Flags& flags, Options& o) {
  flags.section("Model and prompt");
  add_model_flag(flags, o.common,
                 "a .gguf file, or a Hugging Face directory with config.json, tokenizer.json and "
                 "*.safetensors");
  add_input_flags(flags, o.input, "the prompt");
  flags.toggle(o.chat, "--chat", "the prompt is a message: wrap it in the model's chat template");
  flags.text(o.system, "--system", "TEXT",
             "with --chat: the system message; by default the model's own, \"\" for none");
  flags.toggle(o.special, "--special",
               "read control tokens such as <|im_start|> in the prompt as such, not as text");
  flags.toggle(o.echo, "--echo", "print the prompt before its completion");

  flags.section("Where it ends");
  flags.integer(o.max_tokens, "-n, --max-tokens",
                "most tokens to make; -1: until the context is full", -1, 1 << 24);
  flags.texts(o.stops, "--stop", "TEXT", "end before TEXT, which is not printed; may be repeated");
  flags.toggle(o.ignore_eos, "--ignore-eos", "go on past the model's end-of-text tokens");
}

bool parse(const Args& args, Options& o) {
  Flags flags(
      "generate", "-m MODEL [-p TEXT | -f FILE | -] [flags]",
      "Continues a prompt, or answers it with --chat. The text goes to standard output as it is "
      "made, then statistics to standard error. One newline at the end of a prompt from a file "
      "or from standard input is dropped. Ctrl-C ends the text; a second one ends the program.");
  add_prompt_flags(flags, o);
  add_sampling_flags(flags, o.sampler, o.seed);
  add_kv_flags(flags, o.common,
               "most tokens kept, of prompt and text, where the last one written needs no room; by "
               "default the model's context. Memory is taken only as tokens arrive");
  add_recovery_flags(flags, o.recovery);
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.toggle(o.verbose, "-v, --verbose", "more about the run on standard error");
  add_watch_flags(flags, o.watch);
  add_heat_flag(flags, o.watch);
  flags.examples(
      "  thaw generate -m model.gguf -p \"Once upon a time\" -n 100\n"
      "  thaw generate -m model.gguf --chat -p \"Why is the sky blue?\" --temp 0\n"
      "  thaw generate -m model.gguf -f story.txt --stop $'\\n\\n' --seed 7 > more.txt\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  check_kv({o.common.kv});
  check_recovery(o.recovery, {o.common.kv.policy});
  if (o.system && !o.chat) throw UsageError("--system needs --chat");
  if (o.chat && o.special) throw UsageError("--special has no meaning with --chat");
  if (o.chat && o.echo) throw UsageError("--echo has no meaning with --chat");
  o.sampler.seed = o.seed ? *o.seed : std::random_device{}();
  return true;
}

Input read_prompt(const Options& o) {
  Input prompt = read_input(o.input, "a prompt");
  if (!o.input.text && prompt.text.ends_with('\n')) {
    prompt.text.pop_back();
    if (prompt.text.ends_with('\r')) prompt.text.pop_back();
  }
  return prompt;
}

std::vector<TokenId> encode_message(const Options& o, const Tokenizer& tokenizer,
                                    const Input& message) {
  const ChatFormat format = recognise_chat_format(tokenizer);
  require(format != ChatFormat::kNone, *o.common.model, ": chat template: expected ", kChatFormats,
          ", found another; --chat is not for this model");
  std::vector<ChatMessage> messages;
  const std::string system = o.system ? *o.system : default_system_message(tokenizer);
  if (!system.empty()) messages.push_back({"system", system});
  messages.push_back({"user", message.text});
  if (o.system) warn_of_missing(tokenizer, {*o.system, "--system"});
  warn_of_missing(tokenizer, message);
  return encode_chat(tokenizer, format, messages);
}

std::vector<TokenId> encode_prompt(const Options& o, const Tokenizer& tokenizer,
                                   const Input& prompt, const Config& config, int context) {
  require_room(tokenizer, prompt, context);
  std::vector<TokenId> ids =
      o.chat ? encode_message(o, tokenizer, prompt)
             : encode_input(tokenizer, prompt, {.add_special = true, .parse_special = o.special});
  if (ids.empty() && tokenizer.bos() >= 0) ids = {tokenizer.bos()};
  require(!ids.empty(), prompt.source,
          ": expected a prompt, found an empty one, and this model has no "
          "begin-of-text token to start from");
  require(ids.size() <= static_cast<std::size_t>(context), prompt.source, ": expected at most ",
          context, " tokens (the context), found ", ids.size(),
          context < config.context_length ? join("; -c can be up to ", config.context_length) : "");
  return ids;
}

const char* finish_name(Finish finish) {
  constexpr const char* kNames[] = {"end", "length", "context", "stop", "interrupted"};
  return kNames[static_cast<int>(finish)];
}

void print_statistics(const Options& o, const Generation& g, const Recovery& recovery,
                      int n_layers) {
  constexpr const char* kFinish[] = {"the model ended the text", "-n reached",
                                     "the context is full", "--stop text", "interrupted"};
  std::cerr << "prompt   " << count(g.prompt_tokens, "token") << " in "
            << fixed(g.prefill_seconds, 2) << " s, "
            << fixed(rate(g.prompt_tokens, g.prefill_seconds), 1) << " tok/s";
  if (!g.tokens.empty()) {
    std::cerr << "; first token after " << fixed(g.first_token_seconds, 2) << " s";
  }
  std::cerr << "\noutput   " << count(std::ssize(g.tokens), "token") << " in "
            << fixed(g.decode_seconds, 2) << " s, "
            << fixed(rate(g.decode_steps, g.decode_seconds), 1) << " tok/s; "
            << kFinish[static_cast<int>(g.finish)] << "\nkv       "
            << count(g.context_tokens, "token") << ", "
            << describe_kv(o.common.kv, g.usage, g.counters, n_layers);
  if (g.checks > 0)
    std::cerr << "; " << count(g.checks, "check") << ", " << count(g.corrected, "token")
              << " corrected";
  std::cerr << "\n";
  if (recovery.on()) std::cerr << "recovery " << describe(recovery) << "\n";
  std::cerr << "seed     " << o.sampler.seed << "\n";
  if (o.verbose) std::cerr << "logits   fingerprint " << hex(g.fingerprint) << "\n";
}

// A count that is a mean of lanes, and so a sum of fractions.
double six_decimals(double value) { return std::round(value * 1e6) / 1e6; }

std::string to_json(const Options& o, const Generation& g, const Recovery& recovery,
                    const std::string& text) {
  return json_line({
      {"text", text},
      {"finish_reason", finish_name(g.finish)},
      {"prompt_tokens", g.prompt_tokens},
      {"output_tokens", g.tokens.size()},
      {"tokens", g.tokens},
      {"seed", o.sampler.seed},
      {"prefill_s", g.prefill_seconds},
      {"prefill_tok_s", rate(g.prompt_tokens, g.prefill_seconds)},
      {"first_token_s", g.first_token_seconds},
      {"decode_s", g.decode_seconds},
      {"decode_tok_s", rate(g.decode_steps, g.decode_seconds)},
      {"context_tokens", g.context_tokens},
      {"kv_bytes", g.usage.full},
      {"kv_resident_bytes", g.usage.resident},
      {"kv_hot_bytes", g.usage.hot},
      {"kv_ghost_bytes", g.usage.ghosts},
      {"kv_cold_bytes", g.usage.cold},
      {"kv_bookkeeping_bytes", g.usage.bookkeeping},
      {"policy", o.common.kv.policy},
      {"attended_pct",
       g.counters.visible > 0 ? 100 * g.counters.attended / g.counters.visible : 100},
      {"recalled_tokens", six_decimals(g.counters.recalled)},
      {"thawed_tokens", six_decimals(g.counters.thawed)},
      {"cold_bytes_read", g.counters.cold_bytes_read},
      {"kv_type", o.common.kv.type_name},
      {"checks", g.checks},
      {"corrected", g.corrected},
      {"recovery", to_json(recovery)},
      {"logits_fingerprint", hex(g.fingerprint)},
  });
}

// Where generated text goes: to standard output as it comes, or into `text` for --json.
class Sink {
 public:
  explicit Sink(bool keep) : keep_(keep) {}
  void write(std::string_view piece) {
    if (keep_) {
      text_ += piece;
    } else {
      write_stdout(piece);
    }
    if (!piece.empty()) line_ended_ = piece.back() == '\n';
  }
  // A terminal gets the newline that the text lacks; a file gets exactly the text.
  void finish() {
    if (!keep_ && !line_ended_ && stdout_is_terminal()) write_stdout("\n");
  }
  const std::string& text() const { return text_; }

 private:
  bool keep_;
  bool line_ended_ = true;
  std::string text_;
};

Generation stream(const Options& o, const Model& model, const Tokenizer& tokenizer,
                  const std::vector<TokenId>& prompt, int context,
                  const std::atomic<bool>& interrupted, Recovery& recovery, Sink& sink) {
  Transformer transformer(model, make_backend(o.common, model));
  if (o.verbose)
    std::cerr << "run      " << transformer.backend().name() << ", " << o.common.threads
              << " threads, context " << context << ", kv " << o.common.kv.type_name << "\n";
  const std::unique_ptr<KvStore> kv =
      make_kv_store(transformer.backend(), o.common.kv, model.config, context);
  Sampler sampler(o.sampler);
  TextStream text(o.stops, [&](std::string_view piece) { sink.write(piece); });
  Progress progress(o.common.quiet);
  Watch watch(o.watch, transformer, *kv);

  GenerateOptions options =
      writing_options(model, tokenizer, o.recovery, recovery, progress, interrupted);
  options.max_tokens = o.max_tokens;
  options.fingerprint = o.verbose || o.common.json;
  if (o.ignore_eos) options.is_end = {};
  Tokenizer::Reader reader(tokenizer, o.chat || tokenizer.is_special(prompt.back()));
  options.on_token = [&](TokenId id) { return text.feed(reader.read(id)); };
  watch.attach(options);
  Generation result = generate(transformer, *kv, sampler, prompt, options);
  progress.clear();
  text.finish();
  sink.finish();
  std::vector<TokenId> tokens(prompt.begin(), prompt.begin() + result.prompt_tokens);
  tokens.insert(tokens.end(), result.tokens.begin(), result.tokens.end());
  write_stdout_after([&] { watch.finish(tokenizer, tokens, result.prompt_tokens); },
                     o.common.json ? to_json(o, result, recovery, sink.text()) : "");
  return result;
}

}  // namespace

int run_generate(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  const int context = context_tokens(o.common, model.config);
  const Input input = read_prompt(o);
  const std::vector<TokenId> prompt = encode_prompt(o, tokenizer, input, model.config, context);
  if (o.verbose) std::cerr << "model    " << describe(model.config) << "\n";
  const std::atomic<bool>& interrupted = catch_interrupt();
  Recovery recovery(o.recovery.params(o.common.kv.policy));
  Sink sink(o.common.json);
  if (o.echo) sink.write(input.text);
  const Generation result =
      stream(o, model, tokenizer, prompt, context, interrupted, recovery, sink);
  if (!o.common.quiet) print_statistics(o, result, recovery, model.config.n_layers);
  return result.finish == Finish::kInterrupted ? kInterruptedExit : 0;
}

}  // namespace thaw
