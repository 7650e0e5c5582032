// Ghosts against their definition and their theory. For a Gaussian, a uniform grid of 2^b values
// errs by kMse[b] of the variance at the best step (Max, 1960).
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kvstore/ghost.h"
#include "kvstore/ghost_code.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr double kMse[] = {1, 0.36338, 0.11885, 0.03744, 0.01154};
constexpr int kDims[] = {6, 24, 64, 80, 96, 128};
constexpr double kScaleError = 1.0 / 64;  // of a scale byte: half a step of 5 bits of mantissa

double dot(const float* a, const float* b, int n) {
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += static_cast<double>(a[i]) * b[i];
  return sum;
}

// A group of ghosts of one head, its centre, and its keys rotated about the centre.
struct Group {
  GhostFormat format;
  std::vector<float> key_mean, value_mean, k, v, x;  // x: rotated k - mean
  GhostCentre centre;
  std::vector<std::byte> bytes;
  GhostRope rope;  // none: the centre is the same everywhere

  Group(testing::Random& random, int key_bits, int value_bits, int dim)
      : format{key_bits, value_bits, dim},
        key_mean(random.normals(dim, 2)),
        value_mean(random.normals(dim, 2)),
        centre{key_mean.data(), value_mean.data(), ghost_step(key_bits), ghost_step(value_bits)},
        bytes(format.group_bytes()),
        rope({}, dim) {
    rope.grow(kGhostGroup);
    for (int i = 0; i < kGhostGroup; ++i) {
      const float size = static_cast<float>(std::exp2(2 * random.uniform() - 1));
      for (const float a : random.normals(dim, size)) k.push_back(a);
      for (const float a : random.normals(dim, size)) v.push_back(a);
    }
    x = k;
    for (int i = 0; i < kGhostGroup * dim; ++i) {
      k[i] += key_mean[i % dim], v[i] += value_mean[i % dim];
      x[i] = k[i] - key_mean[i % dim];
    }
    for (int i = 0; i < kGhostGroup; ++i) rotate(&x[i * dim], dim);
    for (int i = 0; i < kGhostGroup; ++i) write(i);
  }

  void write(int i) {
    const int dim = format.head_dim;
    std::vector<float> carry = carry_before(i);
    write_ghost(bytes.data(), format, i, &k[i * dim], &v[i * dim], centre, carry.data());
  }
  std::vector<float> carry_before(int i) const {
    std::vector<float> carry(static_cast<std::size_t>(format.head_dim), NAN);
    for (int t = i / kChainTokens * kChainTokens; t < i; ++t)
      carry_ghost(carry.data(), bytes.data(), format, t, &v[t * format.head_dim], centre);
    return carry;
  }
  // Rotated v - mean, and with what the chain before it lost: what is rounded.
  std::vector<float> rotated_value(int i) const {
    std::vector<float> w(v.begin() + i * format.head_dim, v.begin() + (i + 1) * format.head_dim);
    for (std::size_t d = 0; d < w.size(); ++d) w[d] -= value_mean[d];
    rotate(w.data(), format.head_dim);
    return w;
  }
  std::vector<float> fed_value(int i) const {
    std::vector<float> y = rotated_value(i);
    for (int t = i / kChainTokens * kChainTokens; t < i; ++t) {
      const std::vector<float> was = rotated_value(t), is = value(t);
      for (std::size_t d = 0; d < y.size(); ++d) y[d] += kFeedback * (was[d] - is[d]);
    }
    return y;
  }
  std::vector<float> key(int i) const {
    std::vector<float> out(static_cast<std::size_t>(format.head_dim));
    read_ghost_key(out.data(), bytes.data(), format, i, centre);
    return out;
  }
  std::vector<float> value(int i) const {
    std::vector<float> out(static_cast<std::size_t>(format.head_dim));
    read_ghost_value(out.data(), bytes.data(), format, i, centre);
    return out;
  }
};

template <class Body>
void for_each_format(const Body& body) {
  for (const int dim : kDims)
    for (const int key_bits : {1, 2, 3, 4})
      for (const int value_bits : {0, 1, 2, 4}) body(key_bits, value_bits, dim);
}

