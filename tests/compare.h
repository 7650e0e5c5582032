// How far two arrays are from each other.
#pragma once

#include <algorithm>
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

// How many of a are farther than `tolerance` from their b: NaN is, and all where sizes differ.
inline std::size_t n_beyond(std::span<const float> a, std::span<const float> b, double tolerance) {
  if (a.size() != b.size()) return std::max(a.size(), b.size());
  std::size_t n = 0;
  for (std::size_t i = 0; i < a.size(); ++i)
    n += !(std::fabs(static_cast<double>(a[i]) - b[i]) <= tolerance);
  return n;
}

// Whether a errs by at most `share` of b; NaN never does. (Approx takes that share of 1 + |b|.)
inline bool within(double a, double b, double share) {
  return std::fabs(a - b) <= share * std::fabs(b);
}

// How far a logit of make_tiny_model() in f32 may be from that of the same tokens in other batches.
// Two layers of five ops and the head err by 2^-24 sqrt(64) = 5e-7 of their output each, either
// time: sqrt(22) of that. Scores of deviation 4 make it four times as much, logits have deviation
// 2, and the largest of 2,000 errors is four times theirs.
inline constexpr double kTinyLogitError = 8e-5;

}  // namespace thaw::testing
