#include "device/thread_pool.h"

#include <algorithm>
#include <system_error>

#include "device/error.h"

namespace thaw {
namespace {

constexpr int kSpins = 10000;         // looks at memory before giving the core away: 0.1 to 0.4 ms
constexpr std::uint32_t kShares = 4;  // a thread takes its part of what is left in so many turns
constexpr std::uint32_t kClosed = 0xffffffff;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
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

void ThreadPool::start(std::uint32_t n_tasks, Call call, const void* body) {
  const std::uint32_t loop = loop_.load(std::memory_order_relaxed) + 1;
  const std::uint64_t ticket = std::uint64_t{loop} << 32;
  ticket_.store(ticket | kClosed);  // from here on no ticket of the last loop can be taken
  n_tasks_.store(n_tasks);
  call_.store(call);
  body_.store(body);
  done_.store(0);
  ticket_.store(ticket);  // open: whoever reads this reads the four stores above
  loop_.store(loop);
  loop_.notify_all();
  take_tasks(0);
  wait_until([this, n_tasks] { return done_.load(std::memory_order_acquire) == n_tasks; });
}

// Takes several tasks at a time while many are left: threads that count in turns wait for each
// other's cache line.
void ThreadPool::take_tasks(int thread) {
  for (;;) {
    std::uint64_t ticket = ticket_.load();
    const std::uint32_t task = static_cast<std::uint32_t>(ticket);
    const std::uint32_t n_tasks = n_tasks_.load();
    const Call call = call_.load();
    const void* body = body_.load();
    if (task >= n_tasks) return;
    const auto n = std::max(1u, (n_tasks - task) / (kShares * static_cast<std::uint32_t>(size())));
    if (!ticket_.compare_exchange_weak(ticket, ticket + n)) continue;  // taken, or the loop is over
    for (std::uint32_t i = task; i < task + n; ++i) call(body, i, thread);
    done_.fetch_add(n, std::memory_order_release);
  }
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
