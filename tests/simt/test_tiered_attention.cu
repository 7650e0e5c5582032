// Decode over two tiers on the GPU against its definition (tests/tiered_reference.h, which also
// says how close it must come), on every shape that is odd to some kernel.
#include <doctest/doctest.h>

#include <limits>
#include <vector>

#include "attention/attention_cuda.h"
#include "kvstore/tiered_store_cuda.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/reference.h"
#include "tests/sanitized.h"
#include "tests/simt/device_tiers.h"
#include "tests/simt/simt.h"
#include "tests/tiered_reference.h"

using namespace thaw;
using Case = testing::TieredCase;
using Scene = testing::TieredScene;
using simt::kIsSlow;
using testing::DeviceTiers;
using testing::error_of;

namespace {

const unsigned kOrders = kIsSlow ? 3 : 20;
constexpr float kNever = std::numeric_limits<float>::infinity();

// A view of a scene on the device, and attention that looks at it.
struct Device {
  Stream stream;
  DeviceTiers tiers;
  std::unique_ptr<Attention> attention;
  DeviceBuffer<float> q, o;
  AttentionStats host;

  Device(const Scene& s, const KvView& view, int capacity)
      : tiers(view, capacity, stream),
        attention(make_cuda_attention(stream)),
        q(s.q.size(), "q"),
        o(s.q.size(), "o") {
    set_queries(s);
  }
  void set_queries(const Scene& s) {
    copy_to_device(q.data(), s.q.data(), s.q.size(), stream);
    stream.synchronize();
  }
  void run(const Scene& s) {
    attention->attend(o.data(), q.data(), 1, s.c.n_heads(), tiers.view(), host, 1);
  }
  std::vector<float> answer() const {
    std::vector<float> got(o.size());
    copy_to_host(got.data(), o.data(), got.size(), stream);
    return got;
  }
};

KvView view_of(const Scene& s, float recall) {
  KvView view = s.kv->view(0);
  view.recall = recall;
  return view;
}

void check_answer(const Scene& s, const KvView& view, const Device& device) {
  const AttentionStats stats = device.tiers.stats();
  const std::vector<float> o = device.answer();
  REQUIRE(stats.lanes.size() == view.lanes.size());
  for (std::size_t i = 0; i < view.lanes.size(); ++i)
    testing::check_lane(s, view, stats.lanes[i], i, o);
}

void check_case(const Case& c, float recall) {
  CAPTURE(c.kv_len);
  CAPTURE(c.n_kv_heads);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  CAPTURE(c.per_head);
  CAPTURE(c.key_bits);
  CAPTURE(c.value_bits);
  CAPTURE(kv_type_name(c.type));
  CAPTURE(recall);
  const Scene s(c);
  const KvView view = view_of(s, recall);
  Device device(s, view, c.kv_len + 5);
  device.run(s);
  CHECK(device.host.n_rows == 1);
  check_answer(s, view, device);
}

bool same_bits(const AttentionStats& a, const AttentionStats& b) {
  bool same = a.lanes.size() == b.lanes.size();
  for (std::size_t i = 0; same && i < a.lanes.size(); ++i) {
    const AttentionStats::Lane &x = a.lanes[i], &y = b.lanes[i];
    same = x.probability == y.probability && x.relevance == y.relevance && x.entropy == y.entropy &&
           x.ghost_mass == y.ghost_mass && x.recalled.size() == y.recalled.size();
    for (std::size_t r = 0; same && r < x.recalled.size(); ++r)
      same = x.recalled[r].token == y.recalled[r].token &&
             x.recalled[r].probability == y.recalled[r].probability;
  }
  return same;
}

std::size_t n_recalled(const AttentionStats& stats) {
  std::size_t n = 0;
  for (const AttentionStats::Lane& lane : stats.lanes) n += lane.recalled.size();
  return n;
}

// The same text through a store and attention of the CPU, and of the GPU.
class BothSides {
 public:
  BothSides(const KvShape& shape, const KvOptions& options, int group)
      : group_(group),
        cpu_(make_kv_store(shape, options)),
        cuda_(make_cuda_tiered_store(shape, options, stream_)),
        cpu_attention_(make_cpu_attention(pool_)),
        cuda_attention_(make_cuda_attention(stream_)) {}

