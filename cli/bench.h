// thaw bench: its flags, and its two ways to measure.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/options.h"
#include "model/model.h"

namespace thaw {

struct BenchOptions {
  CommonOptions common;
  std::vector<std::string> policies = {"full"};
  std::optional<std::string> file, random;
  std::optional<std::string> weights;  // format of those of --random
  std::vector<int> prompts = {512};
  std::optional<int> decode;
  std::vector<int> depths = {0};
  int repetitions = 5;
  std::vector<std::string> ops;  // to be timed one by one; none: whole passes are

  int decoded() const { return decode.value_or(ops.empty() ? 128 : 8); }
};

// The tokens that a run reads: those of the file, or arbitrary ones; n of them.
std::vector<std::int32_t> bench_tokens(const BenchOptions& o, const Model& model, int n);
// The capacity of the stores, of which a run needs `needed`. Throws UsageError if --context is
// less.
int bench_capacity(const BenchOptions& o, const Config& config, int needed);

double weight_bytes(const LayerWeights& w);  // of the layer's matrices

// Bytes of the cache that decode steps between the two counters read: exact tokens, and the ghosts
// of all others (a recalled token's ghost, too: it is what called it).
double kv_bytes(const KvStore& kv, const KvCounters& before, const KvCounters& after);

// Every op of o.ops in every decode step, alone and from cold caches: a table, or JSON.
std::string time_ops(const BenchOptions& o, const Model& model);

}  // namespace thaw
