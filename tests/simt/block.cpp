#include "tests/simt/block.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <semaphore>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "device/half.h"
#include "tests/simt/fiber.h"
#include "tests/simt/include/simt/device.h"
#include "tests/simt/memory.h"
#include "tests/simt/sanitizers.h"
#include "tests/simt/simt.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr std::size_t kMaxShared = 232448;  // dynamic, of a block
// Blocks that race must not share identities: consecutive blocks run on different ones of these.
constexpr int kMultiprocessors = kRace ? 3 : 1;

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
  const std::uint32_t *a = nullptr, *b = nullptr;
  char clocks[2] = {};      // released before __syncwarp, by turns
  unsigned turn = 0;        // the one of the last
  unsigned lane_turns = 0;  // and of each lane of its warp

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

Multiprocessor* multiprocessors[kMultiprocessors];
Multiprocessor* active = nullptr;  // the one whose fibers run

void push(int thread) {
  Multiprocessor& m = *active;
  m.fibers[thread]->state = State::kReady;
  m.queue[(m.first + m.queued++) % kMaxThreads] = thread;
}

// A thread that can never be woken, and one that it waits for.
[[noreturn]] void report_deadlock() {
  Multiprocessor& m = *active;
  const auto name = [](Exchange what) {
    return what == Exchange::kSync ? "__syncwarp" : "warp operation";
  };
  for (int i = 0; i < m.n_threads; ++i) {
    const Fiber& f = *m.fibers[i];
    if (f.state != State::kInExchange) continue;
    m.current = m.fibers[i].get();
    for (int lane = 0; lane < kWarp; ++lane) {
      const int other = i / kWarp * kWarp + lane;
      if ((f.mask >> lane & 1u) == 0) continue;
      const char* why = nullptr;
      if (other >= m.n_threads)
        why = "does not exist";
      else if (m.fibers[other]->state == State::kEnded)
        why = "has ended";
      else if (m.fibers[other]->state == State::kAtBarrier)
        why = "waits at a barrier";
      else if (m.fibers[other]->mask != f.mask || m.fibers[other]->what != f.what ||
               m.fibers[other]->where.line() != f.where.line())
        why = "waits in another operation or with another mask";
      if (why != nullptr)
        fatal("%s at %s:%u never completes: lane %d %s", name(f.what), f.where.file_name(),
              f.where.line(), lane, why);
    }
  }
  for (int i = 0; i < m.n_threads; ++i) {
    if (m.fibers[i]->state != State::kAtBarrier) continue;
    m.current = m.fibers[i].get();
    const auto ended = std::find_if(m.fibers.begin(), m.fibers.begin() + m.n_threads,
                                    [](const auto& f) { return f->state == State::kEnded; });
    fatal("__syncthreads at %s:%u never completes: thread %d has ended",
          m.fibers[i]->where.file_name(), m.fibers[i]->where.line(), (*ended)->thread);
  }
  fatal("deadlock");
}

