// thaw bench: how fast prompts are read and tokens written, beside what the memory gives.
#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "cli/bench.h"
#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/options.h"
#include "cli/statistics.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "kvstore/tiers.h"
#include "model/backend_timed.h"
#include "model/forward.h"
#include "model/random_model.h"

namespace thaw {
namespace {

using Options = BenchOptions;

// Names of weight formats as they are typed, in the order of DType.
std::vector<std::string> typed_formats() {
  std::vector<std::string> names;
  for (const DTypeInfo& info : kDTypes) {
    std::string& name = names.emplace_back(info.name);
    for (char& c : name) c = static_cast<char>(std::tolower(c));
  }
  return names;
}

bool parse(const Args& args, Options& o) {
  Flags flags(
      "bench", "-m MODEL [flags]",
      "Times a prompt and a decode, after one run that is not counted, and prints tokens a second: "
      "mean, standard deviation and median of the repetitions. GB/s counts what a decoded token "
      "reads: the weights, and hot tokens, ghosts and recalls of the cache (of ghosts also the "
      "values of faint ones, which are not read); peak is the read bandwidth measured just before "
      "with the same threads. Policies take turns, repetition by repetition; what a policy reads "
      "depends on the text, so give it one with -f. With --op, ops of decode steps are timed "
      "instead, each call alone and from cold caches.");
  flags.section("What is timed");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  std::vector<std::string> shapes;
  for (const ModelShape& shape : model_shapes()) shapes.push_back(shape.name);
  flags.text(o.random, "--random", "SHAPE",
             "instead of a model: seeded random weights in the shape of one, tiny, 135m (SmolLM2), "
             "1b or 8b (LLaMA 3)",
             [shapes](const std::string& s) {
               return std::find(shapes.begin(), shapes.end(), s) != shapes.end();
             },
             "tiny, 135m, 1b or 8b");
  flags.choice(o.weights, "--weights", typed_formats(),
               "format of the random weights (default q4_0); rows that are no whole blocks of a "
               "K-quant are q8_0");
  flags.path(o.file, "-f, --file", "FILE", "a text to take the tokens from; else arbitrary ones");
  flags.integers(o.prompts, "-p, --prompt", "tokens of the prompt; a list; 0 leaves it out", 0,
                 1 << 24);
  flags.integer(o.decode, "-n, --tokens",
                "tokens decoded one by one; 0 leaves it out (default 128; with --op 8)", 0,
                1 << 24);
  flags.integers(o.depths, "-d, --depth", "tokens already in the cache before each; a list", 0,
                 1 << 24);
  flags.integer(o.repetitions, "-r, --repetitions", "times that each is run", 1, 1000);
  flags.choices(o.ops, "--op", kTimedOps,
                "time these ops of each decoded token instead, without -p and -r; GB/s counts "
                "weights and cached tokens");
  add_kv_flags(flags, o.common, "tokens in the cache, at most; by default what the tests need",
               &o.policies);
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.examples(
      "  thaw bench -m model.gguf\n  thaw bench -m model.gguf -p 0 -n 64 -d 4096 --json\n"
      "  thaw bench -m model.gguf -p 0 -d 1024,4096,7680 --policy full,thaw -f book.txt\n");
  if (!flags.parse(args)) return false;
  if (o.random) {
    if (o.common.model) throw UsageError("expected -m or --random, found both");
    if (o.file) throw UsageError("-f: expected a model that has a tokenizer, found --random");
    o.common.model = *o.random;
  }
  if (o.weights && !o.random) throw UsageError("--weights needs --random");
  check_common(o.common);
  check_kv(with_policies(o.common.kv, o.policies));
  const bool has_prompt =
      std::any_of(o.prompts.begin(), o.prompts.end(), [](int n) { return n > 0; });
  if (o.ops.empty() && o.decoded() == 0 && !has_prompt)
    throw UsageError("expected something to time, found -p 0 and -n 0");
  if (!o.ops.empty() && o.decoded() == 0)
    throw UsageError("--op: expected at least one decoded token, found -n 0");
  return true;
}

struct Result {
  std::string test, policy;
  std::vector<double> rates;  // tokens a second, a repetition each
  double bytes = 0;           // that a token reads; 0: not bound by memory