  void step(int n, Phase phase) {
    const KvShape& s = cpu_->shape();
    cpu_->begin(n, phase), cuda_->begin(n, phase);
    for (int layer = 0; layer < s.n_layers; ++layer) {
      const std::int64_t size = std::int64_t{n} * s.n_kv_heads * s.head_dim;
      const auto k = random_.normals(size), v = random_.normals(size);
      const auto q = random_.normals(size * group_, 1.5f);
      const DeviceBuffer<float> dk(k.size(), "k"), dv(k.size(), "v"), dq(q.size(), "q"),
          o(q.size(), "o");
      copy_to_device(dk.data(), k.data(), k.size(), stream_);
      copy_to_device(dv.data(), v.data(), v.size(), stream_);
      copy_to_device(dq.data(), q.data(), q.size(), stream_);
      cpu_->append(layer, k.data(), v.data(), n), cuda_->append(layer, dk.data(), dv.data(), n);
      AttentionStats stats, reported;
      std::vector<float> wanted(q.size()), got(q.size());
      const int heads = s.n_kv_heads * group_, rows = cpu_->stats_rows(n);
      REQUIRE(cuda_->stats_rows(n) == rows);
      cpu_attention_->attend(wanted.data(), q.data(), n, heads, cpu_->view(layer), stats, rows);
      cuda_attention_->attend(o.data(), dq.data(), n, heads, cuda_->view(layer), reported, rows);
      copy_to_host(got.data(), o.data(), got.size(), stream_);
      CHECK(testing::nmse(got, wanted) <= kTolerance);
      CHECK(reported.n_rows == stats.n_rows);
      cpu_->settle(layer, stats), cuda_->settle(layer, reported);
    }
    if (phase == Phase::kDecode) compare();
  }
  const KvCounters& counters() const { return cpu_->counters(); }

 private:
  // All is f32 and errs by 1e-10, but a weight of a ghost that is near the middle of two codes may
  // round to either: 1/255 of the largest of its group, which is less than the threshold, 1e-2.
  // Ten of them in a step, of values ten times as large as their mean: 4e-3 of o, squared.
  static constexpr double kTolerance = 1.6e-5;

  void compare() {
    const KvCounters &a = cpu_->counters(), &b = cuda_->counters();
    CHECK(a.attended == b.attended);
    CHECK(a.recalled == b.recalled);
    CHECK(a.thawed == b.thawed);
    CHECK(a.frozen == b.frozen);
    CHECK(cuda_->ghost_mass().value() ==
          doctest::Approx(cpu_->ghost_mass().value()).epsilon(1e-4).scale(1e-6));
  }

  const Stream stream_;
  ThreadPool pool_{1};
  testing::Random random_{3};
  const int group_;
  std::unique_ptr<KvStore> cpu_, cuda_;
  std::unique_ptr<Attention> cpu_attention_, cuda_attention_;
};

}  // namespace

TEST_CASE("cuda tiered attention: every context length, lanes of a head and of the layer") {
  for (const int kv_len : {1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129, 511, 512, 513})
    for (const bool per_head : {true, false}) check_case({kv_len, 2, 3, 16, per_head}, 2e-3f);
}

// The emulator's device has 24 blocks for splits: three a head here, and so spans and tiles that
// follow each other in a block, and recalled tokens that stand in several warps' words.
TEST_CASE("cuda tiered attention: blocks of many spans and tiles") {
  Case c{1300, 8, 1, 32};
  for (const bool per_head : {true, false}) {
    c.per_head = per_head;
    c.one_hot_in = per_head ? 6 : 3;
    check_case(c, 5e-4f);
  }
  Case wide{700, 4, 9, 32};
  wide.type = KvType::kF16;
  check_case(wide, 5e-4f);
}

TEST_CASE("cuda tiered attention: groups of query heads, head sizes, stored types") {
  for (const int group : {1, 3, 4, 7, 9})
    for (const int head_dim : {40, 64, 80, 128})
      check_case({97, 1, group, head_dim, group % 2 == 0}, 1e-2f);
  check_case({70, 2, 2, 256}, 1e-2f);
  check_case({300, 3, 3, 64, true, 3, 2, KvType::kF16}, 5e-3f);
  check_case({300, 1, 8, 96, true, 3, 2, KvType::kQ8_0}, 5e-3f);
  check_case({300, 3, 1, 32, false, 3, 2, KvType::kQ4_0}, 5e-3f);
  check_case({300, 3, 1, 80, false, 3, 2, KvType::kBF16}, 5e-3f);
}

TEST_CASE("cuda tiered attention: ghosts of all bits") {
  for (const int key_bits : {1, 2, 3, 4})
    for (const int value_bits : {0, 1, 2, 4})
      check_case({130, 1, 3, 64, true, key_bits, value_bits}, 1e-2f);
}

TEST_CASE("cuda tiered attention: of sharp heads what is less probable is recalled, too") {
  for (const bool per_head : {true, false})
    for (const float sharp : {6.0f, 12.0f}) {
      Case c{300, 2, 3, 64, per_head};
      c.sharp = sharp;
      check_case(c, 5e-3f);
      Case wide{140, 1, 9, 80, per_head};
      wide.sharp = sharp;
      check_case(wide, 5e-3f);
    }
}

