// Attention against the definition, over odd shapes. The tolerance is NMSE 1e-10: f32 sums of up to
// 1000 terms err by about 2^-24 sqrt(1000) = 2e-6 relative, squared 4e-12; x 25 for e^x and
// merging.
#include <doctest/doctest.h>

#include <cstring>

#include "attention/attention.h"
#include "attention/softmax_state.h"
#include "device/error.h"
#include "device/fast_math.h"
#include "tests/compare.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr double kTolerance = 1e-10;

struct Case {
  int n_rows, kv_len, n_kv_heads, group, head_dim;
  KvType type = KvType::kF32;

  int n_heads() const { return n_kv_heads * group; }
};

struct Inputs {
  std::unique_ptr<KvStore> kv;
  reference::Matrix k, v, q;  // [token][n_kv_heads * head_dim] as the store rounds them; [row][...]
  std::vector<float> flat_q;

  void fill() {  // the store, with all tokens in one step
    std::vector<float> keys, values;
    for (const auto& row : k) keys.insert(keys.end(), row.begin(), row.end());
    for (const auto& row : v) values.insert(values.end(), row.begin(), row.end());
    const int n = static_cast<int>(k.size());
    kv->begin(n, Phase::kPrefill);
    kv->append(0, keys.data(), values.data(), n);
  }
};

Inputs make_inputs(const Case& c, std::uint64_t seed = 7) {
  testing::Random random(seed);
  const int kv_dim = c.n_kv_heads * c.head_dim, q_dim = c.n_heads() * c.head_dim;
  Inputs in{make_kv_store({1, c.n_kv_heads, c.head_dim, c.kv_len + 5, c.type}), {}, {}, {}, {}};
  const auto store = [&](reference::Matrix& rows) {
    rows.push_back(random.normals(kv_dim, 1.5f));
    for (float& x : rows.back())
      x = c.type == KvType::kF16    ? f16_to_f32(f32_to_f16(x))
          : c.type == KvType::kBF16 ? bf16_to_f32(f32_to_bf16(x))
                                    : x;
  };
  for (int t = 0; t < c.kv_len; ++t) store(in.k), store(in.v);
  in.fill();
  for (int t = 0; t < c.n_rows; ++t) {
    in.q.push_back(random.normals(q_dim, 1.5f));
    in.flat_q.insert(in.flat_q.end(), in.q[t].begin(), in.q[t].end());
  }
  return in;
}

void check_case(const Case& c) {
  CAPTURE(c.n_rows);
  CAPTURE(c.kv_len);
  CAPTURE(c.n_kv_heads);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  const Inputs in = make_inputs(c);
  std::vector<float> o(in.flat_q.size());
  AttentionStats stats;
  const int stats_rows = (c.n_rows + 1) / 2;
  ThreadPool pool(2);
  make_cpu_attention(pool)->attend(o.data(), in.flat_q.data(), c.n_rows, c.n_heads(),
                                   in.kv->view(0), stats, stats_rows);
  std::vector<float> expected, probability(static_cast<std::size_t>(c.kv_len));
  float entropy = 0;
  for (int t = 0; t < c.n_rows; ++t) {
    const int visible = c.kv_len - c.n_rows + t + 1;
    const auto r =
        reference::attend(in.q[t], in.k, in.v, visible, c.n_heads(), c.n_kv_heads, c.head_dim);
    expected.insert(expected.end(), r.o.begin(), r.o.end());
    const int i = t - (c.n_rows - stats_rows);
    if (i < 0) continue;
    for (int j = 0; j < visible; ++j)
      probability[j] += r.probability[j] / static_cast<float>(stats_rows);
    entropy += static_cast<float>(r.entropy) / static_cast<float>(stats_rows);
  }
  CHECK(testing::nmse(o, expected) <= kTolerance);
  REQUIRE(stats.lanes.size() == 1);
  CHECK(testing::nmse(stats.lanes[0].probability, probability) <= kTolerance);
  CHECK(stats.lanes[0].entropy == doctest::Approx(entropy).epsilon(1e-5).scale(1));
}

}  // namespace

TEST_CASE("attention: equals the definition at every edge of its tiles, blocks and ranges") {
  for (int n_rows : {1, 2, 15, 16, 17, 40})
    for (int kv_len : {1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1000})
      if (n_rows <= kv_len) check_case({n_rows, kv_len, 2, 3, 16});
}

TEST_CASE("attention: every grouping of heads, and head sizes that fill no tile") {
  for (int group : {1, 3, 4, 8})
    for (int head_dim : {2, 8, 24, 64, 80, 128}) {
      check_case({1, 300, 2, group, head_dim});
      check_case({20, 70, 1, group, head_dim});
    }
}

TEST_CASE("attention: reads f16 and bf16 stores exactly") {
  for (KvType type : {KvType::kF16, KvType::kBF16})
    for (int n_rows : {1, 33}) check_case({n_rows, 150, 3, 3, 64, type});
}

