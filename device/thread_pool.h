// Threads that share loops of independent tasks, and wait for each other as little as can be.
//
// A decode step is some 150 loops of 50 microseconds. Whoever is awake takes the next task, and a
// loop ends when its tasks are done, not when every thread has come by: a thread that the system
// has put aside holds up nobody unless it holds a task. (OpenMP's barriers wait for every thread:
// with other work on the cores, decode on two threads measured five times slower than on one.)
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace thaw {

class ThreadPool {
 public:
  // The caller of run() is one of the threads; n_threads - 1 more are started. Throws Error when
  // the system refuses one.
  explicit ThreadPool(int n_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(task, thread) once for each task in [0, n_tasks), n_tasks < 2^32 - 1, and returns
  // when all have returned; thread is in [0, size()), and differs between calls that run at the
  // same time. body must not call run(). If it throws (out of memory), the process ends with one
  // line, as others may wait for its task. One caller at a time.
  // Tasks are begun in ascending order, so that one may wait for those before it.
  template <class Body>
  void run(std::int64_t n_tasks, const Body& body) {
    run_parts(n_tasks, 1, body);
  }

  // As run(), without that order: each thread goes through an equal part of the tasks, in order,
  // and then through what others have left of theirs. For tasks that read on in memory where the
  // one before stopped: what is fetched ahead of a task is what the same thread needs next.
  template <class Body>
  void run_streams(std::int64_t n_tasks, const Body& body) {
    run_parts(n_tasks, size(), body);
  }

 private:
  using Call = void (*)(const void* body, std::int64_t task, int thread);

  template <class Body>
  static void invoke(const void* body, std::int64_t task, int thread) {
    try {
      (*static_cast<const Body*>(body))(task, thread);
    } catch (const std::exception& error) {
      end_process(error);
    }
  }

  template <class Body>
  void run_parts(std::int64_t n_tasks, int n_parts, const Body& body) {
    if (size() == 1 || n_tasks <= 1) {
      for (std::int64_t task = 0; task < n_tasks; ++task) body(task, 0);
      return;
    }
    start(static_cast<std::uint32_t>(n_tasks), n_parts, &invoke<Body>, &body);
  }

  // The loop in the high half, the part's next task in the low one: a task is taken by counting
  // this up, which fails once the loop is over.
  struct alignas(64) Part {
    std::atomic<std::uint64_t> ticket = 0;
  };

  [[noreturn]] static void end_process(const std::exception& error);
  void start(std::uint32_t n_tasks, int n_parts, Call call, const void* body);
  void take_tasks(int thread);
  void take_from(int part, int thread);
  void work(int thread);
  void stop();

  std::vector<Part> parts_;  // one a thread; run() uses the first
  std::vector<std::thread> workers_;
  std::atomic<bool> stopping_ = false;
  // How many loops were started; workers wait for a change, and would slow down writes beside it.
  alignas(64) std::atomic<std::uint32_t> loop_ = 0;
  // The four below belong to the loop, and change while all parts are closed.
  alignas(64) std::atomic<std::uint32_t> n_tasks_ = 0;
  std::atomic<int> n_parts_ = 0;
  std::atomic<Call> call_ = nullptr;
  std::atomic<const void*> body_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> done_ = 0;  // tasks of the loop that have returned
};

// Numbers that a loop's tasks take one each, as run_streams() gives out tasks: a thread those of
// its own part in order, then what others have left. The parts are the same in each loop, so that
// what a thread has written last it also writes next, with no other core to ask for it.
class Claims {
 public:
  explicit Claims(int n_threads) : parts_(static_cast<std::size_t>(n_threads)) {}
  void start(int n);
  int claim(int thread);  // of [0, n), n that of start(); Error when all are taken

 private:
  struct alignas(64) Part {
    std::atomic<int> next = 0;
    int end = 0;
  };
  std::vector<Part> parts_;
};

// What tasks of a loop wait for: one other, which does not wait for its writes to reach anybody.
class Flag {
 public:
  void clear() { set_.store(false, std::memory_order_relaxed); }
  void set() { set_.store(true, std::memory_order_release); }
  void wait() const;  // and sees what was written before set()

 private:
  std::atomic<bool> set_ = false;
};

// Tells the last of so many tasks that it is.
class Countdown {
 public:
  void start(int n) { left_.store(n, std::memory_order_relaxed); }
  // Whether this was the last, which sees what was written before.
  bool arrive() { return left_.fetch_sub(1, std::memory_order_acq_rel) == 1; }

 private:
  std::atomic<int> left_ = 0;
};

}  // namespace thaw
