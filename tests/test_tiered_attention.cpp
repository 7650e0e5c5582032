// Decode over two tiers on the CPU against its definition (tests/tiered_reference.h).
#include <doctest/doctest.h>

#include <limits>

#include "tests/compare.h"
#include "tests/reference.h"
#include "tests/tiered_reference.h"

using namespace thaw;
using Case = testing::TieredCase;
using Scene = testing::TieredScene;

namespace {

void check_case(const Case& c, float recall) {
  CAPTURE(c.kv_len);
  CAPTURE(c.n_kv_heads);
  CAPTURE(c.group);
  CAPTURE(c.head_dim);
  CAPTURE(c.per_head);
  CAPTURE(c.key_bits);
  CAPTURE(c.value_bits);
  CAPTURE(recall);
  const Scene s(c);
  KvView view = s.kv->view(0);
  view.recall = recall;
  std::vector<float> o;
  const AttentionStats stats = s.attend(o, view);
  REQUIRE(stats.lanes.size() == view.lanes.size());
  CHECK(stats.n_rows == 1);
  for (std::size_t i = 0; i < view.lanes.size(); ++i)
    testing::check_lane(s, view, stats.lanes[i], i, o);
}

constexpr int kLengths[] = {1, 2, 15, 16, 17, 31, 32, 33, 511, 512, 513, 1000};

}  // namespace

TEST_CASE("tiered attention: every context length, lanes of a head and of the layer") {
  for (const int kv_len : kLengths)
    for (const bool per_head : {true, false}) check_case({kv_len, 2, 3, 16, per_head}, 2e-3f);
}

TEST_CASE("tiered attention: groups of query heads, head sizes, stored types") {
  for (const int group : {1, 3, 4, 8})
    for (const int head_dim : {2, 6, 16, 24, 64, 80, 96})
      check_case({97, 2, group, head_dim, group % 2 == 0}, 1e-2f);
  check_case({300, 3, 3, 64, true, 3, 2, KvType::kF16}, 5e-3f);
  check_case({300, 1, 8, 96, true, 3, 2, KvType::kQ8_0}, 5e-3f);
  check_case({300, 3, 1, 32, false, 3, 2, KvType::kQ4_0}, 5e-3f);
  check_case({300, 3, 1, 80, false, 3, 2, KvType::kBF16}, 5e-3f);
}

TEST_CASE("tiered attention: ghosts of all bits") {
  for (const int key_bits : {1, 2, 3, 4})
    for (const int value_bits : {0, 1, 2, 4})
      check_case({130, 2, 3, 64, true, key_bits, value_bits}, 1e-2f);
}

TEST_CASE("tiered attention: of sharp heads what is less probable is recalled, too") {
  for (const bool per_head : {true, false})
    for (const float sharp : {3.0f, 6.0f, 12.0f}) {  // of 12 no less than Caution::least
      Case c{300, 2, 3, 64, per_head};
      c.sharp = sharp;
      check_case(c, 5e-3f);
      const Scene s(c);
      std::size_t n[2] = {};
      for (const float z : {0.0f, 3.0f}) {
        KvView view = s.kv->view(0);
        CHECK(view.caution == Caution{3, view.recall / 16});
        view.recall = 5e-3f, view.caution.z = z;
        std::vector<float> o;
        for (const AttentionStats::Lane& lane : s.attend(o, view).lanes)
          n[z > 0] += lane.recalled.size();
      }
      CHECK(n[1] >= n[0] + (sharp > 3.0f ? 2 : 0));
    }
}

TEST_CASE("tiered attention: groups of faint ghosts speak through the mean of values") {
  Case c{600, 2, 3, 64};
  c.loud_every = 3;
  check_case(c, 2e-3f);
  const Scene s(c);
  KvView view = s.kv->view(0);
  view.recall = 2e-3f;
  std::vector<float> before, after;
  s.attend(before, view);
  for (int group = 0; group * kGhostGroup < c.kv_len; ++group) {
    if (group % c.loud_every == 0) continue;
    auto* codes = const_cast<std::byte*>(view.ghosts.group(0, group));
    std::fill_n(codes + view.ghosts.format.key_bytes(), view.ghosts.format.value_bytes(),
                std::byte{});
  }
  s.attend(after, view);
  CHECK(after == before);

  // Almost all are recalled or faint, and nearly loud enough to be missed.
  c.loud_every = 100, c.louder = 6, c.one_hot_in = 0;
  check_case(c, 2e-3f);

  Case parted{600, 2, kJudges + 3, 64, false};
  parted.one_hot_in = 0, parted.part_judges = true;
  check_case(parted, 2e-3f);
}

