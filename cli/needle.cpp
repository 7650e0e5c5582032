// thaw needle: finds what was said long ago, a grid of contexts and depths.
#include <algorithm>
#include <chrono>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/needle_report.h"
#include "cli/needle_text.h"
#include "cli/options.h"
#include "cli/output_file.h"
#include "cli/recovery_flags.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "model/generate.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

constexpr int kMaxContext = 1 << 24;
constexpr int kPrefill = 128;
constexpr int kPreface = 24;  // tokens that an answer may spend before its number

struct Options {
  CommonOptions common;
  std::vector<std::string> policies = {"full", "thaw"};
  RecoveryFlags recovery;
  std::vector<int> contexts = {1500};
  std::vector<int> depths = {5};
  int digits = 7;
  int needles = 1;
  int distractors = 0;
  bool second = false;
  std::optional<std::string> filler;  // else of sentences
  std::optional<std::string> file;
  bool chat = false;
  std::optional<std::uint64_t> seed = 1;
  std::optional<int> prefill;
  bool prefill_all = false;
  bool prefill_question = false;
  std::optional<std::string> html;

  std::vector<double> places;  // of the keys, as shares, ascending
  std::string text;            // of file
};

void add_question_flags(Flags& flags, Options& o) {
  flags.section("What is asked");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  flags.integers(o.contexts, "--context", "tokens before the question; a list", 1, kMaxContext);
  flags.integers(o.depths, "--depths",
                 "where the key stands: at N places, evenly, or at a list of percentages", 0, 100);
  flags.integer(o.digits, "--digits", "digits of a key", 1, 64);
  flags.integer(o.needles, "--needles",
                "most keys in one text, each at one of the depths and asked for by its owner's "
                "name; more are harder, and quicker, as a text is read once for all its keys",
                1, 8);
  flags.integer(o.distractors, "--distractors",
                "numbers of the same kind about other things in each text", 0, 1000);
  flags.toggle(o.second, "--second",
               "after each answer ask for the next key of the text, or again for its only one");
  flags.choice(o.filler, "--filler", {"sentences", "repeat"},
               "what stands around the keys: sentences made up at random, or five sentences "
               "repeated (default sentences)");
  flags.path(o.file, "-f, --file", "FILE", "take the text around the keys from FILE");
  flags.toggle(o.chat, "--chat", "ask in the model's chat template");
  flags.seed(o.seed, "--seed", "of texts and keys (default 1)");
}

void add_reading_flags(Flags& flags, Options& o) {
  flags.section("How it is read");
  flags.integer(o.prefill, "--prefill",
                join("tokens of the text that are read exactly, in batches; the rest is decoded "
                     "one by one under the policy, which thus has frozen the key before it is "
                     "asked for. Under full, where it makes no difference, all is read in batches "
                     "(default ",
                     kPrefill, ")"),
                0, kMaxContext);
  flags.toggle(o.prefill_all, "--prefill-all", "read the whole text exactly, in batches");
  flags.toggle(o.prefill_question, "--prefill-question",
               "read questions exactly, as a chat does, and not under the policy");
}

// N places in the middle of N equal parts, or the percentages named.
std::vector<double> places(const std::vector<int>& depths) {
  std::vector<double> shares;
  if (depths.size() > 1) {
    for (const int percent : std::set<int>(depths.begin(), depths.end()))
      shares.push_back(percent / 100.0);
  } else {
    for (int i = 0; i < depths[0]; ++i) shares.push_back((i + 0.5) / depths[0]);
  }
  if (shares.empty()) throw UsageError("--depths: expected at least 1 place, found 0");
  return shares;
}

