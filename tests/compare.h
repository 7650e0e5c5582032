// How far two arrays are from each other.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>

namespace thaw::testing {

// Normalised mean squared error: sum (a - b)^2 / sum b^2, b the definition.
inline double nmse(std::span<const float> a, std::span<const float> b) {
  double error = 0, power = 0;
  if (a.size() != b.size()) return INFINITY;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = static_cast<double>(a[i]) - b[i];
    error += difference * difference, power += static_cast<double>(b[i]) * b[i];
  }
  return power > 0 ? error / power : error;
}

}  // namespace thaw::testing
