#include "device/bandwidth.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace thaw {
namespace {

using Words = std::vector<std::uint64_t>;

std::uint64_t sum_of(const Words& words, ThreadPool& pool) {
  constexpr std::int64_t kTask = std::int64_t{1} << 16;
  std::atomic<std::uint64_t> total = 0;
  pool.run(std::ssize(words) / kTask, [&](std::int64_t task, int) {
    const std::uint64_t* from = words.data() + task * kTask;
    std::uint64_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t i = 0; i < kTask; ++i) sum += from[i];
    total += sum;
  });
  return total;
}

}  // namespace

double measure_read_bandwidth(ThreadPool& pool) {
  constexpr std::int64_t kWords = std::int64_t{32} << 20;
  const Words buffer(kWords, 1);
  std::uint64_t total = 0;
  double best = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    total += sum_of(buffer, pool);
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, 8.0 * kWords / elapsed.count() / 1e9);
  }
  return total == 5 * kWords ? best : 0;  // the sum is used, so the reads cannot be left out
}

CacheFlusher::CacheFlusher()
    : buffer_(static_cast<std::size_t>(
                  std::clamp(2 * ::sysconf(_SC_LEVEL3_CACHE_SIZE), 64L << 20, 1L << 30)) / 8,
              1) {}

void CacheFlusher::flush(ThreadPool& pool) { sum_ += sum_of(buffer_, pool); }

}  // namespace thaw
