#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "device/error.h"
#include "device/half.h"
#include "kvstore/kvstore.h"
#include "kvstore/row.h"
#include "tests/step_order.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr int kHeads = 2, kDim = 6;
KvShape shape(KvType type, int capacity = 40) { return {3, kHeads, kDim, capacity, type}; }

float element(const KvView& view, const std::byte* p, int i) {
  std::uint16_t half;
  float full;
  std::memcpy(&half, p + 2 * i, view.type == KvType::kF32 ? 0 : 2);
  if (view.type == KvType::kF16) return f16_to_f32(half);
  if (view.type == KvType::kBF16) return bf16_to_f32(half);
  std::memcpy(&full, p + 4 * i, 4);
  return full;
}

float rounded(float x, KvType type) {
  return type == KvType::kF16    ? f16_to_f32(f32_to_f16(x))
         : type == KvType::kBF16 ? bf16_to_f32(f32_to_bf16(x))
                                 : x;
}

}  // namespace

TEST_CASE("kv store: what is appended is what the view shows, rounded once to the store's type") {
  for (KvType type : {KvType::kF16, KvType::kBF16, KvType::kF32}) {
    auto kv = make_kv_store(shape(type));
    testing::Random random(3);
    const std::vector<float> k = random.normals(10 * kHeads * kDim),
                             v = random.normals(10 * kHeads * kDim);
    kv->begin(10, Phase::kPrefill);
    for (int layer = 0; layer < 3; ++layer) {  // each layer's keys differ
      std::vector<float> scaled = k;
      for (float& x : scaled) x *= static_cast<float>(layer * 4);
      kv->append(layer, scaled.data(), v.data(), 10);
    }
    CHECK(kv->length() == 10);
    for (int layer = 0; layer < 3; ++layer) {
      const KvView view = kv->view(layer);
      REQUIRE(view.kv_len == 10);
      for (int t = 0; t < 10; ++t)
        for (int h = 0; h < kHeads; ++h)
          for (int i = 0; i < kDim; ++i) {
            const int at = (t * kHeads + h) * kDim + i;
            CHECK(element(view, view.cold.key(h, t), i) ==
                  rounded(static_cast<float>(layer * 4) * k[at], type));
            CHECK(element(view, view.cold.value(h, t), i) == rounded(v[at], type));
          }
    }
    CHECK(kv->usage().resident == 10 * 3 * 2 * kHeads * kDim * (type == KvType::kF32 ? 4 : 2));
  }
}

TEST_CASE("kv store: length counts tokens that every layer holds") {
  auto kv = make_kv_store(shape(KvType::kF32));
  const std::vector<float> x(5 * kHeads * kDim, 1.0f);
  kv->begin(5, Phase::kPrefill);
  kv->append(0, x.data(), x.data(), 5);
  CHECK(kv->length() == 0);
  CHECK(kv->view(0).kv_len == 5);
  kv->append(1, x.data(), x.data(), 5);
  kv->append(2, x.data(), x.data(), 5);
  CHECK(kv->length() == 5);
}

TEST_CASE("kv store: rewind forgets later tokens, and what is appended next takes their place") {
  auto kv = make_kv_store(shape(KvType::kF32));
  testing::Random random(4);
  const std::vector<float> a = random.normals(6 * kHeads * kDim), b = random.normals(kHeads * kDim);
  kv->begin(6, Phase::kPrefill);
  for (int layer = 0; layer < 3; ++layer) kv->append(layer, a.data(), a.data(), 6);
  kv->rewind(4);
  CHECK(kv->length() == 4);
  kv->begin(1, Phase::kDecode);
  for (int layer = 0; layer < 3; ++layer) kv->append(layer, b.data(), b.data(), 1);
  const KvView view = kv->view(2);
  CHECK(view.kv_len == 5);
  CHECK(element(view, view.cold.key(1, 4), 2) == b[kDim + 2]);
  CHECK(element(view, view.cold.key(1, 3), 2) == a[(3 * kHeads + 1) * kDim + 2]);
  CHECK_THROWS_WITH_AS(kv->rewind(6), "KV store: rewind: expected a position from 0 to 5, found 6",
                       Error);
  CHECK_THROWS_AS(kv->rewind(-1), Error);
  kv->clear();
  CHECK(kv->length() == 0);
}

