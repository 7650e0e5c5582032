// Attention on the GPU against the definition: odd shapes, every type of store.
//
// Tolerances are on the error's power relative to the result's (NMSE). Up to 8 rows all is f32, as
// on the CPU (tests/test_attention.cpp): 1e-10. Through tensor cores, queries and probabilities are
// rounded by at most u = 2^-11 (f16) or 2^-8 (bf16) of them, and evenly: u^2 / 3 of the power. A
// score of q and k with standard deviation 1.5 then errs by 1.5^2 u / sqrt(3), and so does its
// probability, relatively; its own rounding adds u / sqrt(3). Errors of different tokens are
// independent, so o has the same share of its power: (1.5^4 + 1) u^2 / 3. Quantised keys and values
// are rounded to f16 as well, which doubles it. Twice that leaves room for chance.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention_cuda.h"
#include "kvstore/row.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/reference.h"
#include "tests/simt/device_pages.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;

namespace {

using Vector = std::vector<float>;

constexpr KvType kTypes[] = {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8_0,
                             KvType::kQ4_0};

struct Case {
  int n_rows, kv_len, n_kv_heads, group, head_dim;
  KvType type = KvType::kF16;

  int n_heads() const { return n_kv_heads * group; }
  int width() const { return n_heads() * head_dim; }
};

double tolerance(const Case& c) {
  if (c.n_rows <= 8 || c.type == KvType::kF32) return 1e-10;
  const double u = c.type == KvType::kBF16 ? 0x1p-8 : 0x1p-11;
  const bool unpacked = c.type == KvType::kQ8_0 || c.type == KvType::kQ4_0;
  return 2 * (std::pow(1.5, 4) + 1) * u * u / 3 * (unpacked ? 2 : 1);
}

std::unique_ptr<KvStore> filled_store(const Case& c) {
  testing::Random random(7);
  KvOptions full;
  full.policy.policy = Policy::kFull;
  auto kv = make_kv_store({2, c.n_kv_heads, c.head_dim, c.kv_len + 5, c.type}, full);
  kv->begin(c.kv_len, Phase::kPrefill);
  const std::int64_t n = std::int64_t{c.kv_len} * c.n_kv_heads * c.head_dim;
  for (int layer = 0; layer < 2; ++layer)
    kv->append(layer, random.normals(n, 1.5f).data(), random.normals(n, 1.5f).data(), c.kv_len);
  return kv;
}

Vector queries(const Case& c) {
  return testing::Random(11).normals(std::int64_t{c.n_rows} * c.width(), 1.5f);
}

Vector attend(const Case& c, const KvStore& kv, const Vector& q) {
  const Stream stream;
  const testing::DevicePages pages(kv, 1, stream);
  const auto attention = make_cuda_attention(stream);
  DeviceBuffer<float> dq(q.size(), "q"), o(q.size(), "o");
  copy_to_device(dq.data(), q.data(), q.size(), stream);
  AttentionStats stats;
  attention->attend(o.data(), dq.data(), c.n_rows, c.n_heads(), pages.view(), stats, 0);
  Vector got(q.size());
  copy_to_host(got.data(), o.data(), got.size(), stream);
  return got;
}

Vector expected(const Case& c, const KvStore& kv, const Vector& q) {
  const KvRows rows = kv.view(1).cold;
  reference::Matrix k, v;
  for (int t = 0; t < c.kv_len; ++t) {
    k.emplace_back(c.n_kv_heads * c.head_dim), v.emplace_back(c.n_kv_heads * c.head_dim);
    for (int head = 0; head < c.n_kv_heads; ++head) {
      load_row(&k[t][head * c.head_dim], rows.key(head, t), c.head_dim, c.type);
      load_row(&v[t][head * c.head_dim], rows.value(head, t), c.head_dim, c.type);
    }
  }
  Vector all;
  for (int t = 0; t < c.n_rows; ++t) {
    const Vector row(q.begin() + t * c.width(), q.begin() + (t + 1) * c.width());
    const auto r = reference::attend(row, k, v, c.kv_len - c.n_rows + t + 1, c.n_heads(),
                                     c.n_kv_heads, c.head_dim);
    all.insert(all.end(), r.o.begin(), r.o.end());
  }
  return all;
}

// What the last stats_rows rows say of lanes of lane_heads k/v heads each: the mean over the rows
// and the lane's query heads.
struct Stats {
  Vector probability, relevance, entropy;  // lane x token, likewise, lane
};

Stats expected_stats(const Case& c, const KvStore& kv, const Vector& q, int stats_rows,
                     int lane_heads) {
  const KvRows rows = kv.view(1).cold;
  const int queries = lane_heads * c.group, width = lane_heads * c.head_dim;
  Stats all;
  for (int first = 0; first < c.n_kv_heads; first += lane_heads) {
    reference::Matrix k, v(static_cast<std::size_t>(c.kv_len), Vector(width));
    for (int t = 0; t < c.kv_len; ++t) {
      k.emplace_back(width);
      for (int i = 0; i < lane_heads; ++i)
        load_row(&k[t][i * c.head_dim], rows.key(first + i, t), c.head_dim, c.type);
    }
    std::vector<double> probability(static_cast<std::size_t>(c.kv_len)), relevance = probability;
    double entropy = 0;
    for (int t = c.n_rows - stats_rows; t < c.n_rows; ++t) {
      const int n_visible = c.kv_len - c.n_rows + t + 1;
      const auto from = q.begin() + t * c.width() + first * c.group * c.head_dim;
      const Vector row(from, from + queries * c.head_dim);
      const auto r = reference::attend(row, k, v, n_visible, queries, lane_heads, c.head_dim);
      entropy += double{r.entropy} / stats_rows;
      for (int j = 0; j < n_visible; ++j) {
        probability[j] += double{r.probability[j]} / stats_rows;
        for (int h = 0; h < queries; ++h) {
          double s = 0;
          for (int i = 0; i < c.head_dim; ++i)
            s += double{row[h * c.head_dim + i]} * k[j][h / c.group * c.head_dim + i];
          relevance[j] += std::fabs(s) / std::sqrt(c.head_dim) / queries / stats_rows;
        }
      }
    }
    all.probability.insert(all.probability.end(), probability.begin(), probability.end());
    all.relevance.insert(all.relevance.end(), relevance.begin(), relevance.end());
    all.entropy.push_back(static_cast<float>(entropy));
  }
  return all;
}

Stats stats_of(const Case& c, const KvStore& kv, const Vector& q, int stats_rows, int lane_heads,
               bool relevant = true) {
  const Stream stream;
  const testing::DevicePages pages(kv, 1, stream);
  const auto attention = make_cuda_attention(stream);
  DeviceBuffer<float> dq(q.size(), "q"), o(q.size(), "o");
  copy_to_device(dq.data(), q.data(), q.size(), stream);
  const int n_lanes = c.n_kv_heads / lane_heads, stride = c.kv_len + 3;
  const auto n = static_cast<std::size_t>(n_lanes * stride);
  const DeviceBuffer<float> out(2 * n + static_cast<std::size_t>(n_lanes), "statistics");
  constexpr float kUntouched = -1;  // no statistic is negative
  Vector got(out.size(), kUntouched);
  copy_to_device(out.data(), got.data(), got.size(), stream);
  KvView view = pages.view();
  DeviceView device = *view.device;
  device.stats.stride = stride;
  device.stats.probability = out.data();
  device.stats.relevance = relevant ? out.data() + n : nullptr;
  device.stats.entropy = out.data() + 2 * n;
  view.device = &device;
  view.lane_heads = lane_heads;
  AttentionStats stats;
  attention->attend(o.data(), dq.data(), c.n_rows, c.n_heads(), view, stats, stats_rows);
  CHECK(stats.n_rows == stats_rows);
  copy_to_host(got.data(), out.data(), got.size(), stream);
  CHECK(std::count(got.begin(), got.end(), kUntouched) ==
        n_lanes * (relevant ? 2 * 3 : 3 + stride));  // nothing behind kv_len
  Stats all;
  for (int i = 0; i < n_lanes; ++i) {
    const auto lane = got.begin() + i * stride;
    all.probability.insert(all.probability.end(), lane, lane + c.kv_len);
    if (!relevant) continue;
    all.relevance.insert(all.relevance.end(), lane + n, lane + n + c.kv_len);
  }
  all.entropy.assign(got.begin() + 2 * n, got.end());
  return all;
}

// All is f32, so the tolerance is that of a few rows, and for one number its root, 1e-5, times 10:
// the largest of many errors is some times their mean. A probability errs by as much of itself as
// its score errs, and entropy, a mean of scores, by as much.
void check_stats(const Case& c, int stats_rows, int lane_heads) {
  CAPTURE(c.n_rows);
  CAPTURE(c.kv_len);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  CAPTURE(kv_type_name(c.type));
  CAPTURE(stats_rows);
  CAPTURE(lane_heads);
  const auto kv = filled_store(c);
  const Vector q = queries(c);
  const Stats got = stats_of(c, *kv, q, stats_rows, lane_heads);
  const Stats wanted = expected_stats(c, *kv, q, stats_rows, lane_heads);
  CHECK(testing::nmse(got.probability, wanted.probability) <= 1e-10);
  CHECK(testing::nmse(got.relevance, wanted.relevance) <= 1e-10);
  int n_wrong = 0;
  for (std::size_t i = 0; i < wanted.probability.size(); ++i)
    n_wrong += !testing::within(got.probability[i], wanted.probability[i], 1e-4);
  CHECK(n_wrong == 0);
  for (std::size_t i = 0; i < wanted.entropy.size(); ++i)
    CHECK(std::fabs(got.entropy[i] - wanted.entropy[i]) <= 1e-4);
}

void check(const Case& c) {
  CAPTURE(c.n_rows);
  CAPTURE(c.kv_len);
  CAPTURE(c.n_kv_heads);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  CAPTURE(kv_type_name(c.type));
  const auto kv = filled_store(c);
  const Vector q = queries(c);
  CHECK(testing::nmse(attend(c, *kv, q), expected(c, *kv, q)) <= tolerance(c));
}

}  // namespace