TEST_CASE("tiered attention: with every frozen token recalled it is exact attention") {
  for (const int kv_len : kLengths) {
    const Case c{kv_len, 2, 4, 64};
    const Scene s(c);
    KvView view = s.kv->view(0);
    view.recall = std::numeric_limits<float>::min();
    std::vector<float> o;
    const AttentionStats stats = s.attend(o, view);
    reference::Matrix k, v;
    for (int t = 0; t < kv_len; ++t) {
      k.emplace_back(s.k.begin() + t * 128, s.k.begin() + (t + 1) * 128);
      v.emplace_back(s.v.begin() + t * 128, s.v.begin() + (t + 1) * 128);
    }
    const auto exact = reference::attend(s.q, k, v, kv_len, c.n_heads(), 2, 64);
    CHECK(testing::nmse(o, exact.o) < 1e-10);
    CHECK((stats.lanes[0].entropy + stats.lanes[1].entropy) / 2 ==
          doctest::Approx(exact.entropy).epsilon(1e-4));
    for (std::size_t i = 0; i < 2; ++i)
      CHECK(stats.lanes[i].recalled.size() + view.lanes[i].tokens.size() ==
            static_cast<std::size_t>(kv_len));
  }
}

TEST_CASE("tiered attention: a threshold beyond 1 recalls nothing, one of 0 no hot token") {
  for (const int kv_len : {33, 513}) {
    const float never = std::numeric_limits<float>::infinity();
    check_case({kv_len, 2, 3, 64}, never);
    const Scene s({kv_len, 2, 3, 64});
    KvView view = s.kv->view(0);
    std::vector<float> o;
    view.recall = never;
    for (const AttentionStats::Lane& lane : s.attend(o, view).lanes) CHECK(lane.recalled.empty());
    view.recall = 0;
    const AttentionStats stats = s.attend(o, view);
    for (std::size_t i = 0; i < stats.lanes.size(); ++i)
      for (const AttentionStats::Recall& r : stats.lanes[i].recalled)
        CHECK_FALSE(testing::is_hot(view.lanes[i], r.token));
  }
}

TEST_CASE("tiered attention: without ghosts frozen tokens are mute") {
  for (const int kv_len : {1, 5, 33, 513}) {
    check_case({kv_len, 2, 3, 64, false, 3, 2, KvType::kF16, Policy::kWindow}, 1e-3f);
    check_case({kv_len, 2, 3, 64, true, 0, 0}, 1e-3f);
    const Scene s({kv_len, 2, 3, 64, true, 0, 0});
    std::vector<float> o;
    for (const AttentionStats::Lane& lane : s.attend(o, s.kv->view(0)).lanes) {
      CHECK(lane.ghost_mass == 0);
      CHECK(lane.recalled.empty());
    }
  }
}

TEST_CASE("tiered attention: threads do not change a bit") {
  for (const int kv_len : {33, 1000}) {
    const Scene s({kv_len, 3, 3, 64});
    std::vector<float> one, other;
    const AttentionStats expected = s.attend(one, s.kv->view(0), 1);
    for (const int n_threads : {2, 5}) {
      const AttentionStats stats = s.attend(other, s.kv->view(0), n_threads);
      CHECK(one == other);
      for (std::size_t i = 0; i < stats.lanes.size(); ++i) {
        CHECK(stats.lanes[i].probability == expected.lanes[i].probability);
        CHECK(stats.lanes[i].recalled.size() == expected.lanes[i].recalled.size());
        CHECK(stats.lanes[i].entropy == expected.lanes[i].entropy);
      }
    }
  }
}
