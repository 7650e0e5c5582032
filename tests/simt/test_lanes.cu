// Lanes on the device against Residency, decision by decision: who has which row, and for every
// token its hits, its timer and its rank, bit for bit; bounds come and go at random.
#include <doctest/doctest.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "kvstore/lanes_cuda.h"
#include "kvstore/residency.h"
#include "kvstore/tiers.h"
#include "tests/sanitized.h"
#include "tests/simt/both_stores.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

constexpr int kHeads = 2, kCapacity = 700;
const KvShape kShape{1, kHeads, 8, kCapacity, KvType::kF16, {}};

class BothLanes {
 public:
  BothLanes(const PolicyParams& params, std::uint64_t seed)
      : params_(params),
        n_heads_(params.policy == Policy::kThaw && params.per_head ? 1 : kHeads),
        pinned_(make_pinned_pages()),
        memory_(make_memory_pages()),
        device_(make_device_pages(stream_)),
        cold_(*pinned_, kShape, false),
        table_(tier_pages(kCapacity), "table"),
        arena_(*memory_, 2 * 16 * static_cast<std::size_t>(n_heads_), 100000),
        cuda_(*device_, kShape, params_, n_heads_, cold_rows(), 100000, stream_),
        moment_(1, "moment"),
        bounds_(1, "bounds"),
        random_(seed) {
    for (int head = 0; head < kHeads; head += n_heads_)
      cpu_.emplace_back(arena_, kShape, params_, 0, head, n_heads_);
  }

  void prefill(int n) {
    grow(n);
    const DeviceMoment now = at(kv_len_, kCapacity);
    cuda_.reserve_statistics(kv_len_);
    const DeviceStats to = cuda_.exact_stats();
    for (std::size_t i = 0; i < cpu_.size(); ++i) {
      AttentionStats::Lane stats = statistics(kv_len_);
      send(to.probability + i * static_cast<std::size_t>(to.stride), stats.probability);
      if (to.relevance)
        send(to.relevance + i * static_cast<std::size_t>(to.stride), stats.relevance);
      send(to.entropy + i, std::vector<float>{stats.entropy});
      cpu_[i].learn(stats, 7, kv_len_);
    }
    send_moment(now);
    cuda_.work(moment_.data(), bounds_.data()).learn(0, to, 7);
    compare();
  }

  void seed(int bound) {
    for (Residency& lane : cpu_) lane.clear_for_seed(host_moment(bound));
    for (Residency& lane : cpu_) lane.seed(host_moment(bound));
    send_moment(at(kv_len_, bound));
    const auto choose = [&] { cuda_.work(moment_.data(), bounds_.data()).choose(); };
    choose();
    stream_.synchronize();
    int most = kv_len_;
    for (int i = 0; i < cuda_.n_lanes(); ++i) most = std::max(most, cuda_.report(i).n_chosen);
    cuda_.reserve_rows(most);
    cuda_.work(moment_.data(), bounds_.data()).seed();
    compare();
  }

  void step(int bound) {
    grow(1);
    send_moment(at(kv_len_, bound));
    cuda_.reserve_rows(kv_len_);
    for (Residency& lane : cpu_) lane.make_room(host_moment(bound), 1);
    cuda_.work(moment_.data(), bounds_.data()).make_room();
    compare();
    std::vector<int> rows;
    for (Residency& lane : cpu_) rows.push_back(lane.lane().n_rows() + 1);
    cuda_.reserve_pages(rows);
    cuda_.share_pages(rows);
    for (Residency& lane : cpu_) lane.append(host_moment(bound), kv_len_ - 1);
    cuda_.work(moment_.data(), bounds_.data()).place();
    compare();
    settle(bound);
    ++step_;
  }

  void reset(Rung rung, int bound) {
    send_moment(at(kv_len_, bound));
    const LaneWork work = cuda_.work(moment_.data(), bounds_.data());
    if (rung == Rung::kFull) {
      work.forget();
      for (Residency& lane : cpu_) lane.reset(rung, host_moment(bound));
      return compare();
    }
    work.choose_woken(rung);
    stream_.synchronize();
    int most = kv_len_;
    for (std::size_t i = 0; i < cpu_.size(); ++i) {
      const int n_chosen = cuda_.report(static_cast<int>(i)).n_chosen;
      cpu_[i].reset(rung, host_moment(bound));
      CHECK(n_chosen == cpu_[i].lane().n_rows());
      most = std::max(most, n_chosen);
    }
    cuda_.reserve_rows(most);
    cuda_.work(moment_.data(), bounds_.data()).wake();
    compare();
  }

