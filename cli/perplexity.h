// What thaw perplexity is asked for, and its two ways to answer.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/input.h"
#include "cli/options.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

struct PerplexityOptions {
  CommonOptions common;
  InputOptions input;
  bool special = false;
  std::optional<int> stride, prefill, windows;
  bool no_full = false;
  std::vector<std::string> sweeps;
  std::optional<std::string> csv, plot;

  PerplexityOptions() { common.kv.policy = "full"; }

  // Decoded token by token, with full beside it; else all tokens in batches.
  bool compares() const;
};

// cli/perplexity_policies.cpp. Returns the exit code.
int run_policies(const PerplexityOptions& options, const Model& model, const Tokenizer& tokenizer,
                 const Input& input, const std::vector<TokenId>& ids);

}  // namespace thaw
