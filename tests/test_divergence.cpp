// Logits against the next token, and against other logits.
#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cli/statistics.h"
#include "model/divergence.h"

namespace thaw {
namespace {

// Straight from the definitions, in long double.
struct Expected {
  long double nll, kl;
};

long double log_softmax(const std::vector<float>& logits, std::size_t i) {
  long double largest = logits[0], sum = 0;
  for (const float x : logits) largest = std::max<long double>(largest, x);
  for (const float x : logits) sum += std::exp(x - largest);
  return logits[i] - largest - std::log(sum);
}

Expected define(const std::vector<float>& full, const std::vector<float>& other, int target) {
  const long double shift_full = log_softmax(full, 0) - full[0];
  const long double shift_other = log_softmax(other, 0) - other[0];
  Expected e{-(other[target] + shift_other), 0};
  for (std::size_t i = 0; i < full.size(); ++i) {
    const long double log_p = full[i] + shift_full;
    e.kl += std::exp(log_p) * (log_p - (other[i] + shift_other));
  }
  return e;
}

std::vector<float> random_row(std::size_t n, unsigned seed, float scale) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> row(n);
  for (float& x : row) x = normal(random);
  return row;
}

TEST_CASE("divergence: NLL and KL of rows of any length are those of the definition") {
  ThreadPool pool(2);
  for (const std::size_t n : {1u, 2u, 4096u, 4097u, 49152u}) {
    CAPTURE(n);
    const std::vector<float> full = random_row(n, 1, 4);
    std::vector<float> other = random_row(n, 2, 0.3f);
    for (std::size_t i = 0; i < n; ++i) other[i] += full[i] + 100;  // a shift changes nothing
    const int target = static_cast<int>(n / 2);
    const Expected e = define(full, other, target);
    const Divergence d = compare_rows(pool, full, other, target);
    CHECK(d.nll == doctest::Approx(static_cast<double>(e.nll)).epsilon(1e-9));
    CHECK(std::fabs(d.kl - static_cast<double>(e.kl)) < 1e-9);
    CHECK(d.nll == doctest::Approx(negative_log_likelihood(other, target)).epsilon(1e-12));
  }
}

TEST_CASE("divergence: a row diverges from itself by nothing, and small differences are seen") {
  ThreadPool pool(1);
  const std::vector<float> full = random_row(49152, 3, 4);
  const Divergence same = compare_rows(pool, full, full, 5);
  CHECK(std::fabs(same.kl) < 1e-14);
  CHECK(same.same_top);
  std::vector<float> other = full;
  other[7] += 0.01f;
  const Divergence near = compare_rows(pool, full, other, 5);
  CHECK(near.kl > 0);
  const auto defined = static_cast<double>(define(full, other, 5).kl);  // 4e-12
  CHECK(std::fabs(near.kl - defined) < 1e-14);
}

TEST_CASE("divergence: the same for any number of threads, to the bit") {
  ThreadPool one(1), three(3);
  const std::vector<float> full = random_row(49152, 4, 5), other = random_row(49152, 5, 5);
  const Divergence a = compare_rows(one, full, other, 9), b = compare_rows(three, full, other, 9);
  CHECK(a.kl == b.kl);
  CHECK(a.nll == b.nll);
}

TEST_CASE("divergence: the first token agrees or does not, wherever it stands") {
  ThreadPool pool(1);
  std::vector<float> full(9000, 0.0f), other(9000, 0.0f);
  full[8999] = other[8999] = 1;
  CHECK(compare_rows(pool, full, other, 0).same_top);
  other[0] = 2;
  CHECK_FALSE(compare_rows(pool, full, other, 0).same_top);
  full[5000] = 3;
  CHECK_FALSE(compare_rows(pool, full, other, 0).same_top);
}

TEST_CASE("statistics: mean, deviation, standard error and quantiles") {
  const Mean m = mean_of({1, 2, 3, 6});
  CHECK(m.mean == 3);
  CHECK(m.sd == doctest::Approx(std::sqrt(14.0 / 3)));
  CHECK(m.se == doctest::Approx(std::sqrt(14.0 / 3) / 2));
  CHECK(mean_of({5}).se == 0);
  CHECK(exp_of({0, 0.2, 0.1}).se == doctest::Approx(0.1));
  CHECK(exp_of({1, 0, 0}).mean == doctest::Approx(std::exp(1.0)));
  CHECK(quantile({4, 1, 3}, 0.5) == 3);
  CHECK(quantile({4, 1, 3, 2}, 0.5) == 2.5);
  CHECK(quantile({2, 1}, 1) == 2);
  CHECK(quantile({0, 100}, 0.99) == doctest::Approx(99));
  CHECK(quantile({}, 0.5) == 0);
}

}  // namespace
}  // namespace thaw
