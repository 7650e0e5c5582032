// The flags of the KV store, the same for every command.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "kvstore/kvstore.h"

namespace thaw {

struct KvFlags {
  std::string type_name = "f16";
  std::string policy = "thaw";
  std::string preset = "default";
  std::optional<float> hot_fraction;
  std::optional<int> hot_tokens;
  std::optional<std::int64_t> hot_bytes;
  bool freezes_at_once = false;  // without --freeze-from: for commands that measure freezing
  std::optional<int> freeze_from, window, sinks;
  std::optional<float> epsilon, caution, stay, softness, quantile;
  std::optional<std::string> ghost;
  std::string select = "head";
  std::optional<std::string> cold_file;
  bool check = false;

  KvType type() const;
  // What the flags say, a policy's own defaults for those not given; bounds of the hot tier are not
  // for full. Throws UsageError for what contradicts itself.
  KvOptions options() const;
};

// The flags with each of the policies in turn.
std::vector<KvFlags> with_policies(const KvFlags& kv, const std::vector<std::string>& policies);

// Throws UsageError where flags say what freezes and all of these are full, where none of them has
// the policy that alone reads a flag, and for what contradicts itself.
void check_kv(const std::vector<KvFlags>& variants);

// policies: for a command that takes several, which go there instead of to `kv`.
void add_kv_flags(Flags& flags, KvFlags& kv, std::vector<std::string>* policies = nullptr);

// "k3v2", or "off".
std::string ghost_name(const PolicyParams& params);

}  // namespace thaw