  double gb_s() const { return bytes * mean_of(rates).mean / 1e9; }
};

// Bytes of every matrix that one token's forward pass reads.
double weight_bytes(const Weights& weights) {
  auto total = static_cast<double>(weights.output.bytes());
  for (const LayerWeights& w : weights.layers) total += thaw::weight_bytes(w);
  return total;
}

class Bench {
 public:
  Bench(const Options& o, const Model& model)
      : o_(o), model_(model), transformer_(model, make_backend(o.common, model)) {
    const int n_tokens = bench_capacity(o, model.config,
                                        *std::max_element(o.depths.begin(), o.depths.end()) +
                                            std::max({*std::max_element(o.prompts.begin(),
                                                                        o.prompts.end()),
                                                      o.decoded(), 1}));
    for (const KvFlags& flags : with_policies(o.common.kv, o.policies))
      stores_.push_back(make_kv_store(transformer_.backend(), flags, model.config, n_tokens));
    tokens_ = bench_tokens(o, model, n_tokens);
  }

  std::string backend() { return transformer_.backend().name(); }
  double peak() { return transformer_.backend().measure_bandwidth(); }  // GB/s

  std::vector<Result> run() {
    std::vector<Result> results;
    for (const int depth : o_.depths) {
      for (const int prompt : o_.prompts) {
        if (prompt == 0) continue;
        time(results, "pp", prompt, depth, [&](std::span<const TokenId> tokens, KvStore& kv) {
          transformer_.prefill(tokens, kv);
        });
      }
      if (o_.decoded() > 0) {
        time(results, "tg", o_.decoded(), depth, [&](std::span<const TokenId> tokens, KvStore& kv) {
          for (const TokenId& token : tokens)
            transformer_.forward({&token, 1}, kv, 1, Phase::kDecode);
        });
      }
    }
    return results;
  }

 private:
  // Adds a result for each policy.
  template <class Work>
  void time(std::vector<Result>& results, const std::string& name, int n_tokens, int depth,
            const Work& work) {
    const auto n_before = static_cast<std::size_t>(depth);
    const std::span<const TokenId> before = std::span(tokens_).first(n_before);
    const std::span<const TokenId> timed =
        std::span(tokens_).subspan(n_before, static_cast<std::size_t>(n_tokens));
    std::vector<KvCounters> warm;
    const std::size_t first = results.size();
    for (std::size_t p = 0; p < stores_.size(); ++p) {
      stores_[p]->clear();
      if (depth > 0) transformer_.prefill(before, *stores_[p]);
      work(timed, *stores_[p]);
      warm.push_back(stores_[p]->counters());
      results.push_back({join(name, n_tokens, depth > 0 ? join("@d", depth) : ""), o_.policies[p],
                         {}, 0});
    }
    for (int i = 0; i < o_.repetitions; ++i) {
      for (std::size_t p = 0; p < stores_.size(); ++p) {
        stores_[p]->rewind(depth);
        const auto start = std::chrono::steady_clock::now();
        work(timed, *stores_[p]);
        const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
        results[first + p].rates.push_back(n_tokens / elapsed.count());
      }
    }
    for (std::size_t p = 0; p < stores_.size(); ++p) {
      const KvCounters& counters = stores_[p]->counters();
      const auto steps = static_cast<double>(counters.steps - warm[p].steps);
      if (steps == 0) continue;  // a prompt
      results[first + p].bytes = weight_bytes(model_.weights) +
                                 kv_bytes(*stores_[p], warm[p], counters) / steps;
    }
  }

  const Options& o_;
  const Model& model_;
  Transformer transformer_;
  std::vector<std::unique_ptr<KvStore>> stores_;  // one a policy
  std::vector<TokenId> tokens_;
};

std::string to_json(const Options& o, const std::vector<Result>& results,
                    const std::string& backend, double peak) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const Result& r : results) {
    const Mean rate = mean_of(r.rates);
    nlohmann::ordered_json row = {{"test", r.test},       {"tok_s", rate.mean}, {"sd", rate.sd},
                                  {"gb_s", nullptr},      {"pct_peak", nullptr},
                                  {"policy", r.policy},   {"threads", o.common.threads},
                                  {"backend", backend}};
    if (r.bytes > 0) row["gb_s"] = r.gb_s();
    if (r.bytes > 0) row["pct_peak"] = 100 * r.gb_s() / peak;
    list.push_back(row);
  }
  return json_line({{"model", *o.common.model}, {"read_gb_s", peak}, {"results", list}});
}

