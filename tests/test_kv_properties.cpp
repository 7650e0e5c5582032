// The store's invariants over random histories of everything that can happen to it, against a
// shadow that is kept here: what was appended, rounded as the store rounds it.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "device/error.h"
#include "kvstore/kvstore.h"
#include "kvstore/row.h"
#include "tests/sanitized.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr int kHistories = 10000, kSlowHistories = 2500;
constexpr int kCapacity = 200;

// A store, random steps on it, and what it must hold.
class History {
 public:
  explicit History(std::uint64_t seed) : random_(seed) {
    shape_ = {1 + random_.below(2), 1 + random_.below(3), 6 + 2 * random_.below(6), kCapacity,
              static_cast<KvType>(random_.below(3))};
    if (one_in(8)) {
      shape_.head_dim = 32;
      shape_.type = one_in(2) ? KvType::kQ8_0 : KvType::kQ4_0;
    }
    PolicyParams& p = options_.policy;
    p.policy = one_in(2) ? Policy::kThaw : static_cast<Policy>(random_.below(6));
    p.window = random_.below(6);
    p.sinks = random_.below(4);
    p.epsilon = 0.05f;
    p.stay = static_cast<float>(random_.below(4));
    p.softness = static_cast<float>(0.1 + random_.uniform());
    p.quantile = static_cast<float>(random_.uniform());
    p.ghost_key_bits = random_.below(5);
    constexpr int kValueBits[] = {0, 1, 2, 4};
    p.ghost_value_bits = kValueBits[p.ghost_key_bits == 0 ? 0 : random_.below(4)];
    p.per_head = one_in(2);
    options_.centre_tokens = 1 + random_.below(12);
    if (one_in(2)) options_.freeze_from = random_.below(60);
    options_.check = true;
    least_ = p.sinks + p.window + 1;
    if (p.policy != Policy::kFull) choose_bound();
    kv_ = make_kv_store(shape_, options_);
    k_.resize(static_cast<std::size_t>(shape_.n_layers));
    v_.resize(k_.size());
  }

  void run(int n_operations) {
    for (int i = 0; i < n_operations; ++i) {
      operate();
      kv_->check();
      check_cold();
    }
    check_ghosts();
  }

 private:
  bool one_in(int n) { return random_.below(n) == 0; }

  void choose_bound() {
    const std::int64_t page = 8 * shape_.bytes_per_token();
    switch (random_.below(4)) {
      case 1:
        options_.hot_fraction = 0.05 + 0.9 * random_.uniform();
        break;
      case 2:
        options_.hot_tokens = least_ + random_.below(12);
        break;
      case 3:
        options_.hot_bytes = ((least_ + 7) / 8 + random_.below(2)) * page + random_.below(100);
    }
  }

  void operate() {
    switch (random_.below(12)) {
      case 0:
      case 1:
        return prefill(1 + random_.below(one_in(20) ? 90 : 14));
      case 2:
        return rewind(random_.below(length_ + 1));
      case 3:
        return rewind(std::max(0, length_ - random_.below(5)));
      case 4:
        kv_->reset(static_cast<Rung>(random_.below(5)));
        return;
      case 5:
        return one_in(4) ? rewind(0), kv_->clear() : broken_step();
      default:
        for (int n = 1 + random_.below(6); n > 0; --n) decode();
    }
  }

