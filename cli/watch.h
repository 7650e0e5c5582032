// What --report, --trace and --heat need of a run.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "cli/freeze_map.h"
#include "cli/output_file.h"
#include "cli/trace.h"
#include "kvstore/recovery.h"
#include "model/forward.h"
#include "model/generate.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

struct WatchOptions {
  std::optional<std::string> report, trace;
  bool heat = false;
};

void add_watch_flags(Flags& flags, WatchOptions& options);
void add_heat_flag(Flags& flags, WatchOptions& options);

// Listens to a store and a transformer, which must outlive it. Costs nothing when no flag is given.
class Watch : private KvRecorder {
 public:
  // Throws Error when a file cannot be written, so that a run is not in vain.
  Watch(const WatchOptions& options, Transformer& transformer, KvStore& kv);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;

  // Wraps the callbacks that are set so far, so that this is told, too.
  void attach(GenerateOptions& options);

  // For loops other than generate(): whose firings to show, if anyone's; and after every forward
  // pass, the logits that it gave.
  void follow(const Recovery* recovery) { recovery_ = recovery; }
  void ran(std::span<const float> logits);

  // Writes the files, and the heat to standard error. tokens: of the text, prompt first.
  void finish(const Tokenizer& tokenizer, std::span<const TokenId> tokens, int prompt_tokens);

 private:
  void event(const KvEvent& event) override;
  void step(const KvStep& step) override;
  void see_firings();

  WatchOptions options_;
  Transformer& transformer_;
  KvStore& kv_;
  const Recovery* recovery_ = nullptr;
  std::size_t firings_ = 0;  // seen so far
  int store_steps_ = 0;      // decode steps so far,
  int told_steps_ = 0;       // and those when ran() was called last
  bool sampling_ = false;
  std::unique_ptr<FreezeMap> map_;
  std::unique_ptr<OutputFile> page_;
  std::unique_ptr<Trace> trace_;
};

}  // namespace thaw