// `ghost` is x rounded to `bits`: s (cell + 1/2) with one s, the unbiased one, on the best of five
// grids. Tokens of which rounding may decide, a coordinate close to a cell's edge or two grids that
// lose the same, are left out.
void check_rounding(const float* x, const std::vector<float>& ghost, int bits) {
  const int dim = static_cast<int>(ghost.size()), half = 1 << (bits - 1);
  std::vector<float> best;
  double kept = 0, runner_up = 0;
  for (const double factor : {0.8, 0.9, 1.0, 1.1, 1.2}) {
    const double step = factor * ghost_step(bits) * std::sqrt(dot(x, x, dim) / dim);
    std::vector<float> c;
    for (int i = 0; i < dim; ++i) {
      const double cell = x[i] / step;
      if (std::fabs(cell - std::round(cell)) < 1e-4) return;
      c.push_back(static_cast<float>(std::clamp(std::floor(cell), -1.0 * half, half - 1.0) + 0.5));
    }
    const double xc = dot(x, c.data(), dim), cc = dot(c.data(), c.data(), dim);
    if (c != best) runner_up = std::max(runner_up, std::min(kept, xc * xc / cc));
    if (xc * xc / cc > kept) kept = xc * xc / cc, best = c;
  }
  if (runner_up > (1 - 1e-4) * kept) return;
  const double scale = dot(x, x, dim) / dot(x, best.data(), dim);
  for (int i = 0; i < dim; ++i)
    CHECK(std::fabs(ghost[i] - scale * best[i]) <= 1.01 * kScaleError * std::fabs(scale * best[i]));
}

}  // namespace

TEST_CASE("ghost: the rotation is orthogonal, its inverse undoes it, and it mixes each block") {
  for (const int dim : {2, 6, 24, 64, 80, 96, 128, 256}) {
    std::vector<std::vector<float>> columns;
    for (int i = 0; i < dim; ++i) {
      std::vector<float> e(static_cast<std::size_t>(dim));
      e[i] = 1;
      rotate(e.data(), dim);
      columns.push_back(e);
      rotate_back(e.data(), dim);
      for (int j = 0; j < dim; ++j) CHECK(std::fabs(e[j] - (i == j)) < 1e-6);
    }
    int block = 1;
    while (2 * block <= dim) block *= 2;
    for (int i = 0; i < dim; ++i) {
      for (int j = 0; j <= i; ++j)
        CHECK(std::fabs(dot(columns[i].data(), columns[j].data(), dim) - (i == j)) < 1e-6);
      for (int j = 0; j < (i < block ? block : 0); ++j)
        CHECK(std::fabs(columns[i][j]) == doctest::Approx(1 / std::sqrt(block)));
    }
    std::vector<float> ones(static_cast<std::size_t>(dim), 1.0f);  // what Hadamard alone would
    rotate(ones.data(), dim);                                      // put into one coordinate
    const float largest = *std::max_element(ones.begin(), ones.end());
    if (dim >= 64) CHECK(largest < 0.7 * std::sqrt(block));
  }
}

TEST_CASE("ghost: every format stores each coordinate's cell, and one scale a token") {
  testing::Random random(1);
  for_each_format([&](int key_bits, int value_bits, int dim) {
    CAPTURE(key_bits);
    CAPTURE(value_bits);
    CAPTURE(dim);
    const Group g(random, key_bits, value_bits, dim);
    for (int i = 0; i < kGhostGroup; ++i) {
      check_rounding(&g.x[i * dim], g.key(i), key_bits);
      if (value_bits > 0) check_rounding(g.fed_value(i).data(), g.value(i), value_bits);
      else CHECK(g.value(i) == std::vector<float>(static_cast<std::size_t>(dim)));
    }
  });
}