TEST_CASE("cuda attention: decode equals the definition, every type, group and head size") {
  for (const KvType type : kTypes)
    for (const int head_dim : {32, 64, 96, 128}) check({1, 75, 1, 4, head_dim, type});
  for (const int head_dim : {8, 24, 80, 160, 256}) check({1, 67, 2, 3, head_dim});
  for (const int group : {1, 3, 4, 7, 9}) check({1, 131, 2, group, 64});
  for (const int kv_len : {1, 2, 31, 32, 33, 257, 1000}) check({1, kv_len, 1, 3, 64});
  for (const int n_rows : {2, 5, 8}) check({n_rows, 40, 2, 3, 64});
  check({8, 8, 1, 1, 128});
}

TEST_CASE("cuda attention: prefill equals the definition, every type, group and head size") {
  for (const KvType type : kTypes)
    for (const int head_dim : {64, 96, 128}) check({17, 80, 1, 3, head_dim, type});
  for (const int head_dim : {8, 72, 80, 160}) check({12, 70, 1, 2, head_dim});
  for (const int group : {1, 3, 4, 7}) check({9, 131, 2, group, 64, KvType::kBF16});
  for (const int n_rows : {16, 63, 64, 65, 70}) check({n_rows, n_rows, 1, 1, 64});
  check({70, 203, 1, 3, 80});
}

