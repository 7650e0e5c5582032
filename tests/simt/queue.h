// Work that is queued: operations, each with those that must be done before it. Streams, events and
// graphs are ways to say which those are.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/simt/include/simt/host.h"

namespace simt {

// The address of an Op is its clock for ThreadSanitizer: when it was queued, and then when it
// ended.
struct Op {
  std::string name;                            // "": nothing to count
  std::function<std::int64_t(const Op&)> run;  // returns bytes to count
  std::vector<std::shared_ptr<Op>> after;
  void* identity = nullptr;        // the stream's, for ThreadSanitizer
  const Graph* capture = nullptr;  // the graph being recorded, if it is recorded and not queued
  bool done = false;
  char end_clock = 0;
  std::chrono::steady_clock::time_point ended = {};
};

struct Graph {
  std::vector<std::shared_ptr<Op>> ops;  // each after those that it waits for
};

struct Stream {
  std::shared_ptr<Op> last;    // the newest operation, done or not
  std::shared_ptr<Op> before;  // the same when its capture began
  Graph* capture = nullptr;    // what it records into
  bool began_capture = false;
  void* identity = nullptr;
};

struct Event {
  std::shared_ptr<Op> op;  // null: never recorded
};

Stream* new_stream();
void delete_stream(Stream* stream);
std::shared_ptr<Op> last_of(const Stream& stream);  // null: none

// Adds an operation to the stream, or to the graph that it records.
std::shared_ptr<Op> enqueue(Stream& stream, const std::string& name,
                            std::function<std::int64_t(const Op&)> run);
cudaError_t enqueue_wait(Stream& stream, const std::shared_ptr<Op>& op);
cudaError_t enqueue_graph(const Graph& graph, Stream& stream);

cudaError_t begin_capture(Stream& stream);
cudaError_t end_capture(Stream& stream, Graph** out);
int n_captures();

// Run operations in an order that is legal and otherwise random. The host is ordered after what it
// waited for.
void finish(const std::shared_ptr<Op>& op);  // until op is done; null: nothing
void finish_all();
void run_some();  // a few, or none
bool is_done(const std::shared_ptr<Op>& op);

}  // namespace simt
