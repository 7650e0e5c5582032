// Memory, streams, graphs and launches on the GPU: the one place that calls the CUDA runtime.
//
// Everything is asynchronous unless it says otherwise: work on one stream runs in order, and work
// on two streams is unordered until one waits for an event of the other. Every failure is an Error
// that names the operation. Objects are move-only, must not outlive the process's CUDA context,
// and belong to the thread that uses them.
#pragma once

#include <cuda_runtime.h>
#include <nvtx3/nvToolsExt.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <utility>

#include "device/error.h"

namespace thaw {

// Throws Error("WHAT: CUDA's own text") unless the call succeeded. Sticky: after one failure every
// later check fails with the first one's message, so that nothing goes on in a broken context.
void check(cudaError_t result, const char* what);

// For tests that make calls fail; a real context cannot be mended.
void forget_failure();

struct DeviceFacts {
  std::string name;
  int major = 0, minor = 0;     // compute capability
  std::size_t memory = 0;       // bytes
  std::size_t free_memory = 0;  // bytes, now
  int n_multiprocessors = 0;
  std::size_t l2_bytes = 0;
  std::size_t max_shared_bytes = 0;  // dynamic shared memory of one block
};

// The current device. Throws Error when there is none, when the driver is missing or too old, or
// when the device is older than compute capability 8.0.
DeviceFacts device_facts();

// Whether kernels can read plain host memory at the host's address, page by page over the bus.
bool reads_plain_memory();

// A span of a profile, open until the end of the scope; spans nest.
class ProfileRange {
 public:
  explicit ProfileRange(const char* name) { nvtxRangePushA(name); }
  ~ProfileRange() { nvtxRangePop(); }
  ProfileRange(const ProfileRange&) = delete;
  ProfileRange& operator=(const ProfileRange&) = delete;
};

// A handle of the runtime, released on destruction; a moved-from one holds null.
template <class Handle, cudaError_t (*kRelease)(Handle)>
class CudaHandle {
 public:
  CudaHandle() = default;
  ~CudaHandle() { reset(); }
  CudaHandle(CudaHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  CudaHandle& operator=(CudaHandle&& other) noexcept {
    if (this != &other) reset(), handle_ = std::exchange(other.handle_, nullptr);
    return *this;
  }
  Handle get() const { return handle_; }
  Handle* out() { return &handle_; }  // for the call that creates it

 private:
  void reset() {
    if (handle_ != nullptr) static_cast<void>(kRelease(handle_));
    handle_ = nullptr;
  }
  Handle handle_ = nullptr;
};

class Event;

// A queue of work. Destroying it lets work that it holds finish.
class Stream {
 public:
  Stream();
  cudaStream_t get() const { return handle_.get(); }
  void wait(const Event& event) const;  // later work waits for what the event was recorded behind
  void synchronize() const;             // the host waits for all work so far

  // While one lives, launches, copies and fills on the stream do nothing: code that queues them
  // runs for what else it does, and a graph stands in for what it queues.
  class Muted {
   public:
    explicit Muted(Stream& stream) : stream_(stream) { stream_.muted_ = true; }
    ~Muted() { stream_.muted_ = false; }
    Muted(const Muted&) = delete;
    Muted& operator=(const Muted&) = delete;

   private:
    Stream& stream_;
  };
  bool muted() const { return muted_; }

 private:
  CudaHandle<cudaStream_t, cudaStreamDestroy> handle_;
  bool muted_ = false;
};

// A point in a stream. Waiting for one that was never recorded does not wait.
class Event {
 public:
  Event();
  cudaEvent_t get() const { return handle_.get(); }
  void record(const Stream& stream) const;
  void synchronize() const;  // the host waits
  bool done() const;         // does not wait

 private:
  CudaHandle<cudaEvent_t, cudaEventDestroy> handle_;
};

// Between two events that are done.
float milliseconds(const Event& from, const Event& to);

// Work recorded once and launched many times as a whole.
class Graph {
 public:
  Graph() = default;
  // record() queues work on `stream`, and on others that wait for an event of it and that it waits
  // for in the end; nothing runs. The work refers to buffers, which must outlive the graph. No
  // allocation and no synchronisation inside; copies from and to pinned memory only.
  template <class Record>
  Graph(const Stream& stream, const Record& record) {
    begin(stream);
    try {
      record();
    } catch (...) {
      abandon(stream);
      throw;
    }
    end(stream);
  }
  explicit operator bool() const { return exec_.get() != nullptr; }
  void launch(const Stream& stream) const;

