#include "device/bandwidth.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace thaw {

double measure_read_bandwidth(int n_threads) {
  constexpr std::int64_t kWords = std::int64_t{32} << 20;
  const std::vector<std::uint64_t> buffer(kWords, 1);
  double best = 0;
  std::uint64_t total = 0;
  for (int pass = 0; pass < 5; ++pass) {
    const auto start = std::chrono::steady_clock::now();
#pragma omp parallel for simd num_threads(n_threads) reduction(+ : total) schedule(static)
    for (std::int64_t i = 0; i < kWords; ++i) total += buffer[i];
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
    best = std::max(best, 8.0 * kWords / elapsed.count() / 1e9);
  }
  return total == 5 * kWords ? best : 0;  // the sum is used, so the reads cannot be left out
}

}  // namespace thaw
