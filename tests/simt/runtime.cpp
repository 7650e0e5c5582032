// The runtime API: operations with dependencies, run when the host waits for something.
#include "tests/simt/runtime.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tests/simt/block.h"
#include "tests/simt/include/nvtx3/nvToolsExt.h"
#include "tests/simt/include/simt/host.h"
#include "tests/simt/memory.h"
#include "tests/simt/queue.h"
#include "tests/simt/sanitizers.h"
#include "tests/simt/simt.h"
#include "tests/simt/sites.h"

namespace simt {
namespace {

constexpr std::size_t kSharedWithoutAsking = 48 << 10, kMaxShared = 232448;

int n_calls = 0, calls_until_failure = 0;
bool can_read_plain_memory = false;
std::vector<const char*> names;  // open profile ranges

std::unordered_map<const void*, std::size_t>& allowed_shared() {
  static std::unordered_map<const void*, std::size_t> bytes;
  return bytes;
}

// Returns when op is done; null: at once.
cudaError_t wait_for(const std::shared_ptr<Op>& op) {
  if (n_captures() > 0) return cudaErrorStreamCaptureUnsupported;
  finish(op);
  return cudaSuccess;
}

}  // namespace

bool fails() {
  ++n_calls;
  return calls_until_failure > 0 && --calls_until_failure == 0;
}
std::string name_or(const char* unnamed) { return names.empty() ? unnamed : names.back(); }

int fail_call(int n) {
  calls_until_failure = n;
  return std::exchange(n_calls, 0);
}

bool emulated() { return true; }

void set_plain_memory(bool readable) { can_read_plain_memory = readable; }

namespace {

// What ran by the end of the process, in the file that SIMT_COUNTS names: name, runs, bytes a line.
struct Counts {
  std::map<std::string, Count> all;
  ~Counts() {
    const char* path = std::getenv("SIMT_COUNTS");
    FILE* file = path == nullptr ? nullptr : std::fopen(path, "w");
    if (file == nullptr) return;
    for (const auto& [name, count] : all)
      std::fprintf(file, "%s\t%lld\t%lld\n", name.c_str(), static_cast<long long>(count.runs),
                   static_cast<long long>(count.bytes));
    std::fclose(file);
  }
};

}  // namespace

std::map<std::string, Count>& counts() {
  static Counts counts;
  return counts.all;
}

cudaError_t enqueue_kernel(const cudaLaunchConfig_t& config, const void* kernel,
                           std::function<void()> body, std::vector<const void*> pointers) {
  if (fails()) return cudaErrorLaunchFailure;
  const dim3 g = config.gridDim, b = config.blockDim;
  const std::size_t n_threads = std::size_t{b.x} * b.y * b.z;
  if (n_threads == 0 || n_threads > 1024 || b.z > 64 || g.x == 0 || g.y == 0 || g.z == 0 ||
      g.y > 65535 || g.z > 65535 || g.x > 2147483647u)
    return cudaErrorInvalidConfiguration;
  const std::size_t allowed = std::max(kSharedWithoutAsking, allowed_shared()[kernel]);
  if (config.dynamicSmemBytes > allowed) return cudaErrorInvalidValue;
  Launch launch = {.name = name_or("(unnamed)"),
                   .grid = g,
                   .block = b,
                   .shared_bytes = config.dynamicSmemBytes,
                   .body = std::move(body)};
  for (unsigned i = 0; i < config.numAttrs; ++i)
    launch.overlaps |= config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
  for (const void* pointer : pointers)
    if (pointer != nullptr && kind_of(pointer, 0) == Kind::kPageable)
      fatal("kernel %s: an argument points to memory that the device cannot see",
            launch.name.c_str());
  enqueue(*config.stream, launch.name, [launch](const Op& op) mutable {
    launch.queued = &op;
    launch.bytes = 0;
    release(&launch.begun);
    run(launch);
    acquire(&launch.ended);
    return launch.bytes;
  });
  return cudaSuccess;
}

}  // namespace simt

using namespace simt;

int nvtxRangePushA(const char* name) {
  names.push_back(name);
  return static_cast<int>(names.size()) - 1;
}
int nvtxRangePop() {
  names.pop_back();
  return static_cast<int>(names.size());
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorNotReady:
      return "device not ready";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureUnjoined:
      return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation:
      return "dependency created on uncaptured work in another stream";
    default:
      return "unknown error";
  }
}
cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return fails() ? cudaErrorNoDevice : cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return fails() ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {"CUDA emulator", 9, 0, 4, 1 << 20, kMaxShared};
  return fails() ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrPageableMemoryAccess ? can_read_plain_memory : 9;
  return fails() ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = free_device_bytes(), *total = total_device_bytes();
  return fails() ? cudaErrorLaunchFailure : cudaSuccess;
}

