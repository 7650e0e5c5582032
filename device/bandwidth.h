// What this machine's memory gives: the bound of everything that streams weights.
#pragma once

#include "device/thread_pool.h"

namespace thaw {

// GB/s (1e9 bytes) of the pool's threads that read a buffer larger than the caches: the best of
// five passes. Takes about 0.2 s and 256 MB while it runs.
double measure_read_bandwidth(ThreadPool& pool);

}  // namespace thaw