bool parse(const Args& args, Options& o) {
  Flags flags(
      "needle", "-m MODEL [flags]",
      "Hides a key in a long text, asks for it, and prints the percentage of its digits that the "
      "answer has, for a grid of text lengths and places of the key. A key that was frozen long "
      "before anybody asks shows whether a policy can find what it put away. A list of policies, "
      "by default full,thaw, shows the grid under each and what the others miss that full finds.");
  add_question_flags(flags, o);
  add_reading_flags(flags, o);
  flags.section("Keys and values");
  o.common.kv.freezes_at_once = true;
  add_kv_flags(flags, o.common.kv, &o.policies);
  add_recovery_flags(flags, o.recovery);
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.output(o.html, "--html", "FILE", "write the grid and every answer as a page, too");
  flags.examples(
      "  thaw needle -m model.gguf --context 1500,4096 --depths 5\n"
      "  thaw needle -m model.gguf --needles 4 --depths 4 --digits 64 --second --html grid.html\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  check_kv(with_policies(o.common.kv, o.policies));
  check_recovery(o.recovery, o.policies);
  if (o.file && o.filler) throw UsageError("expected -f or --filler, found both");
  if (o.prefill && o.prefill_all)
    throw UsageError("expected --prefill or --prefill-all, found both");
  o.places = places(o.depths);
  std::sort(o.contexts.begin(), o.contexts.end());
  o.contexts.erase(std::unique(o.contexts.begin(), o.contexts.end()), o.contexts.end());
  if (o.file) o.text = read_file(*o.file).text;
  return true;
}

// The texts of one context. Depths are dealt out in turn, so that a text's keys stand far apart.
std::vector<NeedleSpec> plan_texts(const Options& o, int context) {
  const int n_depths = static_cast<int>(o.places.size());
  const int n_texts = (n_depths + o.needles - 1) / o.needles;
  std::vector<NeedleSpec> specs;
  for (int t = 0; t < n_texts; ++t) {
    NeedleSpec spec;
    spec.context = context;
    spec.digits = o.digits;
    for (int i = t; i < n_depths; i += n_texts) spec.depths.push_back(o.places[i]);
    spec.distractors = o.distractors;
    spec.filler = o.file                 ? Filler::kText
                  : o.filler == "repeat" ? Filler::kRepeated
                                         : Filler::kSentences;
    spec.text = o.text;
    spec.chat = o.chat;
    spec.seed = *o.seed + static_cast<std::uint64_t>(context) * 1000 + t;
    specs.push_back(std::move(spec));
  }
  return specs;
}

// Reads texts and answers questions under one policy.
class Reader {
 public:
  Reader(const Options& o, const CommonOptions& common, const Model& model,
         const Tokenizer& tokenizer, const std::atomic<bool>& interrupted)
      : o_(o),
        common_(common),
        model_(model),
        tokenizer_(tokenizer),
        interrupted_(interrupted),
        transformer_(model, make_backend(common, model)),
        progress_(common.quiet) {}

  // Stops early when interrupted.
  NeedleRun run() {
    const auto start = std::chrono::steady_clock::now();
    NeedleRun run;
    run.policy = common_.kv.policy;
    run.n_layers = model_.config.n_layers;
    for (int context : o_.contexts) {
      const std::vector<NeedleSpec> specs = plan_texts(o_, context);
      for (std::size_t t = 0; t < specs.size() && !interrupted_; ++t) {
        place_ =
            join(common_.kv.policy, ", ", context, " tokens, text ", t + 1, " of ", specs.size());
        examine(specs[t], run);
      }
    }
    run.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    return run;
  }

 private:
  void examine(const NeedleSpec& spec, NeedleRun& run) {
    const NeedleText text = make_needle_text(tokenizer_, spec);
    const int n_tokens = static_cast<int>(text.tokens.size());
    const auto kv = make_kv_store(transformer_.backend(), common_.kv, model_.config,
                                  n_tokens + 2 * longest_turn(text));
    Recovery recovery(o_.recovery.params(common_.kv.policy));
    read(*kv, text.tokens, recovery);
    run.alarms += static_cast<int>(recovery.firings().size());
    for (std::size_t i = 0; i < text.keys.size() && !interrupted_; ++i) {
      kv->rewind(n_tokens);
      kv->reset(Rung::kNone);     // what an alarm of the text or another question began
      Recovery alarm = recovery;  // as it was at the end of the text
      const NeedleKey& key = text.keys[i];
      std::vector<TokenId> prompt = needle_question(tokenizer_, key, o_.chat, false);
      const std::ptrdiff_t n_before = n_tokens + std::ssize(prompt);
      const std::vector<TokenId> first = answer(*kv, alarm, prompt, spec, 1, key, run);
      if (!o_.second || interrupted_) continue;
      const NeedleKey& other = text.keys[(i + 1) % text.keys.size()];
      prompt = needle_question(tokenizer_, other, o_.chat, true);
      if (kv->length() < n_before + std::ssize(first))
        prompt.insert(prompt.begin(), first.back());  // it was not run yet
      answer(*kv, alarm, prompt, spec, 2, other, run);
    }
    account(*kv, run);
  }

  // Most tokens of a question with its answer.
  int longest_turn(const NeedleText& text) const {
    std::size_t longest = 0;
    for (const NeedleKey& key : text.keys) {
      for (const bool again : {false, true})
        longest = std::max(longest, needle_question(tokenizer_, key, o_.chat, again).size());
    }
    return static_cast<int>(longest) + 1 + kPreface + o_.digits;
  }

  static void account(const KvStore& kv, NeedleRun& run) {
    const KvUsage usage = kv.usage();
    const KvCounters& counters = kv.counters();
    run.usage.resident += usage.resident;
    run.counters.steps += counters.steps;
    run.counters.attended += counters.attended;
    run.counters.visible += counters.visible;
    run.counters.recalled += counters.recalled;
    KvShape f16 = kv.shape();
    f16.type = KvType::kF16;
    run.f16_bytes += kv.length() * f16.bytes_per_token();
  }

  void read(KvStore& kv, const std::vector<TokenId>& tokens, Recovery& recovery) {
    const int n_tokens = static_cast<int>(tokens.size());
    const bool exact = common_.kv.policy == "full" || o_.prefill_all;
    teacher_force(
        transformer_, kv, tokens,
        {exact ? n_tokens : o_.prefill.value_or(kPrefill), n_tokens, o_.recovery.verify},
        [&](int row, std::span<const float>) {
          progress_.show(join(place_, ": token ", row, " of ", n_tokens));
          return !interrupted_;
        },
        &recovery);
  }

  // The tokens written, and what they say.
  std::vector<TokenId> answer(KvStore& kv, Recovery& recovery, const std::vector<TokenId>& prompt,
                              const NeedleSpec& spec, int question, const NeedleKey& key,
                              NeedleRun& run) {
    NeedleAnswer a{spec.context, question, key, "", "", 0, 0, {}};
    const std::size_t before = recovery.firings().size();
    SamplerOptions greedy;
    greedy.temperature = 0;
    Sampler sampler(greedy);
    GenerateOptions options;
    options.max_tokens = kPreface + spec.digits;
    options.prefill = o_.prefill_question ? -1 : 0;
    options.n_vocab = std::min(tokenizer_.vocab_size(), model_.config.vocab_size);
    options.is_end = [&](TokenId id) { return tokenizer_.is_eog(id); };
    options.check_logits = [&](std::span<const float> logits) { require_finite(logits, model_); };
    options.on_token = [&](TokenId id) {
      a.text += tokenizer_.decode(id);
      const std::string number = first_number(a.text);
      const bool ended = !number.empty() && !a.text.ends_with(number);
      return !ended && std::ssize(number) <= spec.digits;
    };
    options.interrupted = &interrupted_;
    options.recovery = &recovery;
    options.second_look = o_.recovery.second_look;
    options.verify = o_.recovery.verify;
    const Generation g = generate(transformer_, kv, sampler, prompt, options);
    if (g.finish == Finish::kInterrupted) return {};
    a.number = first_number(a.text);
    a.share = static_cast<double>(digits_right(a.number, key.digits)) / spec.digits;
    a.least_lead = g.least_lead;
    a.firings.assign(recovery.firings().begin() + before, recovery.firings().end());
    run.alarms += static_cast<int>(a.firings.size());
    run.checks += g.checks;
    run.answers.push_back(std::move(a));
    return g.tokens;
  }

  const Options& o_;
  const CommonOptions& common_;
  const Model& model_;
  const Tokenizer& tokenizer_;
  const std::atomic<bool>& interrupted_;
  Transformer transformer_;
  Progress progress_;
  std::string place_;
};

nlohmann::ordered_json to_json(const NeedleAnswer& a) {
  return {{"context_tokens", a.context},
          {"depth_percent", 100 * a.key.depth},
          {"question", a.question},
          {"owner", a.key.owner},
          {"key", a.key.digits},
          {"key_position_tokens", a.key.position},
          {"answer", a.number},
          {"text", a.text},
          {"right", a.right()},
          {"digits_right_share", a.share},
          {"least_lead_nats", a.least_lead},
          {"recovery", to_json(a.firings)}};
}

// `full` may be null.
nlohmann::ordered_json to_json(const NeedleRun& run, const NeedleRun* full) {
  const NeedleScore s = score(run);
  nlohmann::ordered_json json = {{"policy", run.policy},
                                 {"asked", run.answers.size()},
                                 {"right", s.right},
                                 {"digits_right_share", s.share},
                                 {"resident_pct", 100 * run.resident()},
                                 {"attended_pct", 100 * run.attended()},
                                 {"recalls_per_layer_step", run.recalls()},
                                 {"recovery_alarms", run.alarms},
                                 {"checks", run.checks},
                                 {"seconds", run.seconds}};
  if (full) {
    const NeedleAgreement agreed = agreement(run, *full);
    json["right_under_full"] = agreed.reference;
    json["right_of_those"] = agreed.both;
    json["answers_all_that_full_answers"] = agreed.both == agreed.reference;
  }
  for (const NeedleAnswer& answer : run.answers) json["answers"].push_back(to_json(answer));
  return json;
}

std::string document(const Options& o, const std::vector<NeedleRun>& runs) {
  nlohmann::ordered_json policies = nlohmann::ordered_json::array();
  for (const NeedleRun& run : runs) policies.push_back(to_json(run, find_full(runs)));
  return json_line({{"digits", o.digits},
                    {"needles", o.needles},
                    {"distractors", o.distractors},
                    {"filler", o.file ? "file" : o.filler.value_or("sentences")},
                    {"chat", o.chat},
                    {"prefill_tokens", o.prefill.value_or(kPrefill)},
                    {"prefill_all", o.prefill_all},
                    {"prefill_question", o.prefill_question},
                    {"seed", *o.seed},
                    {"kv_type", o.common.kv.type_name},
                    {"recovery", o.recovery.rung()},
                    {"policies", policies}});
}

std::string settings(const Options& o, const Model& model) {
  return join(printable(model.config.name), ", ", count(o.needles, "key"), " of ",
              count(o.digits, "digit"), " in a text, ", count(o.distractors, "distractor"),
              o.prefill_all ? ", text read exactly" : ", text decoded under the policy", ", seed ",
              *o.seed, ", kv ", o.common.kv.type_name);
}

}  // namespace

