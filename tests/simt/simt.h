// The CUDA emulator: unchanged .cu files, compiled by g++ with tests/simt/include in front, run on
// the CPU and are watched while they do.
//
// Device. Each CUDA thread is a fiber (fiber.h). A block's fibers take turns between barriers, in a
// seeded order; blocks run one after another, in a seeded order (block.h). Nothing waits for
// another block: kernels that spin until one has come by never end. Shared memory and device memory
// that nobody wrote holds NaN. Ends the process with a message that names kernel, block and thread:
// a barrier or a warp operation that not all its threads reach, asynchronous copies never waited
// for, a host pointer as a kernel's argument.
//
// Host. Device memory can be touched only while kernels and copies run; ends of allocations are
// guarded (memory.h). Work is queued, and done only when the host waits for something, in a seeded
// order that streams and events allow (runtime.cpp): a wait that is missing shows as different
// bits for some seed. What is not freed when the process ends is an error.
//
// Under AddressSanitizer accesses beyond shared arrays and buffers are found to the byte. Under
// ThreadSanitizer each CUDA thread, and each stream, is a thread of its own, ordered by what CUDA
// promises and nothing else: a missing barrier, fence or event is a data race. Host code without
// kernels is not instrumented: what it reads too early is found by its results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace simt {

// False where tests run on a device (tests/simt/on_device.cu): all else here is then of no use.
bool emulated();

// Restarts every random choice. At first the seed is that of the environment's THAW_SIMT_SEED,
// or 1.
void set_seed(std::uint64_t seed);

// How much device memory there is, 1 GiB at first.
void set_memory(std::size_t bytes);

// Whether the device says that it can read plain host memory; at first it cannot.
void set_plain_memory(bool readable);

// The n-th call of the runtime from now (1: the next) fails; 0: none. Calls that release do not
// count. Returns how many calls there were since the last fail_call.
int fail_call(int n);

// What ran, by the name of the launch, "copy to device", "copy to host", "copy on device", "fill".
struct Count {
  std::int64_t runs = 0;
  std::int64_t bytes = 0;  // of copies and fills; of kernels, what they told count_bytes()
};
std::map<std::string, Count>& counts();

}  // namespace simt
