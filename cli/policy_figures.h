// What a comparison of KV policies (cli/compare.h) amounts to.
#pragma once

#include <string>

#include "cli/compare.h"
#include "cli/format.h"
#include "cli/options.h"
#include "cli/statistics.h"
#include "cli/table.h"

namespace thaw {

struct PolicyFigures {
  std::string policy, kv_type;
  int tokens = 0, windows = 0;
  bool has_full = false;  // the next five are known
  Mean nll_full;
  Mean log_ratio;       // of nll - nll_full, token by token
  Mean kl;              // nats
  double kl_p99 = 0;    // nats
  double same_top = 0;  // share of tokens
  Mean nll;
  double attended = 0;  // share of tokens that attention read exactly
  double resident = 0;  // share of what all tokens take as f16
  double recalls = 0;   // tokens a layer and step
  double thaws = 0;     // tokens a layer and step
  double cold_bytes = 0;  // read a step
  double cold_share = 0;  // of the cold bytes, read a step
  // Bytes at the end of a window, on average.
  double resident_bytes = 0, hot_bytes = 0, ghost_bytes = 0, f16_bytes = 0;
  std::vector<KvStep::Layer> layers;  // means over steps
};

PolicyFigures figures_of(const Comparison& comparison, std::size_t policy,
                         const CommonOptions& options, int n_layers);

nlohmann::ordered_json to_json(const PolicyFigures& figures);       // all but the layers
nlohmann::ordered_json layers_json(const PolicyFigures& figures);  // a list
std::string to_text(const PolicyFigures& figures);

// For a table with a row a policy.
TableRow figures_header();
TableRow figures_row(const PolicyFigures& figures);

}  // namespace thaw
