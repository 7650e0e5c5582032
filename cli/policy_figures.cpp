#include "cli/policy_figures.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace thaw {
namespace {

double ratio(double part, double whole) { return whole > 0 ? part / whole : 0; }

std::string percent(double share, int digits = 1) { return fixed(100 * share, digits); }

std::string with_error(const Mean& m, int digits) {
  return join(fixed(m.mean, digits), " \u00b1 ", fixed(m.se, digits));
}

std::string bytes(double n) { return format_bytes(static_cast<std::int64_t>(n)); }

}  // namespace

PolicyFigures figures_of(const Comparison& comparison, std::size_t policy,
                         const CommonOptions& options, int n_layers) {
  const PolicyScore& score = comparison.policies[policy];
  PolicyFigures f;
  f.policy = options.kv.policy;
  f.kv_type = options.kv.type_name;
  f.tokens = static_cast<int>(score.nll.size());
  f.windows = comparison.windows;
  f.nll = mean_of(score.nll);
  f.has_full = !comparison.nll_full.empty();
  if (f.has_full) {
    std::vector<double> differences = score.nll;
    for (std::size_t i = 0; i < differences.size(); ++i) differences[i] -= comparison.nll_full[i];
    f.nll_full = mean_of(comparison.nll_full);
    f.log_ratio = mean_of(differences);
    f.kl = mean_of(score.kl);
    f.kl_p99 = quantile(score.kl, 0.99);
    f.same_top = ratio(score.same_top, f.tokens);
  }
  const auto steps = static_cast<double>(score.counters.steps);
  f.attended = ratio(score.counters.attended, score.counters.visible);
  f.recalls = ratio(score.counters.recalled, steps * n_layers);
  f.thaws = ratio(score.counters.thawed, steps * n_layers);
  const auto cold_read = static_cast<double>(score.counters.cold_bytes_read);
  f.cold_bytes = ratio(cold_read, steps);
  f.cold_share = ratio(cold_read, score.counters.cold_bytes_visible);
  const double windows = std::max(1, comparison.windows);
  f.resident_bytes = static_cast<double>(score.usage.resident) / windows;
  f.hot_bytes = static_cast<double>(score.usage.hot) / windows;
  f.ghost_bytes = static_cast<double>(score.usage.ghosts) / windows;
  f.f16_bytes = static_cast<double>(score.f16_bytes) / windows;
  f.resident = ratio(f.resident_bytes, f.f16_bytes);
  const auto mean = static_cast<float>(ratio(1, steps));
  for (const KvStep::Layer& sum : score.layers) {
    f.layers.push_back({sum.entropy * mean, sum.ghost_mass * mean, sum.threshold * mean,
                        sum.hot * mean, sum.budget * mean, sum.recalled * mean, sum.thawed * mean,
                        sum.frozen * mean});
  }
  return f;
}

nlohmann::ordered_json to_json(const PolicyFigures& f) {
  const Mean perplexity = exp_of(f.nll);
  nlohmann::ordered_json j = {{"policy", f.policy},
                              {"kv_type", f.kv_type},
                              {"perplexity", perplexity.mean},
                              {"perplexity_se", perplexity.se},
                              {"nll_nats", f.nll.mean},
                              {"nll_se_nats", f.nll.se}};
  if (f.has_full) {
    const Mean full = exp_of(f.nll_full), times = exp_of(f.log_ratio);
    j.update({{"full_perplexity", full.mean},
              {"full_perplexity_se", full.se},
              {"full_nll_nats", f.nll_full.mean},
              {"full_nll_se_nats", f.nll_full.se},
              {"ratio", times.mean},
              {"ratio_se", times.se},
              {"kl_mean_nats", f.kl.mean},
              {"kl_se_nats", f.kl.se},
              {"kl_p99_nats", f.kl_p99},
              {"top1_agreement_pct", 100 * f.same_top}});
  }
  j.update({{"attended_pct", 100 * f.attended},
            {"resident_pct", 100 * f.resident},
            {"resident_bytes", f.resident_bytes},
            {"hot_bytes", f.hot_bytes},
            {"ghost_bytes", f.ghost_bytes},
            {"f16_bytes", f.f16_bytes},
            {"recalls_per_layer_step", f.recalls},
            {"thaws_per_layer_step", f.thaws},
            {"cold_bytes_per_step", f.cold_bytes},
            {"cold_read_pct", 100 * f.cold_share},
            {"tokens", f.tokens},
            {"windows", f.windows}});
  return j;
}

nlohmann::ordered_json layers_json(const PolicyFigures& f) {
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const KvStep::Layer& layer : f.layers) {
    list.push_back({{"entropy_nats", layer.entropy},
                    {"ghost_mass_pct", 100 * layer.ghost_mass},
                    {"hot_tokens", layer.hot},
                    {"budget_tokens", layer.budget},
                    {"recalled_tokens_per_step", layer.recalled},
                    {"thawed_tokens_per_step", layer.thawed}});
  }
  return list;
}

std::string to_text(const PolicyFigures& f) {
  std::string out = join("perplexity  ", with_error(exp_of(f.nll), 4), "\nNLL         ",
                         with_error(f.nll, 5), " nats a token\n");
  if (f.has_full) {
    out += join("with full   ", with_error(exp_of(f.nll_full), 4), "\nratio       ",
                with_error(exp_of(f.log_ratio), 4), "\nKL          ", with_error(f.kl, 5),
                " nats a token, 99 % are below ", fixed(f.kl_p99, 5), "\ntop-1       ",
                percent(f.same_top), " % as with full\n");
  }
  return out + join("attended    ", percent(f.attended), " % of the tokens\nresident    ",
                    percent(f.resident), " % of f16: ", bytes(f.resident_bytes), ", hot ",
                    bytes(f.hot_bytes), ", ghosts ", bytes(f.ghost_bytes), "\nrecalls     ",
                    fixed(f.recalls, 2), " a layer and step, thaws ", fixed(f.thaws, 2),
                    "\ncold reads  ", bytes(f.cold_bytes), " a step, ", percent(f.cold_share, 2),
                    " % of the cold bytes\n");
}

TableRow figures_header() {
  return {"resident %", "attended %", "perplexity", "ratio", "KL, nats", "KL 99 %", "top-1 %",
          "recalls", "thaws", "cold %"};
}

TableRow figures_row(const PolicyFigures& f) {
  const auto known = [&](const std::string& text) { return f.has_full ? text : "-"; };
  return {percent(f.resident, 2),
          percent(f.attended),
          fixed(exp_of(f.nll).mean, 4),
          known(with_error(exp_of(f.log_ratio), 4)),
          known(with_error(f.kl, 5)),
          known(fixed(f.kl_p99, 4)),
          known(percent(f.same_top)),
          fixed(f.recalls, 2),
          fixed(f.thaws, 2),
          percent(f.cold_share, 2)};
}

}  // namespace thaw
