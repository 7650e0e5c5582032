// thaw bench --op: each op of a decode step alone, from cold caches.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/bench.h"
#include "cli/format.h"
#include "cli/statistics.h"
#include "cli/table.h"
#include "model/backend_timed.h"
#include "model/forward.h"

namespace thaw {
namespace {

struct OpResult {
  std::string op, policy;
  int depth;
  std::vector<double> seconds;  // a call each
  double bytes;                 // that a call reads or writes, on average; 0: not counted

  double gb_s() const { return bytes / mean_of(seconds).mean / 1e9; }
};

// Of a call, weights, on average of the layers, and rows of the cache; activations are too small to
// matter.
double bytes_of(const std::string& op, const Model& model, double kv_read, const KvShape& shape) {
  const auto bytes = [&](auto... matrices) {
    std::int64_t total = 0;
    for (const LayerWeights& w : model.weights.layers) total += ((w.*matrices).bytes() + ...);
    return static_cast<double>(total) / model.config.n_layers;
  };
  using W = LayerWeights;
  if (op == "embed")
    return static_cast<double>(row_bytes(model.weights.embedding.type, model.config.dim));
  if (op == "qkv") return bytes(&W::wq, &W::wk, &W::wv);
  if (op == "append") return static_cast<double>(shape.bytes_per_token()) / shape.n_layers;
  if (op == "attend") return kv_read / shape.n_layers;
  if (op == "project_add") return bytes(&W::wo, &W::w_down) / 2;  // it is called for both
  if (op == "gate_up") return bytes(&W::w_gate, &W::w_up);
  if (op == "logits") return static_cast<double>(model.weights.output.bytes());
  return 0;
}

class OpBench {
 public:
  OpBench(const BenchOptions& o, const Model& model)
      : o_(o),
        model_(model),
        transformer_(model, std::make_unique<TimedBackend>(
                                make_backend(o.common, model), o.ops, times_)),
        n_tokens_(*std::max_element(o.depths.begin(), o.depths.end()) + 1 + o.decoded()),
        tokens_(bench_tokens(o, model, bench_capacity(o, model.config, n_tokens_))) {}

  Backend& backend() { return transformer_.backend(); }

  std::vector<OpResult> run() {
    std::vector<OpResult> results;
    for (const int depth : o_.depths)
      for (const std::string& policy : o_.policies) time(results, depth, policy);
    return results;
  }

 private:
  void time(std::vector<OpResult>& results, int depth, const std::string& policy) {
    KvFlags flags = o_.common.kv;
    flags.policy = policy;
    const auto kv = make_kv_store(transformer_.backend(), flags, model_.config, n_tokens_);
    const auto tokens = std::span<const std::int32_t>(tokens_);
    if (depth > 0) transformer_.prefill(tokens.first(static_cast<std::size_t>(depth)), *kv);
    const auto step = [&](int i) {
      transformer_.forward(tokens.subspan(static_cast<std::size_t>(depth + i), 1), *kv, 1,
                           Phase::kDecode);
    };
    step(0);  // not counted: it takes memory
    times_.clear();
    const KvCounters before = kv->counters();
    for (int i = 1; i <= o_.decoded(); ++i) step(i);
    const double read = kv_bytes(*kv, before, kv->counters()) / o_.decoded();
    for (const std::string& op : o_.ops)
      results.push_back(
          {op, policy, depth, times_[op], bytes_of(op, model_, read, kv->shape())});
  }

  const BenchOptions& o_;
  const Model& model_;
  OpTimes times_;
  Transformer transformer_;
  int n_tokens_;
  std::vector<std::int32_t> tokens_;
};

std::string to_json(const BenchOptions& o, const Model& model, const std::string& backend,
                    double peak, const std::vector<OpResult>& results) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const OpResult& r : results) {
    nlohmann::ordered_json row = {{"op", r.op},
                                  {"policy", r.policy},
                                  {"depth", r.depth},
                                  {"calls", r.seconds.size()},
                                  {"mean_us", 1e6 * mean_of(r.seconds).mean},
                                  {"median_us", 1e6 * quantile(r.seconds, 0.5)},
                                  {"gb_s", nullptr},
                                  {"pct_peak", nullptr},
                                  {"threads", o.common.threads},
                                  {"backend", backend}};
    if (r.bytes > 0) row["gb_s"] = r.gb_s(), row["pct_peak"] = 100 * r.gb_s() / peak;
    list.push_back(row);
  }
  return json_line({{"model", model.path.string()}, {"peak_gb_s", peak}, {"ops", list}});
}

std::string to_text(const std::string& backend, double peak, const std::vector<OpResult>& results) {
  std::vector<TableRow> rows;
  for (const OpResult& r : results) {
    rows.push_back({r.op, r.policy, join(r.depth), join(r.seconds.size()),
                    fixed(1e6 * mean_of(r.seconds).mean, 1),
                    fixed(1e6 * quantile(r.seconds, 0.5), 1),
                    r.bytes > 0 ? fixed(r.gb_s(), 2) : "-",
                    r.bytes > 0 ? fixed(100 * r.gb_s() / peak, 1) : "-"});
  }
  return join("backend ", backend, ", memory ", fixed(peak, 1), " GB/s\n\n",
              markdown_table({"op", "policy", "depth", "calls", "mean us", "median us", "GB/s",
                              "% of peak"},
                             rows, 2));
}

}  // namespace

std::string time_ops(const BenchOptions& o, const Model& model) {
  OpBench bench(o, model);
  const double peak = bench.backend().measure_bandwidth();
  const std::string backend = bench.backend().name();
  const std::vector<OpResult> results = bench.run();
  return o.common.json ? to_json(o, model, backend, peak, results)
                       : to_text(backend, peak, results);
}

}  // namespace thaw
