// thaw bench: how fast prompts are read and tokens written, beside what the memory gives.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <iostream>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "device/bandwidth.h"
#include "model/forward.h"

namespace thaw {
namespace {

struct Options {
  CommonOptions common;
  int prompt = 512;
  int decode = 128;
  int depth = 0;
  int repetitions = 5;
};

bool parse(const Args& args, Options& o) {
  Flags flags(
      "bench", "-m MODEL [flags]",
      "Times a prompt and a decode on arbitrary tokens, after one run that is not counted, and "
      "prints tokens a second: mean and standard deviation of the repetitions. GB/s counts "
      "the weights and the cache that a decoded token reads; peak is the read bandwidth "
      "measured just before with the same threads.");
  flags.section("What is timed");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  flags.integer(o.prompt, "-p, --prompt", "tokens of the prompt; 0 leaves it out", 0, 1 << 24);
  flags.integer(o.decode, "-n, --tokens", "tokens decoded one by one; 0 leaves it out", 0, 1 << 24);
  flags.integer(o.depth, "-d, --depth", "tokens already in the cache before each", 0, 1 << 24);
  flags.integer(o.repetitions, "-r, --repetitions", "times that each is run", 1, 1000);
  flags.section("How it is computed");
  add_kv_flags(flags, o.common, "tokens in the cache, at most; by default what the tests need");
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.examples(
      "  thaw bench -m model.gguf\n  thaw bench -m model.gguf -p 0 -n 64 -d 4096 --json\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  return true;
}

struct Result {
  std::string test;
  double tok_s = 0, sd = 0;
  double gb_s = 0;  // 0: not bound by memory
};

// Bytes of every matrix that one token's forward pass reads.
std::int64_t weight_bytes(const Weights& weights) {
  std::int64_t total = weights.output.bytes();
  for (const LayerWeights& w : weights.layers) {
    for (const Tensor* t : {&w.wq, &w.wk, &w.wv, &w.wo, &w.w_gate, &w.w_up, &w.w_down})
      total += t->bytes();
  }
  return total;
}

class Bench {
 public:
  Bench(const Options& o, const Model& model)
      : o_(o),
        model_(model),
        transformer_(model, o.common.threads),
        kv_(make_kv_store(o.common.kv, model.config, capacity(o, model.config))) {
    for (int i = 0; i < kv_->shape().capacity; ++i) {
      tokens_.push_back(
          static_cast<std::int32_t>(std::int64_t{i} * 7919 % model.config.vocab_size));
    }
  }

  ThreadPool& pool() { return transformer_.pool(); }

  std::vector<Result> run() {
    std::vector<Result> results;
    if (o_.prompt > 0) {
      results.push_back(
          time("pp", o_.prompt, [&] { transformer_.prefill(after_depth(o_.prompt), *kv_); }));
    }
    if (o_.decode > 0) {
      results.push_back(time("tg", o_.decode, [&] {
        for (const std::int32_t& token : after_depth(o_.decode))
          transformer_.forward({&token, 1}, *kv_, 1, Phase::kDecode);
      }));
      const double kv_bytes =
          static_cast<double>(kv_->shape().bytes_per_token()) * (o_.depth + o_.decode / 2.0);
      results.back().gb_s = (static_cast<double>(weight_bytes(model_.weights)) + kv_bytes) *
                            results.back().tok_s / 1e9;
    }
    return results;
  }

 private:
  static int capacity(const Options& o, const Config& config) {
    const int needed = o.depth + std::max({o.prompt, o.decode, 1});
    const int capacity = o.common.context ? context_tokens(o.common, config) : needed;
    if (needed > capacity)
      throw UsageError(join("--context: expected at least ", needed, ", found ", capacity));
    return capacity;
  }

  std::span<const std::int32_t> after_depth(int n) const {
    return std::span(tokens_).subspan(static_cast<std::size_t>(o_.depth),
                                      static_cast<std::size_t>(n));
  }

  template <class Work>
  Result time(const std::string& name, int n_tokens, const Work& work) {
    kv_->clear();
    if (o_.depth > 0)
      transformer_.prefill(std::span(tokens_).first(static_cast<std::size_t>(o_.depth)), *kv_);
    std::vector<double> rates;
    for (int i = 0; i <= o_.repetitions; ++i) {
      kv_->rewind(o_.depth);
      const auto start = std::chrono::steady_clock::now();
      work();
      const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
      if (i > 0) rates.push_back(n_tokens / elapsed.count());
    }
    Result r{join(name, n_tokens, o_.depth > 0 ? join("@d", o_.depth) : ""), 0, 0, 0};
    const double n = static_cast<double>(rates.size());
    for (double rate : rates) r.tok_s += rate / n;
    for (double rate : rates) r.sd += (rate - r.tok_s) * (rate - r.tok_s);
    r.sd = n > 1 ? std::sqrt(r.sd / (n - 1)) : 0;
    return r;
  }

  const Options& o_;
  const Model& model_;
  Transformer transformer_;
  std::unique_ptr<KvStore> kv_;
  std::vector<std::int32_t> tokens_;
};

std::string report(const Options& o, const std::vector<Result>& results, double peak) {
  if (o.common.json) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const Result& r : results) {
      const bool bound = r.gb_s > 0;
      list.push_back({{"test", r.test},
                      {"tok_s", r.tok_s},
                      {"sd", r.sd},
                      {"gb_s", bound ? nlohmann::ordered_json(r.gb_s) : nlohmann::ordered_json()},
                      {"pct_peak", bound ? nlohmann::ordered_json(100 * r.gb_s / peak)
                                         : nlohmann::ordered_json()},
                      {"policy", o.common.kv.policy},
                      {"threads", o.common.threads},
                      {"backend", "cpu"}});
    }
    return json_line({{"model", *o.common.model}, {"read_gb_s", peak}, {"results", list}});
  }
  std::string out =
      join("read bandwidth ", fixed(peak, 1), " GB/s, ", o.common.threads, " threads\n\n",
           "| test | tok/s | sd | GB/s | % of peak |\n|---|---:|---:|---:|---:|\n");
  for (const Result& r : results) {
    out += join("| ", r.test, " | ", fixed(r.tok_s, 2), " | ", fixed(r.sd, 2), " | ",
                r.gb_s > 0 ? fixed(r.gb_s, 2) : "-", " | ",
                r.gb_s > 0 ? fixed(100 * r.gb_s / peak, 1) : "-", " |\n");
  }
  return out;
}

}  // namespace

int run_bench(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  Bench bench(o, model);
  const double peak = measure_read_bandwidth(bench.pool());
  write_stdout(report(o, bench.run(), peak));
  return 0;
}

}  // namespace thaw
