#include "device/bandwidth.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

namespace thaw {

double measure_read_bandwidth(ThreadPool& pool) {
  constexpr std::int64_t kWords = std::int64_t{32} << 20, kTask = std::int64_t{1} << 16;
  const std::vector<std::uint64_t> buffer(kWords, 1);
  std::atomic<std::uint64_t> total = 0;
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run(kWords / kTask, [&](std::int64_t task, int) {
      const std::uint64_t* words = buffer.data() + task * kTask;
      std::uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (std::int64_t i = 0; i < kTask; ++i) sum += words[i];
      total += sum;
    });
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, 8.0 * kWords / elapsed.count() / 1e9);
  }
  return total == 5 * kWords ? best : 0;  // the sum is used, so the reads cannot be left out
}

}  // namespace thaw
