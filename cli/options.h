// Flags that several commands share, and what they mean.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>

#include "cli/flags.h"
#include "cli/kv_flags.h"
#include "kvstore/kvstore.h"
#include "model/backend.h"
#include "model/config.h"
#include "model/model.h"

namespace thaw {

struct CommonOptions {
  std::optional<std::string> model;
  int threads = default_threads();
  std::string backend = "auto";
  std::string needs_cpu;  // a flag that was given and that only the CPU backend serves, or ""
  std::optional<int> context;
  KvFlags kv;
  bool json = false;
  bool quiet = false;

  static int default_threads();  // physical cores this process may use, within 1 .. 256
};

void add_model_flag(Flags& flags, CommonOptions& options, const std::string& help);
void add_run_flags(Flags& flags, CommonOptions& options);  // threads, backend
// --context and the store's flags; commands without a --context take add_kv_flags(flags, kv).
void add_kv_flags(Flags& flags, CommonOptions& options, const std::string& context_help,
                  std::vector<std::string>* policies = nullptr);  // as in cli/kv_flags.h
void add_output_flags(Flags& flags, CommonOptions& options);      // json, quiet

// Throws UsageError when no model is named, and Error when the backend is not in this build.
void check_common(CommonOptions& options);

// The store's capacity in tokens: --context, or the model's. Warns on standard error when it is
// beyond what the model was trained for.
int context_tokens(const CommonOptions& options, const Config& config);

// Throws Error that names the model when a value is NaN or infinite.
void require_finite(std::span<const float> logits, const Model& model);

// One line about a model, for --verbose.
std::string describe(const Config& config);

// The backend that --backend asks for; what auto takes is said on standard error. Throws Error when
// there is no device, or the backend does not serve a flag.
std::unique_ptr<Backend> make_backend(const CommonOptions& options, const Model& model);

// The backend's store that the KV flags ask for, for `capacity` tokens.
std::unique_ptr<KvStore> make_kv_store(Backend& backend, const KvFlags& flags, const Config& config,
                                       int capacity);

}  // namespace thaw