TEST_CASE("attention: the same bits for any number of threads, and from one call to the next") {
  for (int n_rows : {1, 50}) {
    const Case c{n_rows, 900, 3, 3, 64, KvType::kF16};
    const Inputs in = make_inputs(c);
    std::vector<float> first(in.flat_q.size()), o(in.flat_q.size());
    AttentionStats stats, other;
    ThreadPool single(1);
    make_cpu_attention(single)->attend(first.data(), in.flat_q.data(), n_rows, 9, in.kv->view(0),
                                       stats, n_rows);
    for (int n_threads : {2, 3, 5}) {
      ThreadPool pool(n_threads);
      auto attention = make_cpu_attention(pool);
      for (int repeat = 0; repeat < 2; ++repeat) {
        attention->attend(o.data(), in.flat_q.data(), n_rows, 9, in.kv->view(0), other, n_rows);
        CHECK(std::memcmp(o.data(), first.data(), o.size() * sizeof(float)) == 0);
        CHECK(other.lanes[0].probability == stats.lanes[0].probability);
        CHECK(other.lanes[0].entropy == stats.lanes[0].entropy);
      }
    }
  }
}

TEST_CASE("attention: scores far apart do not overflow, and the largest wins") {
  const Case c{1, 300, 1, 1, 16};
  Inputs in = make_inputs(c);
  in.kv->clear();
  for (int t = 0; t < c.kv_len; ++t)
    for (float& x : in.k[t]) x = t == 200 ? 100.0f : -100.0f;
  in.fill();
  const std::vector<float> q(16, 100.0f);
  std::vector<float> o(16);
  AttentionStats stats;
  ThreadPool pool(1);
  make_cpu_attention(pool)->attend(o.data(), q.data(), 1, 1, in.kv->view(0), stats, 1);
  CHECK(o == in.v[200]);
  CHECK(stats.lanes[0].probability[200] == 1.0f);
  CHECK(stats.lanes[0].entropy == 0.0f);
}

TEST_CASE("attention: shapes that do not fit are refused") {
  const Inputs in = make_inputs({1, 4, 2, 1, 16});
  std::vector<float> o(64), q(64);
  ThreadPool pool(1);
  auto attention = make_cpu_attention(pool);
  AttentionStats stats;
  CHECK_THROWS_WITH_AS(attention->attend(o.data(), q.data(), 5, 2, in.kv->view(0), stats, 0),
                       "attend: rows: expected 1 to kv_len = 4, found 5", Error);
  CHECK_THROWS_WITH_AS(attention->attend(o.data(), q.data(), 1, 3, in.kv->view(0), stats, 0),
                       "attend: n_heads: expected a multiple of 2, found 3", Error);
}

// A sum of 50 in f32 rounds 50 times, by 2^-24 of itself at most: a random walk of 2.4e-7, two of
// which part by 3.4e-7, and seldom by more than three times that, 1e-6. Each of the first new
// maxima, five or so, rescales l, o and ps by one factor, which rounds by 2^-24: 1.3e-7. So l and
// o / l, of values up to 3, err by 1.2e-6 of themselves; entropy, of scores up to 12, by 12 times
// what additions make of l and ps.
TEST_CASE("softmax state: any split of the scores merges to the whole") {
  constexpr double kSum = 1.2e-6;
  testing::Random random(11);
  const int n = 50, dim = 4;
  const std::vector<float> scores = random.normals(n, 5), values = random.normals(n * dim);
  const auto part = [&](int begin, int end, float* o) {
    SoftmaxState s;
    std::fill(o, o + dim, 0.0f);
    for (int j = begin; j < end; ++j) {
      const SoftmaxState one{scores[j], 1, scores[j]};
      merge(s, o, one, values.data() + j * dim, dim);
    }
    return s;
  };
  float whole_o[dim];
  const SoftmaxState whole = part(0, n, whole_o);
  for (int cut = 0; cut <= n; cut += 5) {
    float left_o[dim], right_o[dim];
    SoftmaxState left = part(0, cut, left_o);
    const SoftmaxState right = part(cut, n, right_o);
    merge(left, left_o, right, right_o, dim);
    CHECK(left.m == whole.m);
    CHECK(testing::within(left.l, whole.l, kSum));
    CHECK(std::fabs(left.entropy() - whole.entropy()) <= 12 * kSum);
    for (int i = 0; i < dim; ++i) CHECK(std::fabs(left_o[i] - whole_o[i]) <= 3 * kSum * whole.l);
  }
}

TEST_CASE("fast math: e^x within 2e-7 of the definition; zero below; silu at its limits") {
  int n_off = 0;
  for (float x = -85.9f; x < 88.0f; x += 0.00137f)
    n_off += !testing::within(exp_fast(x), std::exp(static_cast<double>(x)), 2e-7);
  CHECK(n_off == 0);
  CHECK(exp_fast(0.0f) == 1.0f);
  CHECK(exp_fast(-86.0f) == 0.0f);
  CHECK(exp_fast(-INFINITY) == 0.0f);
  CHECK(silu(-1000.0f) == 0.0f);
  CHECK(silu(1000.0f) == 1000.0f);
  CHECK(silu(1.0f) == doctest::Approx(0.7310585786));
  CHECK(silu(-1.0f) == doctest::Approx(-0.2689414214));
}