  void cut(int position, int bound) {
    const int length = kv_len_;
    kv_len_ = position;
    send_moment(at(position, bound));
    std::vector<char> complete;
    for (Residency& lane : cpu_) complete.push_back(lane.cut(host_moment(bound), position));
    cuda_.work(moment_.data(), bounds_.data()).cut(position, length);
    compare();
    for (std::size_t i = 0; i < cpu_.size(); ++i)
      CHECK(cuda_.report(static_cast<int>(i)).complete == complete[i]);
  }

  int length() const { return kv_len_; }
  int n_promoted = 0, n_thawed = 0, n_frozen = 0;

 private:
  DeviceRows cold_rows() const {
    const KvRows r = cold_.rows(0, 0);
    return {table_.data(), r.offset, r.value_offset, r.head_stride, r.row_bytes, r.page_shift};
  }

  template <class T>
  void send(T* to, const std::vector<T>& from) {
    copy_to_device(to, from.data(), from.size(), stream_);
  }

  void grow(int n) {
    cold_.reserve(kv_len_ + n);
    const auto pages = cold_.rows(0, 0).pages;
    copy_to_device(table_.data(), pages.data(), pages.size(), stream_);
    cuda_.reserve_tokens(kv_len_ + n);
    for (; n > 0; --n, ++kv_len_) {
      const std::vector<float> k = random_.normals(16), v = random_.normals(16);
      cold_.write(0, kv_len_, k.data(), v.data());
    }
    for (Residency& lane : cpu_) lane.grow(kv_len_);
  }

  DeviceMoment at(int kv_len, int bound) {
    bound_ = std::min(bound, kv_len);
    return {{kv_len - 1, kv_len}, step_, kv_len >= 20, params_.epsilon};
  }
  Moment host_moment(int bound) {
    Moment now;
    now.kv_len = kv_len_;
    now.step = step_;
    now.bound = std::min(bound, kv_len_);
    now.epsilon = params_.epsilon;
    now.can_freeze = kv_len_ >= 20;
    now.cold = cold_.rows(0, kv_len_);
    return now;
  }
  void send_moment(const DeviceMoment& now) {
    copy_to_device(moment_.data(), &now, 1, stream_);
    copy_to_device(bounds_.data(), &bound_, 1, stream_);
  }

  float draw() {
    const int kind = random_.below(4);
    return kind == 0   ? 0.0f
           : kind == 1 ? 0.004f
           : kind == 2 ? 0.02f
                       : static_cast<float>(random_.below(1000)) / 50000;
  }
  AttentionStats::Lane statistics(int n) {
    AttentionStats::Lane stats;
    for (int i = 0; i < n; ++i)
      stats.probability.push_back(draw()), stats.relevance.push_back(100 * draw());
    stats.entropy = 100 * draw();
    stats.ghost_mass = draw();
    return stats;
  }

  void settle(int bound) {
    const DeviceStats to = cuda_.decode_stats(0);
    for (std::size_t i = 0; i < cpu_.size(); ++i) {
      AttentionStats::Lane stats = statistics(cpu_[i].lane().n_rows());
      std::vector<std::int32_t> tokens;
      std::vector<float> probabilities;
      for (std::int32_t t = 0; to.n_recalled && kv_len_ >= 20 && t < kv_len_; ++t) {
        if (cpu_[i].lane().is_hot(t) || random_.below(9) != 0) continue;
        tokens.push_back(t), probabilities.push_back(draw());
        stats.recalled.push_back({t, probabilities.back()});
      }
      const std::size_t row = i * static_cast<std::size_t>(to.stride);
      send(to.probability + row, stats.probability);
      if (to.relevance) send(to.relevance + row, stats.relevance);
      send(to.entropy + i, std::vector<float>{stats.entropy});
      send(to.ghost_mass + i, std::vector<float>{stats.ghost_mass});
      if (to.n_recalled) {
        const std::size_t first = i * static_cast<std::size_t>(to.recalled_room);
        REQUIRE(std::ssize(tokens) <= to.recalled_room);
        send(to.n_recalled + i, std::vector<std::int32_t>{static_cast<int>(tokens.size())});
        send(to.recalled + first, tokens);
        send(to.recalled_probability + first, probabilities);
      }
      cpu_[i].settle(host_moment(bound), stats);
    }
    cuda_.work(moment_.data(), bounds_.data()).settle();
    compare();
    for (std::size_t i = 0; i < cpu_.size(); ++i) {
      const Residency::Tally tally = cpu_[i].take_tally();
      const LaneReport& report = cuda_.report(static_cast<int>(i));
      LaneTally& all = tallies_[i];
      all.promoted += tally.promoted, all.thawed += tally.thawed, all.frozen += tally.frozen;
      CHECK(report.tally.promoted == all.promoted);
      CHECK(report.tally.thawed == all.thawed);
      CHECK(report.tally.frozen == all.frozen);
      n_promoted += tally.promoted, n_thawed += tally.thawed, n_frozen += tally.frozen;
    }
  }

