#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <set>
#include <thread>
#include <vector>

#include "device/thread_pool.h"
#include "tests/error_of.h"
#include "tests/tiny_model.h"

using namespace thaw;

TEST_CASE("thread pool: every task runs once, before run returns, on a thread of the pool") {
  for (int n_threads : {1, 2, 3, 9}) {
    ThreadPool pool(n_threads);
    CHECK(pool.size() == n_threads);
    testing::Random random(31);
    for (int loop = 0; loop < 3000; ++loop) {
      const int n_tasks = random.below(40);
      std::vector<int> runs(40),
          threads(40);  // plain: a task that ran twice, or late, is a data race
      const auto body = [&](std::int64_t task, int thread) {
        ++runs[task], threads[task] = thread;
      };
      loop % 2 == 0 ? pool.run(n_tasks, body) : pool.run_streams(n_tasks, body);
      for (int task = 0; task < 40; ++task) {
        if (runs[task] != (task < n_tasks))
          FAIL("task " << task << " ran " << runs[task] << " times");
        if (threads[task] < 0 || threads[task] >= n_threads) FAIL("thread " << threads[task]);
      }
    }
  }
}

TEST_CASE("thread pool: threads share a loop, and two at a time never have the same number") {
  constexpr int kThreads = 4;
  ThreadPool pool(kThreads);
  std::atomic<int> busy[kThreads] = {}, arrived = 0;
  std::atomic<bool> shared_number = false;
  pool.run(kThreads, [&](std::int64_t, int thread) {
    if (busy[thread]++ > 0) shared_number = true;
    for (++arrived; arrived < kThreads;) std::this_thread::yield();  // ends only if all run at once
    --busy[thread];
  });
  CHECK(!shared_number);
}

TEST_CASE("thread pool: each streams through its part, and then helps one that is held up") {
  ThreadPool pool(2);
  std::vector<std::int64_t> order[2];
  std::atomic<int> done = 0;
  pool.run_streams(100, [&](std::int64_t task, int thread) {
    order[thread].push_back(task);
    while (task == 0 && done < 99) std::this_thread::yield();
    ++done;
  });
  REQUIRE(order[0].size() + order[1].size() == 100);
  REQUIRE(!order[0].empty());
  REQUIRE(!order[1].empty());
  CHECK(order[0][0] < 2);
  CHECK(order[1][0] == 50);
  for (auto& tasks : order) {
    const auto second = std::stable_partition(tasks.begin(), tasks.end(),
                                              [](std::int64_t task) { return task < 50; });
    CHECK(std::is_sorted(tasks.begin(), second));
    CHECK(std::is_sorted(second, tasks.end()));
  }
}

TEST_CASE("thread pool: workers that went to sleep are woken") {
  ThreadPool pool(2);
  for (int loop = 0; loop < 3; ++loop) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    std::atomic<int> arrived = 0;
    pool.run(2, [&](std::int64_t, int) {
      for (++arrived; arrived < 2;) std::this_thread::yield();
    });
    CHECK(arrived == 2);
  }
}

TEST_CASE("thread pool: tasks wait for those before them, and see what they wrote") {
  for (const int n_threads : {1, 2, 3, 9}) {
    ThreadPool pool(n_threads);
    for (int loop = 0; loop < 1000; ++loop) {
      constexpr int kParts = 6, kChains = 4;
      Countdown parts[kChains];
      Flag sums[kChains];
      for (Countdown& c : parts) c.start(kParts);
      for (Flag& f : sums) f.clear();
      int written[kChains * kParts] = {}, sum[kChains] = {}, read[kChains] = {};  // plain
      pool.run(kChains * (kParts + 1), [&](std::int64_t task, int) {
        const int i = static_cast<int>(task);
        if (i < kChains * kParts) {
          written[i] = i + 1;
          const int chain = i / kParts;
          if (!parts[chain].arrive()) return;  // the last one sees all
          for (int part = 0; part < kParts; ++part) sum[chain] += written[chain * kParts + part];
          sums[chain].set();
        } else {
          const int chain = i - kChains * kParts;
          sums[chain].wait();
          read[chain] = sum[chain];
        }
      });
      for (int chain = 0; chain < kChains; ++chain)
        if (read[chain] != kParts * kParts * chain + kParts * (kParts + 1) / 2)
          FAIL("chain " << chain << " read " << read[chain]);
    }
  }
}

TEST_CASE("thread pool: claims are a thread's own first, then what others have left, each once") {
  Claims claims(3);
  for (int loop = 0; loop < 2; ++loop) {
    claims.start(8);  // parts: 0 1, 2 3 4, 5 6 7
    std::vector<int> found;
    for (const int thread : {2, 0, 0, 0, 1, 2, 2, 2}) found.push_back(claims.claim(thread));
    CHECK(found == std::vector<int>{5, 0, 1, 2, 3, 6, 7, 4});
    CHECK(testing::error_of([&] { claims.claim(1); }).find("claimed") != std::string::npos);
  }
  ThreadPool pool(4);
  Claims shared(pool.size());
  for (int loop = 0; loop < 2000; ++loop) {
    const int n = loop % 23;
    std::vector<int> times(23);  // plain: what is claimed twice at a time is a data race
    shared.start(n);
    pool.run(n, [&](std::int64_t, int thread) { ++times[shared.claim(thread)]; });
    CHECK(std::count(times.begin(), times.end(), 1) == n);
  }
}

TEST_CASE("thread pool: a task that throws ends the process, whoever waits for it") {
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    ThreadPool pool(2);
    Flag never;
    pool.run(2, [&](std::int64_t task, int) {
      if (task == 1) throw std::bad_alloc();
      never.wait();
    });
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 1);
}

TEST_CASE("thread pool: no threads is an error") {
  CHECK(testing::error_of([] { ThreadPool pool(0); }) == "threads: expected at least 1, found 0");
}
