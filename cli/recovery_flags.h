// The flags of recovery, and its report.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "kvstore/recovery.h"

namespace thaw {

struct RecoveryFlags {
  std::optional<std::string> highest;
  std::optional<float> z;
  std::optional<int> rewalk_tokens;
  float second_look = 0.15f;  // nats
  int verify = 0;             // tokens

  std::string rung() const { return highest.value_or("off"); }
  RecoveryParams params(const std::string& policy) const;  // off where full has nothing to thaw
};

void add_recovery_flags(Flags& flags, RecoveryFlags& recovery);
// Throws UsageError. policies: of all variants that run.
void check_recovery(const RecoveryFlags& recovery, const std::vector<std::string>& policies);

// "soft 2 (at 130, 192), full 1 (at 208)", or "never".
std::string describe(const Recovery& recovery);
nlohmann::ordered_json to_json(const std::vector<Recovery::Firing>& firings);
nlohmann::ordered_json to_json(const Recovery& recovery);  // with how often each rung fired

}  // namespace thaw