TEST_CASE("kv store: a full store refuses tokens and keeps what it has") {
  auto kv = make_kv_store(shape(KvType::kF16, 4));
  const std::vector<float> x(5 * kHeads * kDim, 1.0f);
  kv->begin(3, Phase::kPrefill);
  for (int layer = 0; layer < 3; ++layer) {
    kv->append(layer, x.data(), x.data(), 3);
    kv->settle(layer, {});
  }
  CHECK_THROWS_WITH_AS(kv->begin(2, Phase::kPrefill),
                       "KV store: expected at most 4 tokens, found 5", Error);
  CHECK(kv->length() == 3);
  CHECK(kv->view(0).kv_len == 3);
}

TEST_CASE("kv store: calls that are out of order are refused, and a rewind begins anew") {
  const std::vector<float> x(3 * kHeads * kDim, 1.0f);
  for (const Policy policy : {Policy::kFull, Policy::kWindow}) {
    KvOptions options;
    options.policy.policy = policy;
    options.check = true;
    auto kv = make_kv_store({2, kHeads, kDim, 40, KvType::kF16}, options);
    testing::check_step_order(*kv, x.data());
  }
}

TEST_CASE("kv store: a recorder hears of as many layers and heads as a model may have") {
  struct Log final : KvRecorder {
    void event(const KvEvent& e) override { layers.push_back(e.layer), heads.push_back(e.head); }
    void step(const KvStep&) override {}
    std::vector<int> layers, heads;
  };
  constexpr int kMany = 1 << 16;
  for (const bool in_layers : {true, false}) {
    const KvShape many{in_layers ? kMany : 1, in_layers ? 1 : kMany, 2, 2, KvType::kF16};
    KvOptions options;
    options.policy.policy = Policy::kThaw;
    auto kv = make_kv_store(many, options);
    Log log;
    kv->record(&log);
    const std::vector<float> x(static_cast<std::size_t>(many.n_kv_heads) * many.head_dim, 1.0f);
    kv->begin(1, Phase::kDecode);
    for (int layer = 0; layer < many.n_layers; ++layer) kv->append(layer, x.data(), x.data(), 1);
    REQUIRE(log.layers.size() == kMany);
    for (const int i : {0, 32767, 32768, kMany - 1}) {
      CHECK(log.layers[i] == (in_layers ? i : 0));
      CHECK(log.heads[i] == (in_layers ? 0 : i));
    }
  }
}

// Infinity and NaN, and what divides to them: code 0, as kernels write it.
TEST_CASE("kv store: blocks of what is no number have codes, and the others keep theirs") {
  for (const float odd : {INFINITY, -INFINITY, NAN}) {
    CAPTURE(odd);
    std::vector<float> x(64, 3.0f);
    x[5] = odd, x[40] = -8;
    std::byte row[2 * 34];
    store_row(row, x.data(), 64, KvType::kQ8_0);
    CHECK(row[2 + 5] == std::byte{0});
    CHECK(row[34 + 2 + 8] == std::byte{0x81});  // -127
    CHECK(row[2] == (std::isnan(odd) ? std::byte{127} : std::byte{0}));
    store_row(row, x.data(), 64, KvType::kQ4_0);
    CHECK((row[2 + 5] & std::byte{15}) == std::byte{0});
    CHECK((row[18 + 2 + 8] & std::byte{15}) == std::byte{0});  // -8
    CHECK((row[2] & std::byte{15}) == (std::isnan(odd) ? std::byte{0} : std::byte{8}));
  }
  for (const float tiny : {1e-45f, -3e-44f, 1e-40f}) {
    CAPTURE(tiny);
    const std::vector<float> x(32, tiny);
    std::byte row[34];
    float back[32];
    for (const KvType type : {KvType::kQ8_0, KvType::kQ4_0}) {
      store_row(row, x.data(), 32, type);
      load_row(back, row, 32, type);
      for (const float y : back) CHECK(y == 0);
    }
  }
}

