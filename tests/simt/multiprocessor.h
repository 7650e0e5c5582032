// What runs a block: a fiber a thread, and the state that they share.
#pragma once

#include <cstdint>
#include <memory>
#include <semaphore>
#include <span>
#include <vector>

#include "tests/simt/block.h"
#include "tests/simt/fiber.h"
#include "tests/simt/include/simt/device.h"
#include "tests/simt/sanitizers.h"

namespace simt {

inline constexpr int kWarp = 32;
inline constexpr int kMaxThreads = 1024;
inline constexpr std::size_t kMaxShared = 232448;  // dynamic, of a block
// Blocks that race must not share identities: consecutive blocks run on different ones of these.
inline constexpr int kMultiprocessors = kRace ? 3 : 1;

enum class State : char { kEnded, kReady, kAtBarrier, kInExchange };

struct Fiber {
  Context context;
  State state = State::kEnded;
  int thread = 0;
  Where where;  // of the barrier or exchange that it waits in

  Exchange what = {};  // the exchange, what it brought, and what it gets
  unsigned mask = 0;
  std::int64_t value = 0, result = 0;
  int argument = 0;
  float* product = nullptr;  // mma: d, a and b of this lane
  int* dots = nullptr;       // d, where a and b are of 8-bit integers
  const std::uint32_t *a = nullptr, *b = nullptr;
  char arrived = 0;          // a clock, released before __syncwarp
  char joined[2] = {};       // clocks of all its lanes, where this one was the last, by turns
  unsigned turn = 0;         // the one of the last
  char* complete = nullptr;  // the clock that this one waits for

  std::vector<Landing> copies;  // asynchronous, oldest first
  int group = 0;                // number of commits
  bool fenced = false;          // has passed a fence
  std::vector<void*> atomics;   // seen since the last fence
};

// A multiprocessor runs one block at a time. It is a thread of the system, whose thread-local
// storage is the shared memory.
struct Multiprocessor {
  Multiprocessor();
  void serve();  // the thread's body: runs `blocks` of `launch` between go and done
  void run_block();
  void reset_shared();

  std::counting_semaphore<> go{0}, done{0};
  Launch* launch = nullptr;
  std::span<const unsigned> blocks;  // to run, in this order

  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  Fiber* current = nullptr;
  std::vector<int> order;  // of the block's threads

  int queue[kMaxThreads] = {};  // a ring of threads that are ready
  int first = 0, queued = 0;

  int n_threads = 0, n_ended = 0, n_at_barrier = 0;
  int sum = 0, last_sum = 0;  // of barrier_sum
  int n_barriers = 0, n_blocks = 0;
  char barrier_clocks[2] = {}, block_clocks[2] = {};
  bool waited = false;  // some thread has called wait_for_previous_kernel

  char* dynamic_end = nullptr;  // the end of dynamic shared memory; a guard page follows
};

extern Multiprocessor* active;  // the one whose fibers run; null outside kernels

void push(int thread);  // it is ready
void suspend();         // leaves the current fiber for the next that is ready, until it is again

}  // namespace simt