void enter(Fiber& f) {
  Multiprocessor& m = *active;
  m.current = &f;
  const unsigned t = static_cast<unsigned>(f.thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}

// Leaves the current fiber for the next that is ready; returns when the current one is again.
void suspend() {
  Multiprocessor& m = *active;
  if (m.queued == 0) report_deadlock();
  Fiber& from = *m.current;
  Fiber& to = *m.fibers[m.queue[m.first]];
  m.first = (m.first + 1) % kMaxThreads, --m.queued;
  if (&from == &to) return;
  enter(to);
  switch_to(from.context, to.context);
}

// The life of a fiber: one thread a block.
void fiber_main() {
  Multiprocessor& m = *active;
  arrived(m.scheduler);
  for (;;) {
    Fiber& f = *active->current;
    const int parity = m.n_blocks % 2;
    acquire(m.launch->overlaps ? m.launch->queued : &m.launch->begun);
    acquire(&m.block_clocks[1 - parity]);  // shared memory is free
    m.launch->body();
    if (!f.copies.empty()) fatal("asynchronous copies were begun and never waited for");
    release(&m.launch->ended);
    release(&m.block_clocks[parity]);
    f.state = State::kEnded;
    if (++m.n_ended < m.n_threads) {
      suspend();
    } else {
      switch_to(f.context, m.scheduler);
    }
  }
}

Multiprocessor::Multiprocessor() {
  void* mapping =
      mmap(nullptr, kMaxShared + 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) fatal("no memory for shared memory");
  dynamic_end = static_cast<char*>(mapping) + (kMaxShared + 4095) / 4096 * 4096;
  mprotect(dynamic_end, 4096, PROT_NONE);
  poison(dynamic_end, 4096);
  std::thread([this] { serve(); }).detach();
}

void Multiprocessor::serve() {
  for (;;) {
    go.acquire();
    for (int i = static_cast<int>(fibers.size()); i < n_threads; ++i) {
      fibers.push_back(std::make_unique<Fiber>());
      fibers.back()->thread = i;
      prepare(fibers.back()->context, fiber_main);
    }
    order.resize(n_threads);
    std::iota(order.begin(), order.end(), 0);
    for (const unsigned block : blocks) {
      blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
      run_block();
    }
    done.release();
  }
}

// Shared memory holds NaN when a block begins.
void Multiprocessor::reset_shared() {
  const std::size_t bytes = (launch->shared_bytes + 127) / 128 * 128;
  unpoison(dynamic_end - kMaxShared, kMaxShared);
  std::memset(dynamic_end - bytes, 0xff, bytes);
  poison(dynamic_end - kMaxShared, kMaxShared - bytes);
  poison(dynamic_end - bytes + launch->shared_bytes, bytes - launch->shared_bytes);
  if (kAddress) return;                                           // __shared__ is static there
  const auto fill = [](dl_phdr_info* info, std::size_t, void*) {  // called for the program first
    for (int i = 0; i < info->dlpi_phnum; ++i)
      if (info->dlpi_phdr[i].p_type == PT_TLS && info->dlpi_tls_data != nullptr)
        std::memset(info->dlpi_tls_data, 0xff, info->dlpi_phdr[i].p_memsz);
    return 1;
  };
  dl_iterate_phdr(fill, nullptr);
}

void Multiprocessor::run_block() {
  active = this;
  ++n_blocks;
  char* free_clock = &block_clocks[1 - n_blocks % 2];
  acquire(free_clock);
  reset_shared();
  release(free_clock);
  waited = false;
  n_ended = n_at_barrier = first = queued = sum = 0;
  for (int i = n_threads - 1; i > 0; --i) std::swap(order[i], order[random().below(i + 1)]);
  for (const int thread : order) push(thread);
  Fiber& to = *fibers[queue[0]];
  first = 1, --queued;
  enter(to);
  switch_to(scheduler, to.context);
  if (launch->overlaps && !waited)
    fatal("launched to overlap, but no thread of the block called wait_for_previous_kernel()");
  current = nullptr;
  active = nullptr;
}

Fiber& checked_lane(unsigned mask, Where where) {
  Fiber& f = *active->current;
  if ((mask >> lane() & 1u) == 0)
    fatal("%s:%u: lane %d is not in its own mask %08x", where.file_name(), where.line(), lane(),
          mask);
  f.mask = mask, f.where = where;
  return f;
}

std::int64_t join(Exchange what, std::int64_t x, std::int64_t y) {
  switch (what) {
    case Exchange::kAdd:
      return x + y;
    case Exchange::kMin:
      return std::min(x, y);
    case Exchange::kMax:
      return std::max(x, y);
    case Exchange::kAnd:
      return x & y;
    case Exchange::kXor:
      return x ^ y;
    default:
      return x | y;
  }
}

// d += A B^T of the warp's fragments, in the order of k; see device/kernel.cuh for who holds what.
void multiply(const std::unique_ptr<Fiber>* lanes, bool bf16) {
  const auto number = [&](std::uint32_t pair, int which) {
    const auto bits = static_cast<std::uint16_t>(pair >> 16 * which);
    return bf16 ? thaw::bf16_to_f32(bits) : thaw::f16_to_f32(bits);
  };
  float a[16][16], b[8][16];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 8; ++i) {
      const int c = 2 * t + i % 2;
      a[g + i / 2 % 2 * 8][c + i / 4 * 8] = number(lanes[lane]->a[i / 2], i % 2);
      if (i < 4) b[g][c + i / 2 * 8] = number(lanes[lane]->b[i / 2], i % 2);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
      for (int k = 0; k < 16; ++k) lanes[lane]->product[i] += a[row][k] * b[col][k];
    }
  }
}