  void compare() {
    for (std::size_t i = 0; i < cpu_.size(); ++i) {
      const LaneSnapshot cuda = cuda_.snapshot(static_cast<int>(i), kv_len_);
      const Residency& cpu = cpu_[i];
      REQUIRE(std::ranges::equal(cuda.tokens, cpu.lane().tokens()));
      const auto n = static_cast<std::size_t>(kv_len_);
      REQUIRE(std::equal(cpu.hits().begin(), cpu.hits().begin() + kv_len_, cuda.hits.begin()));
      REQUIRE(std::equal(cpu.timers().begin(), cpu.timers().begin() + kv_len_, cuda.timer.begin()));
      REQUIRE(std::equal(cpu.scores().begin(), cpu.scores().begin() + kv_len_, cuda.score.begin()));
      int n_wrong = 0;
      for (std::size_t t = 0; t < n; ++t)
        n_wrong += (cuda.mask[t / 32] >> t % 32 & 1) != cpu.lane().is_hot(static_cast<int>(t));
      CHECK(n_wrong == 0);
      const LaneReport& report = cuda_.report(static_cast<int>(i));
      CHECK(report.n_rows == cpu.lane().n_rows());
      CHECK(report.entropy == cpu.entropy());
      CHECK(report.ghost_mass == cpu.ghost_mass());
      CHECK(report.tau == cpu.tau());
    }
  }

  Stream stream_;
  PolicyParams params_;
  int n_heads_, kv_len_ = 0;
  std::int32_t bound_ = 0, step_ = 0;
  std::unique_ptr<PageSource> pinned_, memory_, device_;
  ColdTier cold_;
  DeviceBuffer<const std::byte*> table_;
  HotArena arena_;
  CudaLanes cuda_;
  DeviceBuffer<DeviceMoment> moment_;
  DeviceBuffer<std::int32_t> bounds_;
  std::vector<Residency> cpu_;
  LaneTally tallies_[kHeads] = {};
  testing::Random random_;
};

}  // namespace

TEST_CASE("cuda lanes: hits, timers, ranks and rows are those of the CPU after every decision") {
  int promoted = 0, thawed = 0, frozen = 0;
  for (const Policy policy :
       {Policy::kThaw, Policy::kWindow, Policy::kH2o, Policy::kBudget, Policy::kAsr}) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    PolicyParams params;
    params.policy = policy;
    params.window = 5, params.sinks = 3;
    params.epsilon = 0.004f, params.softness = 0.4f;
    testing::Random random(3 + static_cast<int>(policy));
    const int n_rounds = simt::kIsSlow ? 2 : 14;
    BothLanes both(params, 17);
    for (int round = 0; round < n_rounds; ++round) {
      const auto bound = [&] { return random.below(3) == 0 ? kCapacity : 9 + random.below(40); };
      both.prefill(1 + random.below(round == 3 ? 200 : 30));
      both.seed(bound());
      for (int i = random.below(simt::kIsSlow ? 3 : 9); i >= 0; --i) both.step(bound());
      if (random.below(2) == 0) {
        both.reset(static_cast<Rung>(1 + random.below(3)), bound());
        for (int i = random.below(3); i > 0; --i) both.step(bound());
      }
      if (random.below(2) == 0) both.cut(random.below(both.length() + 1), bound());
    }
    promoted += both.n_promoted, thawed += both.n_thawed, frozen += both.n_frozen;
  }
  CHECK((simt::kIsSlow || promoted > 100));
  CHECK((simt::kIsSlow || thawed > 100));
  CHECK((simt::kIsSlow || frozen > 1000));
}
