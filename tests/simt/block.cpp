#include "tests/simt/block.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "tests/simt/memory.h"
#include "tests/simt/multiprocessor.h"
#include "tests/simt/simt.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {

Multiprocessor* active = nullptr;

namespace {

Multiprocessor* multiprocessors[kMultiprocessors];

void enter(Fiber& f) {
  Multiprocessor& m = *active;
  m.current = &f;
  const unsigned t = static_cast<unsigned>(f.thread);
  threadIdx = {t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y};
}

// Why `other` will never join the exchange that f waits in; null: it has.
const char* obstacle(const Fiber& f, int other) {
  if (other >= active->n_threads) return "does not exist";
  const Fiber& o = *active->fibers[other];
  if (o.state == State::kEnded) return "has ended";
  if (o.state == State::kAtBarrier) return "waits at a barrier";
  const bool same = o.mask == f.mask && o.what == f.what && o.where.line() == f.where.line();
  return same ? nullptr : "waits in another operation or with another mask";
}

// Names a thread that can never be woken, and one that it waits for.
[[noreturn]] void report_deadlock() {
  Multiprocessor& m = *active;
  for (int i = 0; i < m.n_threads; ++i) {
    const Fiber& f = *m.fibers[i];
    for (int lane = 0; f.state == State::kInExchange && lane < kWarp; ++lane) {
      if ((f.mask >> lane & 1u) == 0) continue;
      const char* why = obstacle(f, i / kWarp * kWarp + lane);
      if (why == nullptr) continue;
      enter(*m.fibers[i]);
      fatal("%s at %s:%u never completes: lane %d %s",
            f.what == Exchange::kSync ? "__syncwarp" : "warp operation", f.where.file_name(),
            f.where.line(), lane, why);
    }
  }
  int waiting = 0,
      ended = 0;  // no exchange is to blame: some thread is at the barrier, some is not
  for (int i = 0; i < m.n_threads; ++i)
    (m.fibers[i]->state == State::kAtBarrier ? waiting : ended) = i;
  enter(*m.fibers[waiting]);
  const Where& where = m.current->where;
  fatal("__syncthreads at %s:%u never completes: thread %d has ended", where.file_name(),
        where.line(), ended);
}

// The life of a fiber: one thread a block.
void fiber_main() {
  Multiprocessor& m = *active;
  arrived(m.scheduler);
  for (;;) {
    Fiber& f = *m.current;
    f.fenced = false, f.atomics.clear();
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

}  // namespace

void push(int thread) {
  Multiprocessor& m = *active;
  m.fibers[thread]->state = State::kReady;
  m.queue[(m.first + m.queued++) % kMaxThreads] = thread;
}

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

namespace {

// Until all threads are there; returns the sum of their values.
int join_barrier(int value, Where where, bool orders) {
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
  if (orders) release(clock);
  f.where = where, f.state = State::kAtBarrier;
  m.sum += value;
  if (++m.n_at_barrier == m.n_threads) {
    m.last_sum = std::exchange(m.sum, 0);
    m.n_at_barrier = 0, ++m.n_barriers;
    for (const int thread : m.order) push(thread);
  }
  suspend();
  if (orders) acquire(clock);
  return m.last_sum;
}

}  // namespace

// Without its sum a kernel would be another: where it is skipped it still counts.
int barrier_sum(int value, Where where) { return join_barrier(value, where, !skipped(where)); }
void barrier(Where where) {
  if (!skipped(where)) join_barrier(0, where, true);
}

void pause() {
  push(active->current->thread);
  suspend();
}

void* dynamic_shared() {
  return active->dynamic_end - (active->launch->shared_bytes + 127) / 128 * 128;
}

void begin_copy(void* shared, const void* global, bool valid) {
  Fiber& f = *active->current;
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

void wait_for_previous_kernel(Where where) {
  if (skipped(where)) return;
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
