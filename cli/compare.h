// A text decoded under KV policies, and in the same steps with every token kept in f16.
#pragma once

#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "kvstore/kvstore.h"
#include "model/forward.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

// A window is `context` tokens: `bos` (unless it is negative) and the text's. The first `prefill`
// run in batches, which is exact; the others one by one, each predicting the text's next token.
struct DecodeWindows {
  TokenId bos = -1;
  int context = 0;
  int prefill = 0;
  int stride = 0;  // tokens of the text from one window to the next
  int most = 0;    // windows
};

// The text's tokens that a window is fed.
struct DecodeWindow {
  int begin, end;
};
std::vector<DecodeWindow> decode_windows(const DecodeWindows& windows, int n_tokens);

// What one store did, over all windows.
struct PolicyScore {
  std::vector<double> nll;  // of each token that a decoded one predicts, nats
  std::vector<double> kl;   // KL(full || this) of the same prediction, nats
  int same_top = 0;         // how often both rank the same token first
  std::vector<KvStep::Layer> layers;  // sums over steps; empty where the store tells nothing
  KvCounters counters;
  KvUsage usage;               // at the ends of windows
  std::int64_t f16_bytes = 0;  // that all tokens take as f16, likewise
};

struct Comparison {
  std::vector<double> nll_full;      // empty when there was no full store
  std::vector<PolicyScore> policies;  // as `stores`
  int windows = 0;
  bool interrupted = false;
};

// full: null to leave the comparison out. progress(window, decoded) is called after each batch of a
// prefill and before each step, and returns false to stop.
Comparison compare_policies(Transformer& transformer,
                            const std::vector<std::unique_ptr<KvStore>>& stores, KvStore* full,
                            std::span<const TokenId> ids, const DecodeWindows& windows,
                            const std::function<bool(int, int)>& progress);

}  // namespace thaw
