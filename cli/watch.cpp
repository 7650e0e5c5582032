#include "cli/watch.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iostream>
#include <utility>

#include "cli/format.h"
#include "cli/freeze_map_page.h"
#include "cli/heat.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/token_text.h"

namespace thaw {
namespace {

bool heat_is_shown() { return stderr_is_terminal() || std::getenv("CLICOLOR_FORCE") != nullptr; }

using Parameters = std::vector<std::pair<std::string, std::string>>;

// Those that the policy reads.
Parameters parameters_of(const KvStore& kv) {
  const KvOptions& o = kv.options();
  const PolicyParams& p = o.policy;
  Parameters all = {{"policy", kPolicyNames[static_cast<int>(p.policy)]}};
  const auto add = [&](const char* name, const auto& value) {
    all.emplace_back(name, join(value));
  };
  if (p.policy == Policy::kThaw) {
    add("epsilon", p.epsilon), add("caution", p.caution);
    add("stay", p.stay), add("ghosts", ghost_name(p)), add("freezes from", o.freeze_from);
    add("selected by", p.per_head ? "KV head" : "layer");
  }
  if (p.policy == Policy::kAsr) add("softness", p.softness), add("tau quantile", p.quantile);
  if (p.policy != Policy::kFull) add("window", p.window), add("sinks", p.sinks);
  if (o.hot_fraction > 0) add("hot fraction", o.hot_fraction);
  if (o.hot_tokens > 0) add("hot tokens", o.hot_tokens);
  if (o.hot_bytes > 0) add("hot bytes", format_bytes(o.hot_bytes));
  add("KV type", kv_type_name(kv.shape().type));
  return all;
}

std::string percent(double part, double whole) {
  return whole > 0 ? fixed(100 * part / whole, 1) + " %" : "–";
}

std::string recovery_note(const FreezeMap& map) {
  std::array<int, std::size(kRungNames)> times{};
  for (const FreezeMap::Recovery& r : map.recoveries()) ++times[static_cast<std::size_t>(r.rung)];
  std::string note;
  for (std::size_t i = 0; i < times.size(); ++i) {
    if (times[i] > 0) note += join(note.empty() ? "" : ", ", times[i], " ", kRungNames[i]);
  }
  return note.empty() ? "none fired" : note;
}

std::vector<PageHead::Figure> figures_of(const KvStore& kv, const FreezeMap& map, int prompt) {
  const KvUsage used = kv.usage();
  const KvCounters& c = kv.counters();
  const double layer_steps = static_cast<double>(c.steps) * kv.shape().n_layers;
  return {
      {"Resident KV", percent(static_cast<double>(used.resident), static_cast<double>(used.full)),
       format_bytes(used.resident) + " of " + format_bytes(used.full)},
      {"Recalled", layer_steps > 0 ? fixed(c.recalled / layer_steps, 2) : "–",
       "tokens a layer and step"},
      {"Attended", percent(c.attended, c.visible), "of the context, exactly"},
      {"Read from cold", percent(static_cast<double>(c.cold_bytes_read), c.cold_bytes_visible),
       "of the context's bytes, a step"},
      {"Decode steps", join(c.steps), "after a prompt of " + count(prompt, "token")},
      {"Recoveries", join(map.recoveries().size()), recovery_note(map)},
  };
}

}  // namespace

void add_watch_flags(Flags& flags, WatchOptions& o) {
  flags.output(
      o.report, "--report", "FILE.html",
      "write the freeze map: one page with the text, what the KV store did with each token "
      "at each step, and charts");
  flags.output(o.trace, "--trace", "FILE.json",
               "write a trace of phases, ops, freezes and thaws for Perfetto or chrome://tracing");
}

void add_heat_flag(Flags& flags, WatchOptions& o) {
  flags.toggle(o.heat, "--heat",
               "then print the text on standard error, coloured by how long each token was hot; "
               "only to a terminal, or when CLICOLOR_FORCE is set");
}

Watch::Watch(const WatchOptions& options, Transformer& transformer, KvStore& kv)
    : options_(options), transformer_(transformer), kv_(kv) {
  if (options.report) page_ = std::make_unique<OutputFile>(*options.report);
  if (options.trace) trace_ = std::make_unique<Trace>(*options.trace);
  const KvShape& shape = kv.shape();
  if (options.report || options.heat)
    map_ = std::make_unique<FreezeMap>(shape.n_layers, shape.n_kv_heads);
  if (map_ || trace_) kv.record(this);
  if (trace_) {
    transformer.observe([this](const ActivationView& result) {
      if (std::exchange(sampling_, false)) trace_->phase("sample");  // its token is held back
      trace_->op(result);
    });
    trace_->begin();
  }
}

Watch::~Watch() {
  if (map_ || trace_) kv_.record(nullptr);
  if (trace_) transformer_.observe({});
}

// Recovery fires after a step, before the store is told anything else.
void Watch::see_firings() {
  if (!recovery_) return;
  const std::vector<Recovery::Firing>& firings = recovery_->firings();
  firings_ = std::min(firings_, firings.size());  // of a new conversation
  for (; firings_ < firings.size(); ++firings_) {
    const Recovery::Firing& f = firings[firings_];
    if (map_) map_->recovery(store_steps_ - 1, f.rung, f.value);
    if (trace_) trace_->recovery(store_steps_ - 1, f.rung, f.value);
  }
}

void Watch::event(const KvEvent& event) {
  see_firings();
  if (map_) map_->event(event);
  if (trace_) trace_->event(event);
}

void Watch::step(const KvStep& step) {
  see_firings();
  if (map_) map_->step(step);
  if (trace_) trace_->step(step);
  ++store_steps_;
}

void Watch::ran(std::span<const float> logits) {
  see_firings();
  const bool decoded = std::exchange(told_steps_, store_steps_) != store_steps_;
  if (page_ && decoded && !logits.empty()) map_->output(store_steps_ - 1, softmax_entropy(logits));
  if (trace_) trace_->phase(decoded ? "decode" : "prefill");
}

void Watch::attach(GenerateOptions& options) {
  if (!map_ && !trace_) return;
  follow(options.recovery);
  options.on_prefill = [this, inner = options.on_prefill](int done, int total) {
    ran({});
    if (inner) inner(done, total);
  };
  options.on_logits = [this, inner = options.on_logits](std::span<const float> logits) {
    static_cast<void>(kv_.counters());  // tells of the step, if a device has not yet
    if (store_steps_ != told_steps_)
      ran(logits);
    else if (page_ && store_steps_ > 0)  // its tokens ran again
      map_->output(store_steps_ - 1, softmax_entropy(logits));
    if (inner) inner(logits);
    if (trace_) trace_->begin();
    sampling_ = true;
  };
  options.on_check = [this](bool done) {
    static_cast<void>(kv_.counters());
    if (store_steps_ != told_steps_) ran({});
    if (trace_ && done) trace_->phase("check");
  };
  options.on_token = [this, inner = options.on_token](TokenId token) {
    if (trace_ && std::exchange(sampling_, false)) trace_->phase("sample");
    const bool go_on = !inner || inner(token);
    if (trace_) trace_->begin();
    return go_on;
  };
}

void Watch::finish(const Tokenizer& tokenizer, std::span<const TokenId> tokens, int prompt_tokens) {
  see_firings();
  if (trace_) trace_->finish();
  if (!map_) return;
  const std::vector<std::string> texts = token_texts(tokenizer, tokens);
  if (page_) {
    write_page(*page_,
               {describe(transformer_.config()), parameters_of(kv_),
                figures_of(kv_, *map_, prompt_tokens), prompt_tokens},
               *map_, texts);
    page_->finish();
  }
  if (!options_.heat || !heat_is_shown()) return;
  std::vector<double> hot(texts.size(), 1.0);
  const std::vector<FreezeMap::Token> seen = map_->tokens();
  for (std::size_t i = 0; i < std::min(hot.size(), seen.size()); ++i) {
    hot[i] = map_->hot_share(seen[i]);
  }
  std::cerr << heat_text(texts, hot);
}

}  // namespace thaw
