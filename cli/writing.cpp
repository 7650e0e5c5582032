#include "cli/writing.h"

#include <algorithm>
#include <string>

#include "cli/format.h"
#include "cli/options.h"
#include "device/error.h"

namespace thaw {

void add_sampling_flags(Flags& flags, SamplerOptions& s, std::optional<std::uint64_t>& seed) {
  const auto small = [](double x) { return x >= -1000 && x <= 1000; };
  const auto share = [](double x) { return x >= 0 && x <= 1; };
  flags.section("Sampling, in this order");
  flags.real(s.repeat_penalty, "--repeat-penalty",
             "seen tokens: divide logits above 0 by X, multiply "
             "those below; 1: off",
             "a number from 0.01 to 100", [](double x) { return x >= 0.01f && x <= 100; });
  flags.real(s.presence_penalty, "--presence-penalty", "subtract X from the logit of a seen token",
             "a number from -1000 to 1000", small);
  flags.real(s.frequency_penalty, "--frequency-penalty", "subtract X for each time it was seen",
             "a number from -1000 to 1000", small);
  flags.integer(s.penalty_window, "--penalty-window", "seen: among the last N tokens; -1: all", -1,
                1 << 24);
  flags.real(s.temperature, "--temp",
             "divide logits by X; 0: always the most probable token, and "
             "what follows does not matter",
             "a number >= 0", [](double x) { return x >= 0; });
  flags.integer(s.top_k, "--top-k", "keep the N most probable tokens; 0: all", 0, 1 << 24);
  flags.real(s.top_p, "--top-p",
             "keep the most probable tokens that together reach probability X; "
             "1: all",
             "a number above 0, at most 1", [](double x) { return x > 0 && x <= 1; });
  flags.real(s.min_p, "--min-p",
             "keep tokens at least X times as probable as the most probable one; "
             "0: all",
             "a number from 0 to 1", share);
  flags.seed(seed, "--seed",
             "draw the same tokens again; by default a random seed, which is printed");
}

GenerateOptions writing_options(const Model& model, const Tokenizer& tokenizer,
                                const RecoveryFlags& flags, Recovery& recovery, Progress& progress,
                                const std::atomic<bool>& interrupted) {
  GenerateOptions options;
  options.n_vocab = std::min(tokenizer.vocab_size(), model.config.vocab_size);
  options.interrupted = &interrupted;
  options.recovery = &recovery;
  options.second_look = flags.second_look;
  options.verify = flags.verify;
  options.is_end = [&](TokenId id) { return tokenizer.is_eog(id); };
  options.check_logits = [&](std::span<const float> logits) { require_finite(logits, model); };
  options.on_prefill = [&](int done, int total) {
    if (done < total)
      progress.show(join("reading the prompt: ", done, " of ", total, " tokens"));
    else
      progress.clear();
  };
  return options;
}

std::string describe_kv(const KvFlags& flags, const KvUsage& u, const KvCounters& counters,
                        int n_layers) {
  std::string text = join(format_bytes(u.full), " as ", flags.type_name);
  if (flags.policy == "full") return text;
  if (u.awake_until > 0)
    return text += join(", all exact: freezing begins at ", u.awake_until, " tokens");
  text += join("; ", flags.policy, " holds ", format_bytes(u.resident), ": hot ",
               format_bytes(u.hot), ", ghosts ", format_bytes(u.ghosts));
  const double steps = static_cast<double>(counters.steps) * n_layers;
  if (steps > 0)
    text += join("; ", fixed(counters.recalled / steps, 1), " recalls a layer and step");
  return text;
}

}  // namespace thaw
