// The trace of a run, as a viewer reads it.
#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/trace.h"
#include "tests/error_of.h"
#include "tests/tiny_files.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::error_of;
using testing::TemporaryDirectory;

json written(const std::function<void(Trace&)>& run) {
  const TemporaryDirectory directory;
  const auto path = directory.path() / "trace.json";
  Trace trace(path);
  run(trace);
  CHECK(!std::filesystem::exists(path));  // not before it is whole
  trace.finish();
  return json::parse(testing::read_file(path)).at("traceEvents");
}

std::vector<json> named(const json& events, const std::string& name) {
  std::vector<json> found;
  for (const json& event : events) {
    if (event["name"] == name) found.push_back(event);
  }
  return found;
}

constexpr double kWork = 20;  // microseconds

void work() {
  const auto start = std::chrono::steady_clock::now();
  while (std::chrono::steady_clock::now() - start < std::chrono::microseconds(25)) continue;
}

TEST_CASE("Spans of a trace follow each other, and ops lie within their phase") {
  const json events = written([](Trace& trace) {
    trace.begin();
    work();
    trace.op({"embed", -1, nullptr, 3, 8});
    work();
    trace.op({"q", 1, nullptr, 3, 8});
    trace.phase("prefill");
    trace.phase("sample");
    trace.begin();
    trace.op({"q", 0, nullptr, 1, 8});
    trace.phase("decode");
  });
  const auto from = [](const json& span) { return span["ts"].get<double>(); };
  const auto to = [&](const json& span) { return from(span) + span["dur"].get<double>(); };
  const json prefill = named(events, "prefill").at(0), sample = named(events, "sample").at(0),
             decode = named(events, "decode").at(0), embed = named(events, "embed").at(0);
  const std::vector<json> q = named(events, "q");
  REQUIRE(q.size() == 2);
  constexpr double kRounding = .002;
  CHECK(embed["dur"] >= kWork);
  CHECK(q[0]["dur"] >= kWork);
  CHECK(prefill["dur"] >= 2 * kWork);
  CHECK(to(embed) <= from(q[0]) + kRounding);
  CHECK(from(prefill) <= from(embed) + kRounding);
  CHECK(to(q[0]) <= to(prefill) + kRounding);
  CHECK(to(prefill) <= from(sample) + kRounding);
  CHECK(to(sample) <= from(decode) + kRounding);
  CHECK(from(decode) <= from(q[1]) + kRounding);
  CHECK(to(q[1]) <= to(decode) + kRounding);
  CHECK(q[0]["args"] == json::parse(R"({"rows": 3, "layer": 1})"));
  CHECK(embed["args"] == json::parse(R"({"rows": 3})"));
}

TEST_CASE("What froze and thawed stands in the trace by layer and step, with its tokens") {
  const json events = written([](Trace& trace) {
    const auto event = [&](KvEvent::Kind kind, std::int16_t layer, int token) {
      trace.event({kind, 0, layer, 0, token, .5f, 1, 1});
    };
    event(KvEvent::kFreeze, 0, 7);
    event(KvEvent::kRecall, 0, 3);
    event(KvEvent::kFreeze, 0, 9);
    event(KvEvent::kFreeze, 1, 8);
    trace.step({0, 10, {{0, 0, 0, 0, 0, 1.5f, 0, 0}, {0, 0, 0, 0, 0, 2, 0, 0}}, 100, 20, 30});
    for (int t = 0; t < 100; ++t) event(KvEvent::kThaw, 1, t);
    trace.step({1, 11, {}, 0, 0, 0});
  });
  const std::vector<json> freezes = named(events, "freeze");
  REQUIRE(freezes.size() == 2);
  CHECK(freezes[0]["args"] == json::parse(R"({"layer": 0, "count": 2, "tokens": [7, 9]})"));
  CHECK(freezes[1]["args"] == json::parse(R"({"layer": 1, "count": 1, "tokens": [8]})"));
  CHECK(named(events, "recall").at(0)["args"]["tokens"] == json::parse("[3]"));
  const json thaws = named(events, "thaw").at(0)["args"];
  CHECK(thaws["count"] == 100);
  CHECK(thaws["tokens"].size() == 64);  // the others are counted, not named
  CHECK(named(events, "resident bytes").at(0)["args"] ==
        json::parse(R"({"hot": 100, "ghosts": 20})"));
  CHECK(named(events, "cold bytes read in a step").at(0)["args"]["bytes"] == 30);
  CHECK(named(events, "tokens recalled in a step").at(0)["args"]["tokens"] == 3.5);
}

TEST_CASE("A trace is valid JSON whatever the numbers, and names its tracks") {
  const json events = written([](Trace& trace) {
    trace.recovery(5, Rung::kSoft, std::numeric_limits<float>::infinity());
    for (int i = 0; i < 3000; ++i) trace.phase("more than a buffer");
  });
  CHECK(named(events, "recovery: soft").at(0)["args"]["value"].is_null());
  CHECK(named(events, "more than a buffer").size() == 3000);
  CHECK(named(events, "thread_name").size() == 2);
}

TEST_CASE("A trace that is not finished leaves no file") {
  const TemporaryDirectory directory;
  {
    Trace trace(directory.path() / "trace.json");
    trace.phase("prefill");
  }
  CHECK(std::filesystem::is_empty(directory.path()));
  CHECK(error_of([&] {
          Trace trace(directory.path() / "no" / "trace.json");
        }).find("trace.json: cannot write: No such file or directory") != std::string::npos);
}

}  // namespace
}  // namespace thaw
