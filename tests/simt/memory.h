// The emulator's memories, and how it ends the process when something is wrong.
#pragma once

#include <cstddef>

namespace simt {

enum class Kind { kDevice, kPinned, kPageable };

// Filled with bytes 0xff, between pages that cannot be touched. Null when it does not fit.
void* allocate(Kind kind, std::size_t bytes);
void deallocate(void* data);  // ends the process if bytes behind it were written
std::size_t free_device_bytes();
std::size_t total_device_bytes();

// Of the allocation that holds all of [at, at + bytes); kPageable where there is none.
Kind kind_of(const void* at, std::size_t bytes);

// While it lives, device memory can be touched.
struct DeviceAccess {
  DeviceAccess();
  ~DeviceAccess();
};

// Prints "simt: " and the message, after the running kernel, block and thread, and ends the
// process.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fatal(const char* format, ...);

}  // namespace simt
