// A run as a file that trace viewers show (Perfetto, chrome://tracing): the Chrome trace event
// format, as one JSON object.
#pragma once

#include <array>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "cli/output_file.h"
#include "kvstore/policy.h"
#include "kvstore/recorder.h"
#include "model/ops.h"

namespace thaw {

// Two tracks: "model" with phases and the ops within them, and "kv" with what froze and thawed in
// each layer and step. Counters: bytes resident, bytes read from the cold tier, tokens recalled.
class Trace : public KvRecorder {
 public:
  explicit Trace(std::filesystem::path path);

  // The time since the last call of this or of begin() belongs to `name`.
  void phase(std::string_view name);
  void begin();  // what comes next begins now

  // An op ends when its result is reported; it began when the one before it ended.
  void op(const ActivationView& result);
  void recovery(int step, Rung rung, float value);
  void event(const KvEvent& event) override;
  void step(const KvStep& step) override;

  void finish();  // the file appears now

 private:
  static constexpr std::size_t kListed = 64;  // tokens named of those that did the same at once
  static constexpr int kNoLayer = -2;         // -1: all of them
  struct Group {
    std::string tokens;  // "1,2,3"
    std::size_t count = 0;
  };
  double now() const;  // microseconds since construction
  void add(std::string_view json);
  void span(std::string_view name, double from, double to, std::string_view args);
  void instant(std::string_view name, double at, std::string_view args);
  void counter(std::string_view name, double at, std::string_view values);
  void flush_groups();

  OutputFile file_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::string buffer_;
  double phase_began_ = 0, op_began_ = 0;
  int layer_ = kNoLayer;  // of the groups
  double groups_at_ = 0;
  std::array<Group, 6> groups_;  // a kind of event each
};

}  // namespace thaw
