// What the commands that write text share: sampling, and the run of a model around it.
#pragma once

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>

#include "cli/flags.h"
#include "cli/kv_flags.h"
#include "cli/recovery_flags.h"
#include "cli/terminal.h"
#include "model/generate.h"
#include "model/model.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

void add_sampling_flags(Flags& flags, SamplerOptions& sampler, std::optional<std::uint64_t>& seed);

// What generate() is told wherever text is written. What is given must outlive the options.
GenerateOptions writing_options(const Model& model, const Tokenizer& tokenizer,
                                const RecoveryFlags& flags, Recovery& recovery, Progress& progress,
                                const std::atomic<bool>& interrupted);

inline double rate(int count, double seconds) { return seconds > 0 ? count / seconds : 0; }

// Where the keys and values stand, and what was read of those that were frozen.
std::string describe_kv(const KvFlags& flags, const KvUsage& usage, const KvCounters& counters,
                        int n_layers);

}  // namespace thaw