// Every lane of the mask is here: gives each its result.
void complete(const std::unique_ptr<Fiber>* lanes, const Fiber& last) {
  std::int64_t joined = 0;
  unsigned turns = 0;
  bool any = false;
  for (int i = 0; i < kWarp; ++i) {
    if ((last.mask >> i & 1u) == 0) continue;
    turns |= lanes[i]->turn << i;
    const std::int64_t value =
        last.what == Exchange::kBallot ? lanes[i]->value << i : lanes[i]->value;
    joined = any ? join(last.what, joined, value) : value;
    any = true;
  }
  for (int i = 0; i < kWarp; ++i) {
    if ((last.mask >> i & 1u) == 0) continue;
    lanes[i]->result = joined;
    lanes[i]->lane_turns = turns;
    if (last.what != Exchange::kShuffle) continue;
    const int source = lanes[i]->argument;
    if ((last.mask >> source & 1u) == 0)
      fatal("shuffle at %s:%u: lane %d reads lane %d, which is not in the mask %08x",
            last.where.file_name(), last.where.line(), i, source, last.mask);
    lanes[i]->result = lanes[source]->value;
  }
  if (last.what == Exchange::kMultiply) multiply(lanes, last.argument != 0);
}

}  // namespace

int lane() { return active->current->thread % kWarp; }

std::int64_t exchange(Exchange what, unsigned mask, std::int64_t value, int argument, Where where) {
  Fiber& f = checked_lane(mask, where);
  f.what = what, f.value = value, f.argument = argument;
  if (what == Exchange::kSync) release(&f.clocks[f.turn ^= 1u]);
  const int first = f.thread - lane();
  const std::unique_ptr<Fiber>* lanes = &active->fibers[first];
  f.state = State::kInExchange;
  bool all = true;
  for (int i = 0; i < kWarp && all; ++i) {
    if ((mask >> i & 1u) == 0) continue;
    all = first + i < active->n_threads && lanes[i]->state == State::kInExchange &&
          lanes[i]->mask == mask && lanes[i]->what == what &&
          lanes[i]->where.line() == where.line();
  }
  if (all) {
    complete(lanes, f);
    const int start = random().below(kWarp);
    for (int i = 0; i < kWarp; ++i) {
      const int next = (start + i) % kWarp;
      if (mask >> next & 1u) push(first + next);
    }
  }
  suspend();
  if (what == Exchange::kSync)  // no other exchange orders memory
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1u) acquire(&lanes[i]->clocks[f.lane_turns >> i & 1u]);
  return f.result;
}

void mma(float* d, const std::uint32_t* a, const std::uint32_t* b, bool bf16, Where where) {
  Fiber& f = *active->current;
  f.product = d, f.a = a, f.b = b;
  exchange(Exchange::kMultiply, 0xffffffffu, 0, bf16, where);
}

