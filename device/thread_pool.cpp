#include "device/thread_pool.h"

#include <algorithm>
#include <cstdlib>
#include <iostream>
#include <new>
#include <system_error>

#include "device/error.h"

namespace thaw {
namespace {

constexpr int kSpins = 1500;          // looks at memory before giving the core away: some 50 us
constexpr std::uint32_t kShares = 4;  // a thread takes its part of what is left in so many turns
constexpr std::uint32_t kClosed = 0xffffffff;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

std::uint32_t first_of(int part, int n_parts, std::uint32_t n_tasks) {
  return static_cast<std::uint32_t>(std::uint64_t{n_tasks} * static_cast<unsigned>(part) /
                                    static_cast<unsigned>(n_parts));
}

// Waits for others until done().
template <class Done>
void wait_until(const Done& done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < kSpins) {
      pause();
    } else {
      std::this_thread::yield();  // to the thread that is waited for, if it waits for this core
    }
  }
}

}  // namespace

void Claims::start(int n) {
  const int n_parts = static_cast<int>(parts_.size());
  for (int part = 0; part < n_parts; ++part) {
    Part& p = parts_[static_cast<std::size_t>(part)];
    p.next.store(static_cast<int>(first_of(part, n_parts, static_cast<std::uint32_t>(n))),
                 std::memory_order_relaxed);
    p.end = static_cast<int>(first_of(part + 1, n_parts, static_cast<std::uint32_t>(n)));
  }
}

int Claims::claim(int thread) {
  const std::size_t n_parts = parts_.size();
  for (std::size_t i = 0; i < n_parts; ++i) {
    Part& p = parts_[(static_cast<std::size_t>(thread) + i) % n_parts];
    if (p.next.load(std::memory_order_relaxed) >= p.end) continue;
    const int claimed = p.next.fetch_add(1, std::memory_order_relaxed);
    if (claimed < p.end) return claimed;
  }
  fail("threads: expected something that is not claimed yet, found nothing");
}

void Flag::wait() const {
  wait_until([this] { return set_.load(std::memory_order_acquire); });
}

ThreadPool::ThreadPool(int n_threads) : parts_(static_cast<std::size_t>(std::max(n_threads, 0))) {
  require(n_threads >= 1, "threads: expected at least 1, found ", n_threads);
  try {
    for (int thread = 1; thread < n_threads; ++thread)
      workers_.emplace_back(&ThreadPool::work, this, thread);
  } catch (const std::system_error& error) {
    const std::size_t started = workers_.size() + 1;
    stop();
    fail("threads: expected ", n_threads, ", the system gave ", started, ": ", error.what());
  }
}

ThreadPool::~ThreadPool() { stop(); }

void ThreadPool::stop() {
  stopping_ = true;
  ++loop_;
  loop_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

// A release is what the acquire of the same atomic sees, and all before it: who reads a field of a
// new loop cannot take a ticket of the last one.
void ThreadPool::start(std::uint32_t n_tasks, int n_parts, Call call, const void* body) {
  const std::uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  const std::uint64_t ticket = std::uint64_t{loop} << 32;
  // From here on no ticket of the last loop can be taken.
  for (Part& part : parts_) part.ticket.store(ticket | kClosed, std::memory_order_release);
  n_tasks_.store(n_tasks, std::memory_order_release);
  n_parts_.store(n_parts, std::memory_order_release);
  call_.store(call, std::memory_order_release);
  body_.store(body, std::memory_order_release);
  done_.store(0, std::memory_order_relaxed);
  // Open: whoever reads this reads the five stores above.
  for (int part = 0; part < n_parts; ++part)
    parts_[static_cast<std::size_t>(part)].ticket.store(ticket | first_of(part, n_parts, n_tasks),
                                                        std::memory_order_release);
  loop_.store(loop);
  loop_.notify_all();
  take_tasks(0);
  wait_until([this, n_tasks] { return done_.load(std::memory_order_acquire) == n_tasks; });
}

void ThreadPool::end_process(const std::exception& error) {
  const bool memory = dynamic_cast<const std::bad_alloc*>(&error) != nullptr;
  std::cerr << "thaw: " << (memory ? "out of memory" : one_line(error.what())) << std::endl;
  std::_Exit(1);
}

void ThreadPool::take_tasks(int thread) {
  const int n_parts = n_parts_.load(std::memory_order_acquire);
  for (int i = 0; i < n_parts; ++i) take_from((thread + i) % n_parts, thread);
}

// Takes tasks of a part while there are any, several at a time while many are left that all threads
// take: threads that count in turns wait for each other's cache line. So they say once what they
// have done; until then the loop cannot end.
void ThreadPool::take_from(int part, int thread) {
  std::atomic<std::uint64_t>& ticket = parts_[static_cast<std::size_t>(part)].ticket;
  std::uint32_t n_done = 0;
  for (;;) {
    std::uint64_t found = ticket.load(std::memory_order_acquire);
    const std::uint32_t task = static_cast<std::uint32_t>(found);
    const std::uint32_t n_tasks = n_tasks_.load(std::memory_order_acquire);
    const int n_parts = n_parts_.load(std::memory_order_acquire);
    const Call call = call_.load(std::memory_order_acquire);
    const void* body = body_.load(std::memory_order_acquire);
    const std::uint32_t end = first_of(part + 1, n_parts, n_tasks);
    if (task >= end) break;
    const std::uint32_t share = kShares * static_cast<std::uint32_t>(size());
    const std::uint32_t n = n_parts > 1 ? 1 : std::max(1u, (end - task) / share);
    // It fails where somebody else takes the task, or the loop is over.
    if (!ticket.compare_exchange_weak(found, found + n, std::memory_order_acq_rel)) continue;
    for (std::uint32_t i = task; i < task + n; ++i) call(body, i, thread);
    n_done += n;
  }
  if (n_done > 0) done_.fetch_add(n_done, std::memory_order_release);
}

void ThreadPool::work(int thread) {
  std::uint32_t seen = 0;
  while (!stopping_) {
    for (int spins = 0; spins < kSpins && loop_.load(std::memory_order_acquire) == seen; ++spins)
      pause();
    loop_.wait(seen);  // returns at once when it has changed
    seen = loop_.load();
    take_tasks(thread);
  }
}

}  // namespace thaw