cudaError_t cudaMalloc(void** out, std::size_t bytes) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (n_captures() > 0) return cudaErrorStreamCaptureUnsupported;
  *out = allocate(Kind::kDevice, bytes);
  return *out == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaHostAlloc(void** out, std::size_t bytes, unsigned) {
  if (fails()) return cudaErrorMemoryAllocation;
  if (n_captures() > 0) return cudaErrorStreamCaptureUnsupported;
  *out = allocate(Kind::kPinned, bytes);
  return *out == nullptr ? cudaErrorMemoryAllocation : cudaSuccess;
}
cudaError_t cudaFree(void* data) {
  finish_all();
  deallocate(data);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void* data) { return cudaFree(data); }

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  if (fails()) return cudaErrorLaunchFailure;
  const Kind to_kind = kind_of(to, bytes), from_kind = kind_of(from, bytes);
  if ((to_kind == Kind::kDevice) != (kind != cudaMemcpyDeviceToHost) ||
      (from_kind == Kind::kDevice) != (kind != cudaMemcpyHostToDevice))
    return cudaErrorInvalidValue;
  const char* name = kind == cudaMemcpyHostToDevice   ? "copy to device"
                     : kind == cudaMemcpyDeviceToHost ? "copy to host"
                                                      : "copy on device";
  const auto n = static_cast<std::int64_t>(bytes);
  if (from_kind == Kind::kPageable) {  // staged: read before the call returns
    if (n_captures() > 0) return cudaErrorStreamCaptureUnsupported;
    const auto* first = static_cast<const char*>(from);
    enqueue(*stream, name, [to, staged = std::vector<char>(first, first + bytes), n](const Op&) {
      std::memcpy(to, staged.data(), staged.size());
      return n;
    });
    return cudaSuccess;
  }
  if (to_kind == Kind::kPageable && n_captures() > 0) return cudaErrorStreamCaptureUnsupported;
  const auto op = enqueue(*stream, name, [=](const Op&) {
    std::memmove(to, from, bytes);
    return n;
  });
  return to_kind == Kind::kPageable ? wait_for(op) : cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int byte, std::size_t bytes, cudaStream_t stream) {
  if (fails()) return cudaErrorLaunchFailure;
  if (kind_of(to, bytes) == Kind::kPageable) return cudaErrorInvalidValue;
  enqueue(*stream, "fill", [=](const Op&) {
    std::memset(to, byte, bytes);
    return static_cast<std::int64_t>(bytes);
  });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) {
  if (fails()) return cudaErrorLaunchFailure;
  *out = new_stream();
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete_stream(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (fails()) return cudaErrorLaunchFailure;
  return skipped_by_caller() ? cudaSuccess : wait_for(last_of(*stream));
}

cudaError_t cudaEventCreate(cudaEvent_t* out) {
  if (fails()) return cudaErrorLaunchFailure;
  *out = new Event;
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  if (fails()) return cudaErrorLaunchFailure;
  event->op = enqueue(*stream, "", [](const Op&) { return 0; });
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  if (fails()) return cudaErrorLaunchFailure;
  return skipped_by_caller() ? cudaSuccess : enqueue_wait(*stream, event->op);
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (fails()) return cudaErrorLaunchFailure;
  return skipped_by_caller() ? cudaSuccess : wait_for(event->op);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (fails()) return cudaErrorLaunchFailure;
  if (event->op == nullptr) return cudaSuccess;
  run_some();
  return is_done(event->op) ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  if (fails()) return cudaErrorLaunchFailure;
  if (from->op == nullptr || to->op == nullptr) return cudaErrorInvalidValue;
  if (!from->op->done || !to->op->done) return cudaErrorNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(to->op->ended - from->op->ended).count();
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return fails() ? cudaErrorLaunchFailure : begin_capture(*stream);
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* out) {
  const cudaError_t result = end_capture(*stream, out);
  return fails() ? cudaErrorLaunchFailure : result;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* out, cudaGraph_t graph, unsigned long long) {
  if (fails()) return cudaErrorLaunchFailure;
  *out = new Graph(*graph);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) {
  delete graph;
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  return fails() ? cudaErrorLaunchFailure : enqueue_graph(*graph, *stream);
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (fails()) return cudaErrorLaunchFailure;
  if (value < 0 || static_cast<std::size_t>(value) > kMaxShared) return cudaErrorInvalidValue;
  allowed_shared()[kernel] = static_cast<std::size_t>(value);
  return cudaSuccess;
}