int barrier_sum(int value, Where where) {
  Multiprocessor& m = *active;
  Fiber& f = *m.current;
  for (int i = 0; m.n_at_barrier > 0 && i < m.n_threads; ++i) {
    const Fiber& other = *m.fibers[i];
    if (other.state == State::kAtBarrier && other.where.line() != where.line())
      fatal("divergent __syncthreads: this thread is at %s:%u, thread %d at %s:%u",
            where.file_name(), where.line(), i, other.where.file_name(), other.where.line());
    if (other.state == State::kAtBarrier) break;
  }
  // By turns: with one clock a fast thread's next arrival would order what a slow one did before.
  char* clock = &m.barrier_clocks[m.n_barriers % 2];
  release(clock);
  f.where = where, f.state = State::kAtBarrier;
  m.sum += value;
  if (++m.n_at_barrier == m.n_threads) {
    m.last_sum = std::exchange(m.sum, 0);
    m.n_at_barrier = 0, ++m.n_barriers;
    for (const int thread : m.order) push(thread);
  }
  suspend();
  acquire(clock);
  return m.last_sum;
}

void barrier(Where where) { barrier_sum(0, where); }

void pause() {
  push(active->current->thread);
  suspend();
}

void* dynamic_shared() {
  return active->dynamic_end - (active->launch->shared_bytes + 127) / 128 * 128;
}

void cp_async_16(void* shared, const void* global, bool valid) {
  Fiber& f = *active->current;
  if (valid) count_bytes(16);
  f.copies.push_back({shared, valid ? global : nullptr, f.group});
}
void cp_async_commit() { ++active->current->group; }
bool next_landing(int pending, Landing& landing) {
  Fiber& f = *active->current;
  if (f.copies.empty() || f.copies.front().group >= f.group - pending) return false;
  landing = f.copies.front();
  f.copies.erase(f.copies.begin());
  return true;
}

void wait_for_previous_kernel() {
  active->waited = true;
  acquire(&active->launch->begun);
}

void count_bytes(std::int64_t bytes) { active->launch->bytes += bytes; }

#ifdef SIMT_RACE
void before_atomic(void* at) {
  if (active != nullptr && active->current->fenced) release(at);
}
void after_atomic(void* at) {
  if (active != nullptr) active->current->atomics.push_back(at);
}
void fence() {
  Fiber& f = *active->current;
  f.fenced = true;
  for (void* at : f.atomics) acquire(at);
  f.atomics.clear();
}
#endif

const Launch* running() { return active == nullptr ? nullptr : active->launch; }

const char* describe_running() {
  static char text[200];  // it may be asked for by a signal handler
  text[0] = 0;
  if (active != nullptr)
    std::snprintf(text, sizeof text, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ",
                  active->launch->name.c_str(), blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x,
                  threadIdx.y, threadIdx.z);
  return text;
}

Random& random() {
  static Random source = {[] {
    const char* seed = std::getenv("THAW_SIMT_SEED");
    return seed == nullptr ? 1 : std::strtoull(seed, nullptr, 10);
  }()};
  return source;
}
void set_seed(std::uint64_t seed) { random().state = seed; }

void start_device() {
  for (Multiprocessor*& m : multiprocessors)
    if (m == nullptr) m = new Multiprocessor;
}

void run(Launch& launch) {
  static int last = 0;
  gridDim = launch.grid, blockDim = launch.block;
  std::vector<unsigned> blocks(launch.grid.x * launch.grid.y * launch.grid.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  for (int i = static_cast<int>(blocks.size()) - 1; i > 0; --i)
    std::swap(blocks[i], blocks[random().below(i + 1)]);
  const std::size_t share = kMultiprocessors == 1 ? blocks.size() : 1;
  for (std::size_t i = 0; i < blocks.size(); i += share) {
    if (kMultiprocessors > 1)
      last = (last + 1 + random().below(kMultiprocessors - 1)) % kMultiprocessors;
    Multiprocessor& m = *multiprocessors[last];
    m.launch = &launch, m.blocks = {&blocks[i], share};
    m.n_threads = static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    m.go.release();
    m.done.acquire();
  }
}

}  // namespace simt