  void prefill(int n) {
    n = std::min(n, kCapacity - length_);
    if (n == 0) return;
    kv_->begin(n, one_in(4) ? Phase::kRestore : Phase::kPrefill);
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      append(layer, n);
      CHECK(kv_->view(layer).lanes.empty());
      settle(layer, n);
    }
    length_ += n;
  }

  void decode() {
    if (length_ == kCapacity) return;
    kv_->begin(1, Phase::kDecode);
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      append(layer, 1);
      check_hot(layer);
      settle(layer, 1);
    }
    ++length_;
    check_bound();
  }

  // A step of which the first layer is not settled or others are not reached, and is taken back.
  void broken_step() {
    if (shape_.n_layers == 1 || length_ == kCapacity) return;
    kv_->begin(1, Phase::kDecode);
    append(0, 1);
    if (one_in(2)) settle(0, 1);
    CHECK_THROWS_AS(kv_->begin(1, Phase::kDecode), Error);
    const std::vector<float> x(static_cast<std::size_t>(heads() * shape_.head_dim), 1.0f);
    CHECK_THROWS_AS(kv_->append(0, x.data(), x.data(), 1), Error);
    for (int layer = 1; layer < shape_.n_layers; ++layer) append(layer, 1);
    CHECK_THROWS_AS(kv_->begin(1, Phase::kDecode), Error);
    rewind(length_);
    CHECK_THROWS_AS(kv_->append(0, x.data(), x.data(), 1), Error);
  }

  void rewind(int position) {
    kv_->rewind(position);
    length_ = position;
    for (auto* tensors : {&k_, &v_})
      for (auto& layer : *tensors) layer.resize(static_cast<std::size_t>(position * heads()));
    CHECK(kv_->length() == position);
  }

  int heads() const { return shape_.n_kv_heads; }

  void append(int layer, int n) {
    const int width = heads() * shape_.head_dim;
    const std::vector<float> k = random_.normals(n * width), v = random_.normals(n * width);
    kv_->append(layer, k.data(), v.data(), n);
    const auto remember = [&](std::vector<std::vector<std::byte>>& to,
                              const std::vector<float>& x) {
      for (int i = 0; i < n * heads(); ++i) {
        to.emplace_back(kv_row_bytes(shape_.type, shape_.head_dim));
        store_row(to.back().data(), &x[i * shape_.head_dim], shape_.head_dim, shape_.type);
      }
    };
    remember(k_[layer], k), remember(v_[layer], v);
  }

  float probability() {
    const double u = random_.uniform();
    return static_cast<float>(u < 0.8 ? u * 0.05 : u < 0.95 ? 0.05 : u * 0.5);
  }

  // What attention might have seen: any numbers, with the form that the view asks for.
  void settle(int layer, int n) {
    const KvView view = kv_->view(layer);
    AttentionStats stats;
    stats.n_rows = view.lanes.empty() ? kv_->stats_rows(n) : 1;
    const std::size_t n_lanes = static_cast<std::size_t>(heads() / view.lane_heads);
    for (std::size_t i = 0; stats.n_rows > 0 && i < n_lanes; ++i) {
      AttentionStats::Lane& lane = stats.lanes.emplace_back();
      lane.entropy = static_cast<float>(4 * random_.uniform());
      lane.ghost_mass = probability();
      const int rows = view.lanes.empty() ? view.kv_len : view.lanes[i].hot.n_rows;
      for (int row = 0; row < rows; ++row) {
        lane.probability.push_back(probability());
        lane.relevance.push_back(std::fabs(random_.normal()));
      }
      if (view.lanes.empty() || !view.ghosts.present()) continue;
      for (int t = 0; t < view.kv_len; ++t)
        if (!is_hot(view.lanes[i], t) && one_in(8)) lane.recalled.push_back({t, probability()});
    }
    kv_->settle(layer, stats);
  }

  static bool is_hot(const LaneView& lane, int token) {
    const auto word = static_cast<std::size_t>(token / 32);
    return word < lane.hot_mask.size() && (lane.hot_mask[word] >> token % 32 & 1) != 0;
  }

  bool same(const std::byte* a, const std::vector<std::byte>& b) const {
    return std::memcmp(a, b.data(), b.size()) == 0;
  }

  void check_cold() const {
    REQUIRE(kv_->length() == length_);
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      const KvView view = kv_->view(layer);
      REQUIRE(view.kv_len == length_);
      int wrong = 0;
      for (int i = 0; i < length_ * heads(); ++i)
        wrong += !same(view.cold.key(i % heads(), i / heads()), k_[layer][i]) ||
                 !same(view.cold.value(i % heads(), i / heads()), v_[layer][i]);
      CHECK(wrong == 0);
    }
  }

  // In a decode step: hot rows are the cold ones, each token once; who must be hot is.
  void check_hot(int layer) const {
    const KvView view = kv_->view(layer);
    const PolicyParams& p = options_.policy;
    const bool all = p.policy == Policy::kThaw && p.ghost_key_bits > 0 && !view.ghosts.present();
    if (awake()) CHECK((view.lanes.empty() && !view.ghosts.present()));
    for (std::size_t i = 0; i < view.lanes.size(); ++i) {
      const LaneView& lane = view.lanes[i];
      REQUIRE(std::ssize(lane.tokens) == lane.hot.n_rows);
      std::vector<char> hot(static_cast<std::size_t>(view.kv_len));
      int wrong = 0;
      for (int row = 0; row < lane.hot.n_rows; ++row) {
        const int token = lane.tokens[row];
        REQUIRE((token >= 0 && token < view.kv_len));
        wrong += hot[token]++ != 0 || !is_hot(lane, token);
        for (int h = 0; h < view.lane_heads; ++h) {
          const int at = token * heads() + static_cast<int>(i) * view.lane_heads + h;
          wrong += !same(lane.hot.key(h, row), k_[layer][at]) ||
                   !same(lane.hot.value(h, row), v_[layer][at]);
        }
      }
      for (int t = 0; t < view.kv_len; ++t) {
        const bool must = all || t < p.sinks || t >= view.kv_len - p.window;
        wrong += is_hot(lane, t) != hot[t] || (!hot[t] && must);
      }
      CHECK(wrong == 0);
    }
  }

  // Of a step that has begun: nothing freezes yet.
  bool awake() const {
    const int most = options_.hot_tokens > 0 ? options_.hot_tokens : kCapacity;
    return options_.policy.policy == Policy::kThaw && options_.hot_fraction == 0 &&
           options_.hot_bytes == 0 && length_ + 1 < std::min(options_.freeze_from, most);
  }

  // After a decode step.
  void check_bound() const {
    const PolicyParams& p = options_.policy;
    if (options_.hot_bytes > 0) CHECK(kv_->usage().hot <= options_.hot_bytes);
    double most = options_.hot_tokens;
    if (options_.hot_fraction > 0)
      most = std::max({std::ceil(options_.hot_fraction * length_), 1.0 * least_,
                       p.policy == Policy::kThaw ? 1.0 * options_.centre_tokens : 0.0});
    if (most == 0) return;
    double rows = 0, lanes = 0;
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      for (const LaneView& lane : kv_->view(layer).lanes) {
        rows += lane.hot.n_rows, ++lanes;
        if (p.policy != Policy::kBudget) CHECK(lane.hot.n_rows <= most);
      }
    }
    CHECK(rows <= lanes * most);
  }

  // Each ghost is what write_ghost() makes of the token, after those before it in its chain.
  void check_ghosts() const {
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      const KvView view = kv_->view(layer);
      if (!view.ghosts.present()) continue;
      std::vector<float> k(static_cast<std::size_t>(shape_.head_dim)), v = k, is = k, should = k;
      std::vector<std::byte> group(view.ghosts.format.group_bytes());
      std::vector<float> carry(k.size());
      for (int n = 0; n < length_ * heads(); ++n) {
        const int token = n % length_, head = n / length_, i = token * heads() + head;
        load_row(k.data(), k_[layer][i].data(), shape_.head_dim, shape_.type);
        load_row(v.data(), v_[layer][i].data(), shape_.head_dim, shape_.type);
        const GhostCentre& centre = view.ghosts.centres[head];
        write_ghost(group.data(), view.ghosts.format, token % 32, k.data(), v.data(), centre,
                    carry.data());
        for (const auto read : {read_ghost_key, read_ghost_value}) {
          read(is.data(), view.ghosts.group(head, token / 32), view.ghosts.format, token % 32,
               centre);
          read(should.data(), group.data(), view.ghosts.format, token % 32, centre);
          CHECK(is == should);
        }
      }
    }
  }

  testing::Random random_;
  KvShape shape_;
  KvOptions options_;
  int least_ = 0;
  std::unique_ptr<KvStore> kv_;
  std::vector<std::vector<std::vector<std::byte>>> k_, v_;  // layer, token x head, stored bytes
  int length_ = 0;
};

}  // namespace

TEST_CASE("kv store: its invariants hold after every step of many random histories") {
  const int n = testing::sanitized() ? kSlowHistories : kHistories;
  for (int seed = 0; seed < n; ++seed) {
    CAPTURE(seed);
    try {
      History(static_cast<std::uint64_t>(seed)).run(12);
    } catch (const Error& error) {
      FAIL(std::string(error.what()));
    }
  }
}