// With E the errors of a chain so far and r what rounding loses of y = x + beta E, the next E is
// (1 - beta) E + r, and the r of different tokens are independent.
TEST_CASE("ghost: a chain of values makes up for its errors, and writing leaves what it reads") {
  testing::Random random(11);
  const int dim = 64, last = kChainTokens - 1;
  double lost = 0, squares = 0, expected = 0, plain = 0;
  const int n = 400;
  for (int round = 0; round < n; ++round) {
    const Group g(random, 2, 2, dim);
    std::vector<double> sum(dim);
    for (int i = 0; i < kChainTokens; ++i) {
      const std::vector<float> is = g.value(i), was = g.rotated_value(i), fed = g.fed_value(i);
      double rounding = 0;
      for (int d = 0; d < dim; ++d) {
        sum[d] += was[d] - is[d];
        rounding += (fed[d] - is[d]) * (fed[d] - is[d]);
      }
      expected += rounding * std::pow(1 - kFeedback, 2.0 * (last - i)), plain += rounding;
    }
    double total = 0;
    for (const double e : sum) total += e * e;
    lost += total, squares += total * total;
    Group again = g;
    std::vector<float> carry = g.carry_before(last);
    write_ghost(again.bytes.data(), g.format, last, &g.k[last * dim], &g.v[last * dim], g.centre,
                carry.data());
    std::vector<float> rebuilt = g.carry_before(last);
    carry_ghost(rebuilt.data(), g.bytes.data(), g.format, last, &g.v[last * dim], g.centre);
    CHECK(carry == rebuilt);
  }
  CHECK(std::fabs(lost - expected) < 4 * std::sqrt(squares - lost * lost / n));
  CHECK(lost < 0.3 * plain);  // 1.73 of 8, where all r are alike
}

TEST_CASE("ghost: writing a token again changes that token only") {
  testing::Random random(2);
  for_each_format([&](int key_bits, int value_bits, int dim) {
    Group g(random, key_bits, value_bits, dim);
    const Group before = g;
    const int at = random.below(kGhostGroup);
    for (int i = 0; i < dim; ++i) g.k[at * dim + i] = g.v[at * dim + i] = random.normal();
    g.write(at);
    CHECK(g.key(at) != before.key(at));
    for (int i = 0; i < kGhostGroup; ++i) {
      if (i == at) continue;
      CHECK(g.key(i) == before.key(i));
      CHECK(g.value(i) == before.value(i));
    }
    std::copy_n(before.k.begin(), g.k.size(), g.k.begin());
    std::copy_n(before.v.begin(), g.v.size(), g.v.begin());
    g.write(at);
    CHECK(g.bytes == before.bytes);
  });
}

TEST_CASE("ghost: a key on the centre, and keys of any size, give finite ghosts") {
  testing::Random random(3);
  for (const float size : {0.0f, 1e-30f, 1e-3f, 1e3f, 1e18f}) {
    Group g(random, 3, 2, 64);
    for (int i = 0; i < 64; ++i) {
      g.k[i] = g.key_mean[i] + size * random.normal();
      g.v[i] = g.value_mean[i] + size * random.normal();
    }
    g.write(0);
    for (const float y : g.key(0)) CHECK(std::isfinite(y));
    for (const float y : g.value(0)) CHECK(std::isfinite(y));
    if (size == 0) CHECK(g.key(0) == std::vector<float>(64));
  }
}

// Nothing is kept of them: a cell of the grid, and the scale of nothing.
TEST_CASE("ghost: a key and a value that overflowed or are no numbers have codes") {
  for (const float x : {NAN, -NAN, INFINITY * 0})
    CHECK(grid_number(x, 1, 4) == -3.5f);
  testing::Random random(5);
  for (const float odd : {INFINITY, -INFINITY, NAN, 3e38f}) {
    CAPTURE(odd);
    Group g(random, 3, 2, 64);
    g.k[7] = g.v[9] = odd;
    g.write(0);
    CHECK(g.key(0) == std::vector<float>(64));
    CHECK(g.value(0) == std::vector<float>(64));
  }
}

// A query's codes err by at most half a unit, |Rq|_inf / 254, a dimension.
TEST_CASE("ghost: scores are q.mu + (Rq).k^ within what 8 bits of a query cost") {
  testing::Random random(4);
  for_each_format([&](int key_bits, int value_bits, int dim) {
    const Group g(random, key_bits, value_bits, dim);
    const int n_queries = 1 + random.below(9), stride = GhostRope::kSpan + 5;
    const std::vector<float> q = random.normals(n_queries * dim);
    std::vector<GhostQuery> queries(static_cast<std::size_t>(n_queries));
    std::vector<float> scores(static_cast<std::size_t>(n_queries * stride), -7.0f);
    for (int h = 0; h < n_queries; ++h)
      prepare_query(queries[h], &q[h * dim], g.key_mean.data(), g.rope, g.format);
    g.rope.score_centre(scores.data(), stride, queries.data(), n_queries, 0, 1);
    score_ghosts(scores.data(), stride, queries.data(), n_queries, g.bytes.data(), g.format,
                 g.centre.key_unit);
    for (int h = 0; h < n_queries; ++h) {
      std::vector<float> rotated(q.begin() + h * dim, q.begin() + (h + 1) * dim);
      rotate(rotated.data(), dim);
      double largest = 0;
      for (const float a : rotated) largest = std::fmax(largest, std::fabs(a));
      for (int j = 0; j < stride; ++j) {
        if (j >= GhostRope::kSpan) {
          CHECK(scores[h * stride + j] == -7.0f);
          continue;
        }
        // Beyond the group there is only the centre.
        const std::vector<float> key = j < kGhostGroup ? g.key(j) : std::vector<float>(dim);
        const double expected =
            dot(&q[h * dim], g.key_mean.data(), dim) + dot(rotated.data(), key.data(), dim);
        double bound = 1e-4;  // f32 rounding of numbers up to some hundred
        for (const float y : key) bound += largest / 254 * std::fabs(y);
        CHECK(std::fabs(scores[h * stride + j] - expected) <= bound);
      }
    }
  });
}