TEST_CASE("cuda attention: scores far apart do not overflow, and the largest wins") {
  for (const int n_rows : {1, 20}) {
    const Case c{n_rows, 150, 1, 1, 64};
    KvOptions full;
    full.policy.policy = Policy::kFull;
    const auto kv = make_kv_store({2, 1, 64, 160, KvType::kF16}, full);
    Vector k(150 * 64, -100.0f), v;
    std::fill_n(k.begin() + 90 * 64, 64, 100.0f);
    for (int t = 0; t < 150; ++t) v.insert(v.end(), 64, static_cast<float>(t));
    kv->begin(150, Phase::kPrefill);
    for (int layer = 0; layer < 2; ++layer) kv->append(layer, k.data(), v.data(), 150);
    const Vector q(static_cast<std::size_t>(n_rows) * 64, 100.0f);
    CHECK(attend(c, *kv, q) == Vector(q.size(), 90.0f));
  }
}

TEST_CASE("cuda attention: the same bits in any order of blocks, threads and splits") {
  for (const Case& c : {Case{1, 700, 2, 3, 64}, Case{3, 150, 1, 4, 128}, Case{20, 90, 1, 3, 64}}) {
    const auto kv = filled_store(c);
    const Vector q = queries(c), first = attend(c, *kv, q);
    for (std::uint64_t seed = 2; seed < 6; ++seed) {
      simt::set_seed(seed);
      CHECK(attend(c, *kv, q) == first);
    }
  }
  simt::set_seed(1);
}

