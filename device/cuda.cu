#include "device/cuda.h"

#include <unordered_map>

namespace thaw {
namespace {

// Bytes of dynamic shared memory. The limit without asking, 48 KiB, is for static memory, too.
constexpr std::size_t kSharedWithoutAsking = 40 << 10;

std::string& first_failure() {
  static std::string message;
  return message;
}

[[noreturn]] void fail_for_good(const std::string& message) {
  if (first_failure().empty()) first_failure() = message;
  throw DeviceError(message);
}

std::string text_of(dim3 size) { return join(size.x, "x", size.y, "x", size.z); }

std::string mebibytes(std::size_t bytes) { return join(bytes >> 20, " MiB"); }

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "device");
  check(cudaDeviceGetAttribute(&value, which, device), "device attribute");
  return value;
}

// Programmatic dependent launch came with compute capability 9.0.
bool can_overlap() {
  static const bool can = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return can;
}

}  // namespace

void check(cudaError_t result, const char* what) {
  if (!first_failure().empty()) throw DeviceError(first_failure());
  if (result != cudaSuccess) fail_for_good(join(what, ": ", cudaGetErrorString(result)));
}

void forget_failure() { first_failure().clear(); }

DeviceFacts device_facts() {
  int n_devices = 0;
  const cudaError_t result = cudaGetDeviceCount(&n_devices);
  if (result == cudaErrorInsufficientDriver)
    fail("CUDA: no driver for an NVIDIA GPU, or one that is too old for this build");
  if (result == cudaErrorNoDevice || (result == cudaSuccess && n_devices == 0))
    fail("CUDA: no NVIDIA GPU found");
  check(result, "CUDA");
  int device = 0;
  cudaDeviceProp properties;
  check(cudaGetDevice(&device), "device");
  check(cudaGetDeviceProperties(&properties, device), "device properties");
  require(properties.major >= 8, "CUDA: ", properties.name, ": compute capability: expected 8.0 ",
          "or higher, found ", properties.major, ".", properties.minor);
  DeviceFacts facts = {.name = properties.name,
                       .major = properties.major,
                       .minor = properties.minor,
                       .n_multiprocessors = properties.multiProcessorCount,
                       .l2_bytes = static_cast<std::size_t>(properties.l2CacheSize),
                       .max_shared_bytes = properties.sharedMemPerBlockOptin};
  check(cudaMemGetInfo(&facts.free_memory, &facts.memory), "device memory");
  return facts;
}

bool reads_plain_memory() { return attribute(cudaDevAttrPageableMemoryAccess) != 0; }

Stream::Stream() {
  check(cudaStreamCreateWithFlags(handle_.out(), cudaStreamNonBlocking), "stream");
}
void Stream::wait(const Event& event) const {
  check(cudaStreamWaitEvent(get(), event.get(), 0), "stream wait");
}
void Stream::synchronize() const { check(cudaStreamSynchronize(get()), "stream synchronize"); }

Event::Event() { check(cudaEventCreate(handle_.out()), "event"); }
void Event::record(const Stream& stream) const {
  check(cudaEventRecord(get(), stream.get()), "event record");
}
void Event::synchronize() const { check(cudaEventSynchronize(get()), "event synchronize"); }
bool Event::done() const {
  const cudaError_t result = cudaEventQuery(get());
  if (result != cudaErrorNotReady) check(result, "event query");
  return result == cudaSuccess;
}

float milliseconds(const Event& from, const Event& to) {
  float elapsed = 0;
  check(cudaEventElapsedTime(&elapsed, from.get(), to.get()), "elapsed time");
  return elapsed;
}

void Graph::begin(const Stream& stream) {
  check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal), "graph capture");
}
void Graph::end(const Stream& stream) {
  CudaHandle<cudaGraph_t, cudaGraphDestroy> graph;
  check(cudaStreamEndCapture(stream.get(), graph.out()), "graph capture");
  check(cudaGraphInstantiate(exec_.out(), graph.get(), 0), "graph instantiate");
}
void Graph::abandon(const Stream& stream) {
  CudaHandle<cudaGraph_t, cudaGraphDestroy> graph;
  static_cast<void>(cudaStreamEndCapture(stream.get(), graph.out()));
}
void Graph::launch(const Stream& stream) const {
  check(cudaGraphLaunch(exec_.get(), stream.get()), "graph launch");
}

void* allocate(Memory memory, std::size_t bytes, const char* what) {
  check(cudaSuccess, what);
  if (bytes == 0) return nullptr;
  void* data = nullptr;
  const bool pinned = memory == Memory::kPinned;
  const cudaError_t result =
      pinned ? cudaHostAlloc(&data, bytes, cudaHostAllocDefault) : cudaMalloc(&data, bytes);
  if (result != cudaErrorMemoryAllocation) return check(result, what), data;
  static_cast<void>(cudaGetLastError());  // the context is whole: the next launch must not see it
  if (pinned) fail(what, ": the system refuses ", mebibytes(bytes), " of pinned memory");
  std::size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "device memory");
  fail(what, ": out of device memory: asked for ", mebibytes(bytes), ", ", mebibytes(free), " of ",
       mebibytes(total), " are free");
}

void release(Memory memory, void* data) noexcept {
  if (data == nullptr) return;
  static_cast<void>(memory == Memory::kPinned ? cudaFreeHost(data) : cudaFree(data));
}

void copy_bytes(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                const Stream& stream) {
  if (bytes > 0 && !stream.muted())
    check(cudaMemcpyAsync(to, from, bytes, kind, stream.get()), "copy");
}

void fill_device(void* device, int byte, std::size_t bytes, const Stream& stream) {
  if (bytes > 0 && !stream.muted())
    check(cudaMemsetAsync(device, byte, bytes, stream.get()), "fill");
}

LaunchConfig::LaunchConfig(dim3 grid, dim3 block, std::size_t shared_bytes, const Stream& stream,
                           bool overlap) {
  config_.gridDim = grid;
  config_.blockDim = block;
  config_.dynamicSmemBytes = shared_bytes;
  config_.stream = stream.get();
  if (!overlap || !can_overlap()) return;
  overlap_.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap_.val.programmaticStreamSerializationAllowed = 1;
  config_.attrs = &overlap_;
  config_.numAttrs = 1;
}

void LaunchConfig::allow_shared(const void* kernel, const char* name) const {
  static std::unordered_map<const void*, std::size_t> given;  // launches come from one thread
  std::size_t& most = given.try_emplace(kernel, kSharedWithoutAsking).first->second;
  if (config_.dynamicSmemBytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(config_.dynamicSmemBytes)),
        name);
  most = config_.dynamicSmemBytes;
}

void LaunchConfig::check(cudaError_t result, const char* name) const {
  if (result == cudaSuccess) return thaw::check(result, name);
  static_cast<void>(cudaGetLastError());
  thaw::check(result,
              join(name, " (grid ", text_of(config_.gridDim), ", block ", text_of(config_.blockDim),
                   ", ", config_.dynamicSmemBytes, " bytes of shared memory)")
                  .c_str());
}

}  // namespace thaw