// Repetition by repetition, in the middle of their ratios.
double median_ratio(const Result& r, const Result& base) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < r.rates.size(); ++i) ratios.push_back(r.rates[i] / base.rates[i]);
  return quantile(ratios, 0.5);
}

std::string to_text(const Options& o, const std::vector<Result>& results,
                    const std::string& backend, double peak) {
  const std::size_t n = o.policies.size();
  TableRow header = {"test", "policy", "tok/s", "sd", "median", "GB/s", "% of peak"};
  if (n > 1) header.push_back("/ " + o.policies.front());
  std::vector<TableRow> rows;
  for (std::size_t i = 0; i < results.size(); ++i) {
    const Result& r = results[i];
    const Mean rate = mean_of(r.rates);
    rows.push_back({r.test, r.policy, fixed(rate.mean, 2), fixed(rate.sd, 2),
                    fixed(quantile(r.rates, 0.5), 2), r.bytes > 0 ? fixed(r.gb_s(), 2) : "-",
                    r.bytes > 0 ? fixed(100 * r.gb_s() / peak, 1) : "-"});
    if (n > 1) rows.back().push_back(fixed(median_ratio(r, results[i / n * n]), 2));
  }
  const std::string machine =
      join("backend ", backend, ", memory ", fixed(peak, 1), " GB/s",
           backend == "cpu" ? join(", ", o.common.threads, " threads") : "");
  return join(machine, "\n\n", markdown_table(header, rows, 2));
}

Model random_model(const Options& o) {
  ThreadPool pool(o.common.threads);
  const std::string format = o.weights.value_or("q4_0");
  const std::vector<std::string> formats = typed_formats();
  const auto type = std::find(formats.begin(), formats.end(), format) - formats.begin();
  return make_random_model(*o.random, static_cast<DType>(type), 1, pool);
}

}  // namespace

std::vector<std::int32_t> bench_tokens(const BenchOptions& o, const Model& model, int n) {
  std::vector<std::int32_t> tokens;
  if (!o.file) {
    for (int i = 0; i < n; ++i)
      tokens.push_back(static_cast<std::int32_t>(std::int64_t{i} * 7919 % model.config.vocab_size));
    return tokens;
  }
  const Input input = read_file(*o.file);
  tokens = encode_input(load_tokenizer(model), input, {});
  require(tokens.size() >= static_cast<std::size_t>(n), input.source, ": expected at least ",
          count(n, "token"), ", which the tests need, found ", tokens.size());
  return tokens;
}

int bench_capacity(const BenchOptions& o, const Config& config, int needed) {
  const int capacity = o.common.context ? context_tokens(o.common, config) : needed;
  if (needed > capacity)
    throw UsageError(join("--context: expected at least ", needed, ", found ", capacity));
  return needed;
}

double weight_bytes(const LayerWeights& w) {
  std::int64_t total = 0;
  for (const Tensor* t : {&w.wq, &w.wk, &w.wv, &w.wo, &w.w_gate, &w.w_up, &w.w_down})
    total += t->bytes();
  return static_cast<double>(total);
}

double kv_bytes(const KvStore& kv, const KvCounters& before, const KvCounters& after) {
  const double attended = after.attended - before.attended;
  const double visible = after.visible - before.visible;
  const double asked = visible - attended + after.recalled - before.recalled;
  const auto steps = static_cast<double>(after.steps - before.steps);
  // Ghosts stand in pages of which the last is partly filled.
  const double pages = std::ceil(kv.length() / double{kTierTokens});
  const double filled = std::ceil(kv.length() / double{kGhostGroup}) * kGhostGroup /
                        std::max(1.0, pages * kTierTokens);
  return attended * static_cast<double>(kv.shape().bytes_per_token()) / kv.shape().n_layers +
         asked / visible * steps * static_cast<double>(kv.usage().ghosts) * filled;
}

int run_bench(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = o.random ? random_model(o) : load_model(*o.common.model);
  if (!o.ops.empty()) {
    write_stdout(time_ops(o, model));
    return 0;
  }
  Bench bench(o, model);
  const double peak = bench.peak();
  const std::vector<Result> results = bench.run();
  write_stdout(o.common.json ? to_json(o, results, bench.backend(), peak)
                             : to_text(o, results, bench.backend(), peak));
  return 0;
}

}  // namespace thaw
