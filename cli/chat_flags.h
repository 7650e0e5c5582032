// The flags of thaw chat.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cli/commands.h"
#include "cli/input.h"
#include "cli/options.h"
#include "cli/recovery_flags.h"
#include "cli/watch.h"
#include "model/sampler.h"

namespace thaw {

struct ChatOptions {
  CommonOptions common;
  RecoveryFlags recovery;
  InputOptions first;  // the first message
  SamplerOptions sampler;
  WatchOptions watch;
  std::optional<std::uint64_t> seed;
  int max_tokens = -1;
  std::optional<std::string> system, session, history;
  bool verbose = false;
};

// False after printing --help. Throws UsageError.
bool parse_chat(const Args& args, ChatOptions& options);

}  // namespace thaw