TEST_CASE("ghost: sums of the largest codes do not overflow") {
  testing::Random random(8);
  for (const int bits : {1, 2, 4}) {
    const int dim = 128;
    Group g(random, bits, bits, dim);
    std::vector<float> q(dim, 1.0f), peak(dim);  // all of a key's codes are large, one of a value's
    rotate_back(q.data(), dim);
    peak[3] = 1;
    rotate_back(peak.data(), dim);
    for (int i = 0; i < kGhostGroup; ++i) {
      for (int d = 0; d < dim; ++d) {
        g.k[i * dim + d] = g.key_mean[d] + q[d];
        g.v[i * dim + d] = g.value_mean[d] + peak[d];
      }
      g.write(i);
    }
    GhostQuery query;
    prepare_query(query, q.data(), g.key_mean.data(), g.rope, g.format);
    float scores[kGhostGroup] = {}, weights[kGhostGroup], out[128] = {};
    score_ghosts(scores, kGhostGroup, &query, 1, g.bytes.data(), g.format, g.centre.key_unit);
    for (const float s : scores) CHECK(s == doctest::Approx(dim).epsilon(0.03));
    std::fill_n(weights, kGhostGroup, 1.0f);
    sum_ghosts(out, dim, weights, kGhostGroup, 1, g.bytes.data(), g.format, g.centre.value_unit);
    float sum = 0;
    for (int i = 0; i < kGhostGroup; ++i) sum += g.value(i)[3];
    CHECK(out[3] == doctest::Approx(sum).epsilon(0.01));
  }
}

// With s_j a value's scale, w_j s_j errs by at most half of max(w s) / 255.
TEST_CASE("ghost: weighted sums of values, within what 8 bits of a weight cost, are added") {
  testing::Random random(5);
  for_each_format([&](int key_bits, int value_bits, int dim) {
    const Group g(random, key_bits, value_bits, dim);
    const int n_queries = 1 + random.below(9), padded = g.format.padded_dim(), stride = padded + 5;
    std::vector<float> weights(static_cast<std::size_t>(n_queries * 40));
    for (float& w : weights) w = static_cast<float>(std::exp(-8 * random.uniform()));
    std::fill_n(weights.begin(), kGhostGroup, 0.0f);  // the first query has none
    std::vector<float> out(static_cast<std::size_t>(n_queries * stride), 3.0f);
    sum_ghosts(out.data(), stride, weights.data(), 40, n_queries, g.bytes.data(), g.format,
               g.centre.value_unit);
    float scales[kGhostGroup] = {};
    if (value_bits > 0)
      widen_scales(scales, g.bytes.data() + g.bytes.size() - g.format.scale_bytes());
    for (int h = 0; h < n_queries; ++h) {
      double largest = 0;
      for (int j = 0; j < kGhostGroup; ++j)
        largest = std::fmax(largest, weights[h * 40 + j] * scales[j] * g.centre.value_unit);
      for (int i = 0; i < dim; ++i) {
        double expected = 3, bound = 1e-5;
        for (int j = 0; j < kGhostGroup; ++j) {
          const double y = g.value(j)[i];
          expected += weights[h * 40 + j] * y;
          if (y != 0) bound += largest / 510 * std::fabs(y) / (scales[j] * g.centre.value_unit);
        }
        CHECK(std::fabs(out[h * stride + i] - expected) <= 1.001 * bound);
      }
      for (int i = padded; i < stride; ++i) CHECK(out[h * stride + i] == 3.0f);
    }
  });
}