 private:
  void begin(const Stream& stream);
  void end(const Stream& stream);
  static void abandon(const Stream& stream);
  CudaHandle<cudaGraphExec_t, cudaGraphExecDestroy> exec_;
};

enum class Memory { kDevice, kPinned };

// Used by Buffer. Null for 0 bytes. Throws Error with the bytes asked for, `what`, and the bytes
// that are free; running out of memory is not sticky.
void* allocate(Memory memory, std::size_t bytes, const char* what);
void release(Memory memory, void* data) noexcept;

// n elements in device memory, or in pinned host memory, which kernels may read and write at the
// same address. Not initialised. Freeing device memory waits for the device.
template <class T, Memory kMemory>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Buffer() = default;
  Buffer(std::size_t n, const char* what)
      : data_(static_cast<T*>(allocate(kMemory, n * sizeof(T), what))), size_(n) {}
  ~Buffer() { release(kMemory, data_); }
  Buffer(Buffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_), std::swap(size_, other.size_);
    return *this;
  }
  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t bytes() const { return size_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};
template <class T>
using DeviceBuffer = Buffer<T, Memory::kDevice>;
template <class T>
using PinnedBuffer = Buffer<T, Memory::kPinned>;

// Used by the copies below.
void copy_bytes(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                const Stream& stream);

// Copies of n elements, in stream order. From and to pinned memory they are asynchronous: the host
// must not touch it before the stream is past the copy. Other host memory is read before the call
// returns, or written before it returns, which waits for the stream.
template <class T>
void copy_to_device(T* device, const T* host, std::size_t n, const Stream& stream) {
  copy_bytes(device, host, n * sizeof(T), cudaMemcpyHostToDevice, stream);
}
template <class T>
void copy_to_host(T* host, const T* device, std::size_t n, const Stream& stream) {
  copy_bytes(host, device, n * sizeof(T), cudaMemcpyDeviceToHost, stream);
}
template <class T>
void copy_on_device(T* to, const T* from, std::size_t n, const Stream& stream) {
  copy_bytes(to, from, n * sizeof(T), cudaMemcpyDeviceToDevice, stream);
}
// Every one of `bytes` bytes of device memory becomes `byte`.
void fill_device(void* device, int byte, std::size_t bytes, const Stream& stream);

// Grid, block and shared memory of a launch, in the form that the runtime takes.
class LaunchConfig {
 public:
  LaunchConfig(dim3 grid, dim3 block, std::size_t shared_bytes, const Stream& stream, bool overlap);
  LaunchConfig(const LaunchConfig&) = delete;
  LaunchConfig& operator=(const LaunchConfig&) = delete;
  const cudaLaunchConfig_t* get() const { return &config_; }
  // What a kernel must be told before it may use more than 48 KiB of dynamic shared memory.
  void allow_shared(const void* kernel, const char* name) const;
  void check(cudaError_t result, const char* name) const;  // names the shape as well

 private:
  cudaLaunchConfig_t config_ = {};
  cudaLaunchAttribute overlap_ = {};
};

template <class... Params, class... Args>
void launch_with(const LaunchConfig& config, const char* name, void (*kernel)(Params...),
                 Args&&... args) {
  const ProfileRange range(name);
  config.allow_shared(reinterpret_cast<const void*>(kernel), name);
  config.check(cudaLaunchKernelEx(config.get(), kernel, std::forward<Args>(args)...), name);
}

// kernel<<<grid, block, shared_bytes, stream>>>(args...), under a name that profiles and errors
// show.
template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
            std::size_t shared_bytes, const Stream& stream, Args&&... args) {
  if (stream.muted()) return;
  launch_with(LaunchConfig(grid, block, shared_bytes, stream, false), name, kernel,
              std::forward<Args>(args)...);
}

// The same, but the kernel may start before the previous one on the stream is done (programmatic
// dependent launch, where the device has it). Every block of it must call
// wait_for_previous_kernel() (device/kernel.cuh) before it touches what earlier work on the stream
// writes, and before it writes what that reads.
template <class... Params, class... Args>
void launch_overlapping(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block,
                        std::size_t shared_bytes, const Stream& stream, Args&&... args) {
  if (stream.muted()) return;
  launch_with(LaunchConfig(grid, block, shared_bytes, stream, true), name, kernel,
              std::forward<Args>(args)...);
}

}  // namespace thaw
