#include "cli/trace.h"

#include <cmath>
#include <cstdio>
#include <utility>

#include "device/error.h"

namespace thaw {
namespace {

constexpr const char* kKindNames[] = {"append", "seed", "recall", "thaw", "freeze", "rewind"};
constexpr int kModelTrack = 1, kKvTrack = 2;
constexpr std::size_t kBuffer = 1 << 16;

std::string number(double value) {
  if (!std::isfinite(value)) return "null";
  char text[40];
  return {text, static_cast<std::size_t>(std::snprintf(text, sizeof text, "%.3f", value))};
}

std::string named(std::string_view name, std::string_view kind) {
  std::string out = R"({"name":")";
  out += name;
  out += R"(","ph":")";
  out += kind;
  return out += R"(","pid":1)";
}

}  // namespace

Trace::Trace(std::filesystem::path path) : file_(std::move(path)) {
  buffer_ = R"({"displayTimeUnit":"ms","traceEvents":[)"
            "\n";
  buffer_ += R"({"name":"process_name","ph":"M","pid":1,"args":{"name":"thaw"}})";
  for (const auto& [track, name] : {std::pair{kModelTrack, "model"}, {kKvTrack, "kv"}}) {
    add(join(named("thread_name", "M"), R"(,"tid":)", track, R"(,"args":{"name":")", name,
             R"("}})"));
  }
}

double Trace::now() const {
  return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start_)
      .count();
}

void Trace::add(std::string_view json) {
  buffer_ += ",\n";
  buffer_ += json;
  if (buffer_.size() < kBuffer) return;
  file_.write(buffer_);
  buffer_.clear();
}

void Trace::span(std::string_view name, double from, double to, std::string_view args) {
  std::string json = named(name, "X");
  json += R"(,"tid":1,"ts":)" + number(from) + R"(,"dur":)" + number(to - from);
  json += R"(,"args":{)";
  json += args;
  add(json += "}}");
}

void Trace::instant(std::string_view name, double at, std::string_view args) {
  std::string json = named(name, "i");
  json += R"(,"tid":2,"s":"t","ts":)" + number(at) + R"(,"args":{)";
  json += args;
  add(json += "}}");
}

void Trace::counter(std::string_view name, double at, std::string_view values) {
  std::string json = named(name, "C");
  json += R"(,"ts":)" + number(at) + R"(,"args":{)";
  json += values;
  add(json += "}}");
}

void Trace::begin() { phase_began_ = op_began_ = now(); }

void Trace::phase(std::string_view name) {
  const double from = phase_began_;
  begin();
  span(name, from, phase_began_, "");
}

void Trace::op(const ActivationView& result) {
  const double from = std::exchange(op_began_, now());
  std::string args = R"("rows":)" + std::to_string(result.rows);
  if (result.layer >= 0) args += R"(,"layer":)" + std::to_string(result.layer);
  span(result.name, from, op_began_, args);
}

void Trace::recovery(int step, Rung rung, float value) {
  instant(join("recovery: ", kRungNames[static_cast<int>(rung)]), now(),
          join(R"("step":)", step, R"(,"value":)", number(value)));
}

void Trace::event(const KvEvent& event) {
  if (event.layer != layer_) {
    flush_groups();
    layer_ = event.layer;
    groups_at_ = now();
  }
  Group& group = groups_[event.kind];
  if (group.count++ >= kListed) return;
  if (!group.tokens.empty()) group.tokens += ',';
  group.tokens += std::to_string(event.token);
}

// One instant a kind: a single one for each token would make the file ten times as large.
void Trace::flush_groups() {
  for (std::size_t kind = 0; kind < groups_.size(); ++kind) {
    const Group group = std::exchange(groups_[kind], {});
    if (group.count == 0) continue;
    instant(kKindNames[kind], groups_at_,
            join(R"("layer":)", layer_, R"(,"count":)", group.count, R"(,"tokens":[)", group.tokens,
                 "]"));
  }
  layer_ = kNoLayer;
}

void Trace::step(const KvStep& step) {
  flush_groups();
  const double at = now();
  double recalled = 0;
  for (const KvStep::Layer& layer : step.layers) recalled += layer.recalled;
  counter("resident bytes", at,
          join(R"("hot":)", step.hot_bytes, R"(,"ghosts":)", step.ghost_bytes));
  counter("cold bytes read in a step", at, join(R"("bytes":)", step.cold_bytes_read));
  counter("tokens recalled in a step", at, join(R"("tokens":)", number(recalled)));
}

void Trace::finish() {
  flush_groups();
  file_.write(buffer_);
  file_.write("\n]}\n");
  file_.finish();
}

}  // namespace thaw