TEST_CASE("kv store: shapes that are not sane are refused before any allocation") {
  CHECK_THROWS_AS(make_kv_store(shape(KvType::kF16, 0)), Error);
  CHECK_THROWS_AS(make_kv_store({-1, 1, 1, 1, KvType::kF16}), Error);
  CHECK_THROWS_AS(make_kv_store({2000000000, 2000000000, 2000000000, 2000000000, KvType::kF32}),
                  Error);
}

TEST_CASE("halves: every f16 survives the round trip, and rounding is to nearest, ties to even") {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = f16_to_f32(static_cast<std::uint16_t>(bits));
    if ((bits & 0x7fff) > 0x7c00) {
      CHECK(std::isnan(x));
    } else if (f32_to_f16(x) != bits) {
      FAIL("f16 bits " << bits);
    }
  }
  CHECK(f32_to_f16(65519.996f) == 0x7bff);
  CHECK(f32_to_f16(65520.0f) == 0x7c00);
  CHECK(f32_to_f16(1.0f + 0x1p-11f) == 0x3c00);      // a tie: to even
  CHECK(f32_to_f16(1.0f + 3 * 0x1p-11f) == 0x3c02);  // a tie: to even, upwards
  CHECK(f32_to_f16(0x1p-25f) == 0);                  // half of the smallest subnormal: to even
  CHECK(f32_to_f16(0x1.8p-24f) == 2);                // 1.5 of it
  CHECK(f32_to_bf16(1.0f + 0x1p-8f) == 0x3f80);
  CHECK(f32_to_bf16(1.0f + 3 * 0x1p-8f) == 0x3f82);
  CHECK(std::isnan(bf16_to_f32(f32_to_bf16(std::bit_cast<float>(0x7f800001u)))));
  std::vector<std::uint16_t> all(0x10000);
  std::vector<float> wide(0x10000);
  for (std::uint32_t i = 0; i < 0x10000; ++i) all[i] = static_cast<std::uint16_t>(i);
  widen_f16(wide.data(), all.data(), 0x7c00 + 1 + 2);  // an odd length, up to infinity
  for (std::uint32_t i = 0; i <= 0x7c00; ++i) CHECK(wide[i] == f16_to_f32(all[i]));
}

TEST_CASE("ghost: the example of docs/kvstore.md, by hand") {
  const float mean[] = {1, -1}, k[] = {2.2f, -1.5f}, q[] = {1, 2};
  const GhostFormat format{2, 0, 2};
  const GhostCentre centre{mean, mean, 0.824f, 1};
  std::vector<std::byte> group(format.group_bytes());
  write_ghost(group.data(), format, 5, k, k, centre, nullptr);
  float key[2];
  read_ghost_key(key, group.data(), format, 5, centre);
  CHECK(key[0] == doctest::Approx(-1.5 * 0.824).epsilon(1.0 / 64));
  CHECK(key[1] == doctest::Approx(-0.5 * 0.824).epsilon(1.0 / 64));
  GhostQuery query;
  GhostRope rope({}, 2);  // no RoPE: the centre is the same everywhere
  rope.grow(GhostRope::kSpan);
  prepare_query(query, q, mean, rope, format);
  float scores[GhostRope::kSpan];
  rope.score_centre(scores, GhostRope::kSpan, &query, 1, 0, 1);
  score_ghosts(scores, kGhostGroup, &query, 1, group.data(), format, centre.key_unit);
  CHECK(scores[5] == doctest::Approx(-1.0).epsilon(0.02));  // 8 bits of query and scale
  const PolicyParams p;
  for (const auto& [hits, steps] : {std::pair(1, 1), {3, 2}, {4, 3}, {100, 15}})
    CHECK(stay_steps(p, hits) == steps);
  for (const auto& [low, steps] : {std::pair(3, 0), {4, 1}, {15, 1}, {16, 2}})
    CHECK(sleep_steps(p, low) == steps);
}