int run_needle(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const Tokenizer tokenizer = load_tokenizer(model);
  require(!o.chat || has_roles(recognise_chat_format(tokenizer)), *o.common.model,
          ": chat template: expected that of LLaMA 3, ChatML or Zephyr, whose answers have a role, "
          "found another; --chat is not for this model");
  o.common.context = o.contexts.back();
  context_tokens(o.common, model.config);
  std::vector<CommonOptions> variants;
  for (const KvFlags& kv : with_policies(o.common.kv, o.policies)) {
    variants.emplace_back(o.common).kv = kv;
    make_kv_store(*make_cpu_backend(model, 1), kv, model.config,
                  o.contexts.back());  // what does not fit fails now
  }

  std::optional<OutputFile> page;
  if (o.html) page.emplace(*o.html);

  const std::atomic<bool>& interrupted = catch_interrupt();
  std::vector<NeedleRun> runs;
  for (const CommonOptions& variant : variants) {
    runs.push_back(Reader(o, variant, model, tokenizer, interrupted).run());
    if (interrupted) {
      std::cerr << "interrupted after " << count(std::ssize(runs.back().answers), "answer")
                << " under " << variant.kv.policy << "\n";
      return kInterruptedExit;
    }
  }
  write_stdout_after(
      [&] {
        if (!page) return;
        page->write(needle_page(runs, settings(o, model)));
        page->finish();
      },
      o.common.json ? document(o, runs) : needle_text_report(runs, stdout_is_terminal()));
  if (!o.common.quiet) {
    for (const NeedleRun& run : runs)
      std::cerr << "took     " << fixed(run.seconds, 1) << " s under " << run.policy << "\n";
  }
  return 0;
}

}  // namespace thaw