TEST_CASE("cuda attention: a graph serves every length, and reads keys and values once") {
  const Case c{1, 200, 2, 4, 64};
  const auto kv = filled_store(c);
  const Vector q = queries(c);
  const Stream stream;
  const testing::DevicePages pages(*kv, 1, stream);
  const auto attention = make_cuda_attention(stream);
  DeviceBuffer<float> dq(q.size(), "q"), o(q.size(), "o");
  copy_to_device(dq.data(), q.data(), q.size(), stream);
  AttentionStats stats;
  const auto run = [&] {
    attention->attend(o.data(), dq.data(), 1, c.n_heads(), pages.view(), stats, 0);
  };
  run();  // takes its memory
  const Graph graph(stream, run);
  for (const int kv_len : {200, 31, 1}) {
    auto* device_len = const_cast<std::int32_t*>(pages.view().device->kv_len);
    copy_to_device(device_len, &kv_len, 1, stream);
    stream.synchronize();
    if (simt::emulated()) simt::counts().clear();
    graph.launch(stream);
    Vector got(q.size());
    copy_to_host(got.data(), o.data(), got.size(), stream);
    CHECK(testing::nmse(got, expected({1, kv_len, 2, 4, 64}, *kv, q)) <= 1e-10);
    if (!simt::emulated()) continue;
    CHECK(simt::counts()["attend"].runs == 1);
    if (kv_len == 200) CHECK(simt::counts()["attend"].bytes == 200 * 2 * 2 * 64 * 2);
  }
}

TEST_CASE("cuda attention: statistics of a prompt's last rows, of each head and of the layer") {
  for (const KvType type : kTypes) check_stats({12, 70, 2, 3, 64, type}, 5, 1);
  for (const int head_dim : {40, 64, 80, 128, 256}) check_stats({9, 65, 1, 2, head_dim}, 9, 1);
  for (const int group : {1, 3, 4, 7, 9}) check_stats({3, 33, 2, group, 64}, 3, 2);
  for (const int kv_len : {1, 31, 32, 33, 127, 128, 129, 513})
    for (const int lane_heads : {1, 2}) check_stats({1, kv_len, 2, 3, 64}, 1, lane_heads);
  check_stats({40, 40, 2, 3, 64}, 40, 2);
  check_stats({40, 100, 3, 1, 64}, 1, 3);
}

TEST_CASE("cuda attention: statistics have the same bits in any order, relevance or not") {
  const Case c{20, 300, 2, 3, 64};
  const auto kv = filled_store(c);
  const Vector q = queries(c);
  const Stats first = stats_of(c, *kv, q, 7, 1);
  for (std::uint64_t seed = 2; seed < 8; ++seed) {
    simt::set_seed(seed);
    const Stats other = stats_of(c, *kv, q, 7, 1, seed % 2 == 0);
    CHECK(other.probability == first.probability);
    CHECK(other.entropy == first.entropy);
    if (seed % 2 == 0) CHECK(other.relevance == first.relevance);
  }
  simt::set_seed(1);
}

TEST_CASE("cuda attention: shapes that do not fit are refused") {
  const Case c{1, 4, 2, 1, 64};
  const auto kv = filled_store(c);
  const Stream stream;
  const testing::DevicePages pages(*kv, 1, stream);
  const auto attention = make_cuda_attention(stream);
  DeviceBuffer<float> x(8 * 128, "x");
  fill_device(x.data(), 0, x.bytes(), stream);
  AttentionStats stats;
  const auto run = [&](int n_rows, int n_heads, const KvView& view, int stats_rows) {
    return error_of(
        [&] { attention->attend(x.data(), x.data(), n_rows, n_heads, view, stats, stats_rows); });
  };
  CHECK(run(5, 2, pages.view(), 0) == "attend: rows: expected 1 to kv_len = 4, found 5");
  CHECK(run(1, 3, pages.view(), 0) == "attend: n_heads: expected a multiple of 2, found 3");
  CHECK(run(1, 2, pages.view(), 2) == "attend: stats_rows: expected 0 to 1, found 2");
  CHECK(run(1, 2, pages.view(), 1) ==
        "attend: statistics were asked for, and there is no room for them");
  CHECK(run(1, 2, kv->view(1), 0) == "attend: expected a store in device memory");
  KvView odd = pages.view();
  odd.head_dim = 10;
  CHECK(run(1, 2, odd, 0) ==
        "attend: head_dim: expected a multiple of 8 up to 256 on the GPU, found 10");
}