// x^ = x + r with r orthogonal to x and |r|^2 = |x|^2 mse / (1 - mse), so a.x^ has no bias, not
// even for an a that leans to x, and its variance is |a|^2 |r|^2 / d.
struct GhostErrors {
  double sum = 0, squares = 0, variance = 0;
  int n = 0;

  void add(testing::Random& random, const float* x, const std::vector<float>& ghost) {
    const int dim = static_cast<int>(ghost.size());
    const double size = std::sqrt(dot(x, x, dim));
    const std::vector<float> a = random.normals(dim);
    std::vector<float> error = ghost, leaning = a;
    for (int d = 0; d < dim; ++d) {
      error[d] = static_cast<float>((error[d] - x[d]) / size);
      leaning[d] += static_cast<float>(8 * x[d] / size);
    }
    const double biased = dot(leaning.data(), error.data(), dim);
    sum += biased, squares += biased * biased, ++n;
    const double e = dot(a.data(), error.data(), dim);
    variance += e * e / dot(a.data(), a.data(), dim) * dim;
  }

  // Within 4 standard errors, for a variance that of n draws, and 2 % for d that is not infinite.
  // Of four bits less, because few dimensions reach less far out, and the best of five grids is
  // taken; but no less than rounding, step^2 / 12, leaves on the finest of them, 0.8 of the step.
  void check(int bits) const {
    CHECK(std::fabs(sum / n) < 4 * std::sqrt(squares / n / n));
    const double tolerance = 4 * std::sqrt(2.0 / n) + 0.02;
    const double theory = kMse[bits] / (1 - kMse[bits]);
    CHECK(variance / n < theory * (1 + tolerance));
    const double step = 0.8 * ghost_step(bits);
    CHECK(variance / n > (bits < 4 ? theory * (1 - tolerance) : step * step / 12));
  }
};

TEST_CASE("ghost: a query says by how much scores err") {
  for (const int bits : {1, 2, 3, 4})
    CHECK(ghost_noise(bits) * ghost_step(bits) ==
          doctest::Approx(std::sqrt(kMse[bits] / (1 - kMse[bits]))).epsilon(0.002).scale(0));
  testing::Random random(9);
  for (const int dim : {6, 64, 80}) {
    const std::vector<float> q = random.normals(dim), mean(static_cast<std::size_t>(dim));
    GhostQuery out;
    prepare_query(out, q.data(), mean.data(), GhostRope({}, dim), {3, 2, dim});
    CHECK(out.noise ==
          doctest::Approx(ghost_noise(3) * std::sqrt(dot(q.data(), q.data(), dim)))
              .epsilon(1e-5)
              .scale(0));
  }
}

TEST_CASE("ghost: keys and values are unbiased, and err as much as theory says") {
  testing::Random random(6);
  for (const int dim : {64, 128}) {
    for (const int bits : {1, 2, 3, 4}) {
      CAPTURE(dim);
      CAPTURE(bits);
      const int value_bits = bits == 3 ? 2 : bits;
      GhostErrors keys, values;
      for (int round = 0; round < 120; ++round) {
        const Group g(random, bits, value_bits, dim);
        for (int i = 0; i < kGhostGroup; ++i) {
          keys.add(random, &g.x[i * dim], g.key(i));
          values.add(random, g.fed_value(i).data(), g.value(i));
        }
      }
      keys.check(bits);
      values.check(value_bits);
    }
  }
}

TEST_CASE("ghost: a scale's byte is within 1.6 % from a twelfth of the unit to twelve of it") {
  testing::Random random(7);
  for (double size = 1.0 / 12; size < 12; size *= 1.01) {
    Group g(random, 4, 4, 64);
    std::vector<float> x = random.normals(64);
    const double norm = std::sqrt(dot(x.data(), x.data(), 64) / 64);
    for (int i = 0; i < 64; ++i) {
      x[i] *= static_cast<float>(size / norm);
      g.k[i] = g.key_mean[i] + x[i];
      g.v[i] = g.value_mean[i] + x[i];
    }
    rotate(x.data(), 64);
    g.write(0);
    for (const std::vector<float>& ghost : {g.key(0), g.value(0)}) {
      const double gain = dot(x.data(), ghost.data(), 64) / dot(x.data(), x.data(), 64);
      CHECK(std::fabs(gain - 1) <= 1.01 * kScaleError);
    }
  }
}
