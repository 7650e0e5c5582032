#include "tests/simt/queue.h"

#include <algorithm>
#include <map>
#include <set>

#include "tests/simt/block.h"
#include "tests/simt/memory.h"
#include "tests/simt/sanitizers.h"
#include "tests/simt/simt.h"

namespace simt {
namespace {

std::vector<std::shared_ptr<Op>> pending;  // queued and not done
std::set<Stream*> streams;
int captures = 0;

bool is_ready(const Op& op) {
  return std::all_of(op.after.begin(), op.after.end(), [](const auto& o) { return o->done; });
}

// Op and all that must be done before it.
void add_ancestors(std::set<const Op*>& all, const Op& op) {
  if (!all.insert(&op).second) return;
  for (const auto& before : op.after) add_ancestors(all, *before);
}

// Runs pending[i].
void run(std::size_t i) {
  const std::shared_ptr<Op> op = pending[i];
  pending.erase(pending.begin() + static_cast<std::ptrdiff_t>(i));
  void* const host = identity();
  become(op->identity);
  acquire(op.get());  // what the host did before it queued this
  for (const auto& before : op->after) acquire(&before->end_clock);
  const std::int64_t bytes = op->run(*op);
  op->run = nullptr;  // freed by whom the kernel's arguments are ordered with
  release(&op->end_clock);
  become(host);
  op->after.clear();
  op->done = true;
  op->ended = std::chrono::steady_clock::now();
  if (op->name.empty()) return;
  Count& count = counts()[op->name];
  ++count.runs, count.bytes += bytes;
}

// Runs a random operation that is ready and of `some`, if any are named. False: there is none.
bool run_one(const std::set<const Op*>& some) {
  const std::size_t n = pending.size();
  if (n == 0) return false;
  const auto start = static_cast<std::size_t>(random().below(static_cast<int>(n)));
  for (std::size_t i = 0; i < n; ++i) {
    const std::size_t at = (start + i) % n;
    if (!is_ready(*pending[at]) || (!some.empty() && !some.contains(pending[at].get()))) continue;
    run(at);
    return true;
  }
  return false;
}

std::shared_ptr<Op> add(Stream& stream, std::shared_ptr<Op> op) {
  op->identity = stream.identity;
  op->capture = stream.capture;
  if (stream.capture != nullptr) {
    stream.capture->ops.push_back(op);
  } else {
    release(op.get());
    pending.push_back(op);
  }
  return stream.last = op;
}

std::int64_t nothing(const Op&) { return 0; }

}  // namespace

Stream* new_stream() {
  static std::vector<void*> identities;  // of streams that are gone too: they are costly
  static std::size_t n_made = 0;
  start_device();
  auto* stream = new Stream;
  if (kRace && identities.size() < 16) identities.push_back(new_identity());
  if (kRace) stream->identity = identities[n_made++ % identities.size()];
  streams.insert(stream);
  return stream;
}

void delete_stream(Stream* stream) {
  streams.erase(stream);
  delete stream;
}

std::shared_ptr<Op> last_of(const Stream& stream) { return stream.last; }

std::shared_ptr<Op> enqueue(Stream& stream, const std::string& name,
                            std::function<std::int64_t(const Op&)> run) {
  auto op = std::make_shared<Op>();
  op->name = name;
  op->run = std::move(run);
  if (stream.last != nullptr) op->after.push_back(stream.last);
  return add(stream, std::move(op));
}

cudaError_t enqueue_wait(Stream& stream, const std::shared_ptr<Op>& op) {
  if (op == nullptr) return cudaSuccess;
  if (stream.capture == nullptr && op->capture != nullptr) {  // joins the capture
    const auto found = std::find_if(streams.begin(), streams.end(), [&](const Stream* other) {
      return other->capture == op->capture;
    });
    if (found == streams.end()) return cudaErrorStreamCaptureIsolation;
    stream.before = std::exchange(stream.last, nullptr);
    stream.capture = (*found)->capture;
  }
  if (stream.capture != op->capture) return cudaErrorStreamCaptureIsolation;
  auto wait = std::make_shared<Op>();
  wait->run = nothing;
  if (stream.last != nullptr) wait->after.push_back(stream.last);
  wait->after.push_back(op);
  add(stream, std::move(wait));
  return cudaSuccess;
}

cudaError_t begin_capture(Stream& stream) {
  if (stream.capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  stream.capture = new Graph;
  stream.began_capture = true;
  stream.before = std::exchange(stream.last, nullptr);
  ++captures;
  return cudaSuccess;
}

cudaError_t end_capture(Stream& stream, Graph** out) {
  Graph* graph = stream.capture;
  if (graph == nullptr || !stream.began_capture) return cudaErrorStreamCaptureUnsupported;
  std::set<const Op*> joined;
  if (stream.last != nullptr) add_ancestors(joined, *stream.last);
  bool whole = true;
  for (Stream* other : streams) {
    if (other->capture != graph) continue;
    whole &= other->last == nullptr || joined.contains(other->last.get());
    other->capture = nullptr;
    other->began_capture = false;
    other->last = std::move(other->before);
  }
  --captures;
  *out = whole ? graph : nullptr;
  if (!whole) delete graph;
  return whole ? cudaSuccess : cudaErrorStreamCaptureUnjoined;
}

int n_captures() { return captures; }

cudaError_t enqueue_graph(const Graph& graph, Stream& stream) {
  if (stream.capture != nullptr) return cudaErrorStreamCaptureUnsupported;
  const std::shared_ptr<Op> before = stream.last;
  std::map<const Op*, std::shared_ptr<Op>> copies;
  auto end = std::make_shared<Op>();
  end->run = nothing;
  end->identity = stream.identity;
  if (before != nullptr) end->after.push_back(before);
  for (const auto& recorded : graph.ops) {
    auto op = std::make_shared<Op>();
    op->name = recorded->name, op->run = recorded->run, op->identity = recorded->identity;
    for (const auto& dependency : recorded->after) op->after.push_back(copies[dependency.get()]);
    if (op->after.empty() && before != nullptr) op->after.push_back(before);
    release(op.get());
    pending.push_back(op);
    end->after.push_back(op);
    copies[recorded.get()] = std::move(op);
  }
  release(end.get());
  pending.push_back(end);
  stream.last = std::move(end);
  return cudaSuccess;
}

void run_until_done(const Op& op) {
  const DeviceAccess access;
  std::set<const Op*> some;  // every other time, all that can wait does
  if (random().below(2) == 0) add_ancestors(some, op);
  while (!op.done)
    if (!run_one(some)) fatal("the host waits for work that can never run");
}

void finish(const std::shared_ptr<Op>& op) {
  if (op == nullptr) return;
  if (!op->done) run_until_done(*op);
  acquire(&op->end_clock);
}

void finish_all() {
  if (pending.empty()) return;  // opening device memory takes longer than a small kernel
  const DeviceAccess access;
  while (run_one({})) {
  }
}

// As much as is queued in the mean, but seldom: device memory is opened for each time.
void run_some() {
  if (random().below(8) > 0 || pending.empty()) return;
  const DeviceAccess access;
  for (int n = random().below(17); n > 0; --n) run_one({});
}

bool is_done(const std::shared_ptr<Op>& op) {
  if (op->done) acquire(&op->end_clock);
  return op->done;
}

}  // namespace simt
