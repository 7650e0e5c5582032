// What this machine's memory gives: the bound of everything that streams weights.
#pragma once

#include <cstdint>
#include <vector>

#include "device/thread_pool.h"

namespace thaw {

// GB/s (1e9 bytes) of the pool's threads that read a buffer larger than the caches: the best of
// five passes. Takes about 0.2 s and 256 MB while it runs.
double measure_read_bandwidth(ThreadPool& pool);

// Reads so much else that the caches hold nothing of before: twice the last level, at least 64 MB.
class CacheFlusher {
 public:
  CacheFlusher();
  void flush(ThreadPool& pool);

 private:
  std::vector<std::uint64_t> buffer_;
  std::uint64_t sum_ = 0;  // so that no read can be left out
};

}  // namespace thaw
