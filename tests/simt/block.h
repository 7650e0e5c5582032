// Runs the blocks of a launch: fibers, barriers, exchanges between the lanes of a warp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#include "tests/simt/include/simt/types.h"

namespace simt {

struct Launch {
  std::string name;
  dim3 grid, block;
  std::size_t shared_bytes = 0;
  std::function<void()> body;  // the kernel with its arguments
  bool overlaps = false;       // launched so that it may start before earlier work is done
  // Clocks of ThreadSanitizer: when the host queued it, when all work before it was done, and when
  // it ended.
  const void* queued = nullptr;
  char begun = 0, ended = 0;
  std::int64_t bytes = 0;  // told by count_bytes()
};

void start_device();  // before anything is queued: its threads begin with the host's clock
void run(Launch& launch);

const Launch* running();         // null outside kernels
const char* describe_running();  // "kernel NAME, block (x, y, z), thread (x, y, z): ", or ""

// splitmix64.
struct Random {
  std::uint64_t state;
  std::uint64_t next() {
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  int below(int n) { return static_cast<int>(next() % static_cast<std::uint64_t>(n)); }
};
Random& random();  // the source of every choice; see set_seed()

}  // namespace simt
