// What a list of measurements says.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

namespace thaw {

// `sd`: standard deviation of one value (n - 1 in the denominator); `se`: of the mean,
// sd / sqrt(n), values taken as independent. Both 0 for a single value.
struct Mean {
  double mean = 0;
  double sd = 0;
  double se = 0;
};

inline Mean mean_of(const std::vector<double>& values) {
  const auto n = static_cast<double>(values.size());
  Mean result;
  for (const double x : values) result.mean += x / n;
  if (values.size() < 2) return result;
  double squares = 0;
  for (const double x : values) squares += (x - result.mean) * (x - result.mean);
  result.sd = std::sqrt(squares / (n - 1));
  result.se = result.sd / std::sqrt(n);
  return result;
}

// e^mean and its standard error, to first order.
inline Mean exp_of(const Mean& log) {
  const double value = std::exp(log.mean);
  return {value, value * log.sd, value * log.se};
}

// The value that a share q of the sorted values lies at or below, between neighbours in proportion:
// q = 0.5 is the median. 0 for no values at all.
inline double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  const double at = q * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (at - static_cast<double>(below)) * (values[above] - values[below]);
}

}  // namespace thaw