TEST_CASE("cuda tiered attention: few hot rows, all of them, and no ghost that is recalled") {
  for (const int kv_len : {40, 300}) {
    for (const int one_hot_in : {0, 1, 2}) {
      Case c{kv_len, 2, 3, 64};
      c.one_hot_in = one_hot_in;
      check_case(c, 2e-3f);
      const Scene s(c);
      Device device(s, view_of(s, kNever), kv_len);
      device.run(s);
      check_answer(s, view_of(s, kNever), device);
      CHECK(n_recalled(device.tiers.stats()) == 0);
    }
  }
}

TEST_CASE("cuda tiered attention: with every frozen token recalled it is exact attention") {
  for (const int kv_len : {17, 33, 300}) {
    const Case c{kv_len, 2, 4, 64};
    const Scene s(c);
    const KvView view = view_of(s, std::numeric_limits<float>::min());
    Device device(s, view, kv_len);
    device.run(s);
    reference::Matrix k, v;
    for (int t = 0; t < kv_len; ++t) {
      k.emplace_back(s.k.begin() + t * 128, s.k.begin() + (t + 1) * 128);
      v.emplace_back(s.v.begin() + t * 128, s.v.begin() + (t + 1) * 128);
    }
    const auto exact = reference::attend(s.q, k, v, kv_len, c.n_heads(), 2, 64);
    CHECK(testing::nmse(device.answer(), exact.o) < 1e-10);
    const AttentionStats stats = device.tiers.stats();
    CHECK((stats.lanes[0].entropy + stats.lanes[1].entropy) / 2 ==
          doctest::Approx(exact.entropy).epsilon(1e-4));
    for (std::size_t i = 0; i < 2; ++i)
      CHECK(stats.lanes[i].recalled.size() + view.lanes[i].tokens.size() ==
            static_cast<std::size_t>(kv_len));
  }
}

TEST_CASE("cuda tiered attention: without ghosts frozen tokens are mute") {
  for (const int kv_len : {1, 5, 33, 300}) {
    check_case({kv_len, 2, 3, 64, false, 3, 2, KvType::kF16, Policy::kWindow}, 1e-3f);
    check_case({kv_len, 2, 3, 64, true, 0, 0}, 1e-3f);
    const Scene s({kv_len, 2, 3, 64, true, 0, 0});
    Device device(s, view_of(s, 1e-3f), kv_len);
    device.run(s);
    for (const AttentionStats::Lane& lane : device.tiers.stats().lanes) CHECK(lane.ghost_mass == 0);
  }
}

TEST_CASE("cuda tiered attention: with a store, what the CPU does, under every policy") {
  for (const Policy policy :
       {Policy::kThaw, Policy::kWindow, Policy::kH2o, Policy::kBudget, Policy::kAsr}) {
    for (const bool per_head : {true, false}) {
      if (!per_head && policy != Policy::kThaw) continue;
      CAPTURE(kPolicyNames[static_cast<int>(policy)]);
      CAPTURE(per_head);
      KvOptions o;
      o.policy.policy = policy;
      o.policy.per_head = per_head;
      o.policy.window = 6;
      o.policy.epsilon = 1e-2f;
      o.centre_tokens = 16;
      if (policy != Policy::kThaw) o.hot_fraction = 0.5;
      KvShape shape{kIsSlow ? 1 : 2, 2, kIsSlow ? 32 : 64, 300, KvType::kF32, {}};
      for (int i = 0; i < shape.head_dim / 2; ++i)
        shape.rope.inverse_frequencies.push_back(std::pow(0.75f, static_cast<float>(i)));
      BothSides both(shape, o, 3);
      both.step(40, Phase::kPrefill);
      for (int i = 0; i < (kIsSlow ? 4 : 12); ++i) both.step(1, Phase::kDecode);
      both.step(kIsSlow ? 10 : 70, Phase::kPrefill);
      for (int i = 0; i < (kIsSlow ? 3 : 20); ++i) both.step(1, Phase::kDecode);
      CHECK(both.counters().frozen > 0);
    }
  }
}

TEST_CASE("cuda tiered attention: the same bits in any order of blocks, threads and streams") {
  for (const bool per_head : {true, false}) {
    const Scene s({400, 6, 2, 32, per_head});
    const KvView view = view_of(s, 2e-3f);
    std::vector<float> first;
    AttentionStats first_stats;
    for (std::uint64_t seed = 1; seed <= kOrders; ++seed) {
      simt::set_seed(seed);
      Device device(s, view, 400);
      device.run(s);
      if (seed == 1) first = device.answer(), first_stats = device.tiers.stats();
      CHECK(device.answer() == first);
      CHECK(same_bits(device.tiers.stats(), first_stats));
    }
    CHECK(n_recalled(first_stats) > 20);
  }
  simt::set_seed(1);
}

