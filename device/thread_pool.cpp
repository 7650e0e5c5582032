#include "device/thread_pool.h"

#include <algorithm>
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

void Countdown::wait() const {
  wait_until([this] { return left_.load(std::memory_order_acquire) == 0; });
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

void ThreadPool::start(std::uint32_t n_tasks, int n_parts, Call call, const void* body) {
  const std::uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  const std::uint64_t ticket = std::uint64_t{loop} << 32;
  // From here on no ticket of the last loop can be taken.
  for (Part& part : parts_) part.ticket.store(ticket | kClosed);
  n_tasks_.store(n_tasks);
  n_parts_.store(n_parts);
  call_.store(call);
  body_.store(body);
  done_.store(0);
  // Open: whoever reads this reads the five stores above.
  for (int part = 0; part < n_parts; ++part)
    parts_[static_cast<std::size_t>(part)].ticket.store(ticket | first_of(part, n_parts, n_tasks));
  loop_.store(loop);
  loop_.notify_all();
  take_tasks(0);
  wait_until([this, n_tasks] { return done_.load(std::memory_order_acquire) == n_tasks; });
}

void ThreadPool::take_tasks(int thread) {
  const int n_parts = n_parts_.load();
  for (int i = 0; i < n_parts; ++i)
    while (take_from((thread + i) % n_parts, thread)) {
    }
}

// Whether there may be more. Takes several tasks at a time while many are left that all threads
// take: threads that count in turns wait for each other's cache line.
bool ThreadPool::take_from(int part, int thread) {
  std::atomic<std::uint64_t>& ticket = parts_[static_cast<std::size_t>(part)].ticket;
  std::uint64_t found = ticket.load();
  const std::uint32_t task = static_cast<std::uint32_t>(found);
  const std::uint32_t n_tasks = n_tasks_.load();
  const int n_parts = n_parts_.load();
  const Call call = call_.load();
  const void* body = body_.load();
  const std::uint32_t end = first_of(part + 1, n_parts, n_tasks);
  if (task >= end) return false;
  const std::uint32_t share = kShares * static_cast<std::uint32_t>(size());
  const std::uint32_t n = n_parts > 1 ? 1 : std::max(1u, (end - task) / share);
  if (!ticket.compare_exchange_weak(found, found + n)) return true;  // taken, or the loop is over
  for (std::uint32_t i = task; i < task + n; ++i) call(body, i, thread);
  done_.fetch_add(n, std::memory_order_release);
  return true;
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