TEST_CASE("cuda tiered attention: a graph serves every length") {
  const Scene longest({600, 2, 3, 64});
  Device device(longest, view_of(longest, 2e-3f), 600);
  device.run(longest);  // takes its memory
  const Graph graph(device.stream, [&] { device.run(longest); });
  for (const int kv_len : {5, 16, 17, 128, 129, 300, 301, 600}) {
    CAPTURE(kv_len);
    const Scene s({kv_len, 2, 3, 64});
    const KvView view = view_of(s, kv_len % 2 == 0 ? 5e-3f : 2e-3f);
    device.tiers.update(view);
    device.set_queries(s);
    graph.launch(device.stream);
    check_answer(s, view, device);
  }
}

TEST_CASE("cuda tiered attention: ghosts and rows are read once for all heads of a group") {
  const int kv_len = 256;
  Case c{kv_len, 2, 7, 64};
  c.type = KvType::kF16;
  const Scene s(c);
  const KvView view = view_of(s, 2e-3f);
  Device device(s, view, kv_len);
  simt::counts().clear();
  device.run(s);
  const AttentionStats stats = device.tiers.stats();
  std::int64_t n_hot = 0;
  for (const LaneView& lane : view.lanes) n_hot += lane.hot.n_rows;
  CHECK(simt::counts()["score_tiers"].bytes == n_hot * 2 * 64 * 2 + kv_len * 2 * 64 * 3 / 8);
  CHECK(simt::counts()["answer_frozen"].bytes ==
        static_cast<std::int64_t>(n_recalled(stats)) * 2 * 64 * 2 + kv_len * 2 * 64 * 2 / 8);
}

TEST_CASE("cuda tiered attention: groups that are hot are not read") {
  const int kv_len = 256;
  Case c{kv_len, 1, 3, 64};
  c.one_hot_in = 1;
  const Scene s(c);
  const KvView view = view_of(s, 2e-3f);
  Device device(s, view, kv_len);
  simt::counts().clear();
  device.run(s);
  check_answer(s, view, device);
  const auto n_rows = static_cast<std::int64_t>(kv_len);
  CHECK(simt::counts()["score_tiers"].bytes == n_rows * 2 * 64 * 4);
  CHECK(simt::counts()["answer_frozen"].bytes == 0);
}

TEST_CASE("cuda tiered attention: of groups of faint ghosts values are not read") {
  const int kv_len = 320;
  Case c{kv_len, 1, 3, 64};
  c.loud_every = 5, c.type = KvType::kF16;
  const Scene s(c);
  const KvView view = view_of(s, 2e-3f);
  Device device(s, view, kv_len);
  simt::counts().clear();
  device.run(s);
  check_answer(s, view, device);
  const auto n = static_cast<std::int64_t>(n_recalled(device.tiers.stats()));
  CHECK(simt::counts()["answer_frozen"].bytes == n * 2 * 64 * 2 + kv_len / 5 * 64 * 2 / 8);

  Case parted{160, 1, kJudges + 3, 64, false};
  parted.one_hot_in = 0, parted.part_judges = true;
  check_case(parted, 2e-3f);
}

TEST_CASE("cuda tiered attention: what does not fit is refused") {
  const Scene s({40, 2, 3, 64});
  const KvView view = view_of(s, 2e-3f);
  Device device(s, view, 40);
  const auto refusal = [&](auto change) {
    KvView odd = device.tiers.view();
    DeviceView tiers = *odd.device;
    odd.device = &tiers;
    change(odd, tiers);
    return error_of([&] {
      device.attention->attend(device.o.data(), device.q.data(), 1, 6, odd, device.host, 1);
    });
  };
  CHECK(refusal([](KvView&, DeviceView& d) { d.hot.lane_heads = 2; }) ==
        "attend: lanes: expected 2 heads in all, found 2 x 2");
  CHECK(refusal([](KvView&, DeviceView& d) { d.hot.mask_words = 1; }) ==
        "attend: hot mask: expected room for 40 tokens, found 32");
  CHECK(refusal([](KvView&, DeviceView& d) { d.ghosts.format.head_dim = 32; }) ==
        "attend: ghosts: expected head_dim 64, found 32");
  CHECK(refusal([](KvView&, DeviceView& d) { d.ghosts.format.value_bits = 3; }) ==
        "attend: ghosts: expected keys of 1 to 4 bits and values of 0, 1, 2 or 4, found 3 and 3");
  CHECK(error_of([&] {
          device.attention->attend(device.o.data(), device.q.data(), 2, 6, device.tiers.view(),
                                   device.host, 1);
        }) == "attend: expected 1 row under a policy, found 2");
}
