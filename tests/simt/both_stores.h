// The same history for a store in device memory and one in host memory: the same tokens, the same
// statistics, as attention would report them, and after each step the same state.
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "kvstore/device_view.h"
#include "kvstore/kvstore.h"
#include "kvstore/pages_cuda.h"
#include "kvstore/tiered_store_cuda.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

namespace thaw::testing {

// What attention is made to say.
enum class Mood {
  kPlain,    // a few tokens matter, most do not
  kTies,     // probabilities are one of three numbers
  kAllHit,   // everybody matters
  kNoneHit,  // nobody does
};

// Of stores that hold a few hundred tokens.
inline KvOptions thaw_options() {
  KvOptions o;
  o.policy.policy = Policy::kThaw;
  o.policy.window = 6;
  o.policy.sinks = 2;
  o.policy.epsilon = 0.003f;
  o.centre_tokens = 16;
  return o;
}

// The last step that a store told, and where they are wanted all events.
class LastStep final : public KvRecorder {
 public:
  explicit LastStep(bool wants_events) : wants_events_(wants_events) {}
  bool wants_events() const override { return wants_events_; }
  void event(const KvEvent& event) override {
    if (wants_events_) events.push_back(event);
  }
  void step(const KvStep& told) override { step_ = told; }
  std::vector<KvEvent> events;
  bool same_as(const LastStep& other) const {
    const KvStep &a = step_, &b = other.step_;
    return a.step == b.step && a.length == b.length && a.cold_bytes_read == b.cold_bytes_read &&
           std::equal(a.layers.begin(), a.layers.end(), b.layers.begin(), b.layers.end(),
                      [](const auto& x, const auto& y) { return !std::memcmp(&x, &y, sizeof x); });
  }

 private:
  bool wants_events_;
  KvStep step_ = {};
};

inline bool same(const KvEvent& a, const KvEvent& b) {
  return a.kind == b.kind && a.step == b.step && a.layer == b.layer && a.head == b.head &&
         a.token == b.token && a.probability == b.probability && a.hits == b.hits &&
         a.timer == b.timer;
}

// The two stores with the same tokens, of whose work nothing is waited for: it may run in any order
// that streams and events allow.
struct QueuedStores {
  QueuedStores(const KvShape& shape, const KvOptions& options, std::uint64_t seed)
      : cuda(make_cuda_tiered_store(shape, options, stream)),
        cpu(make_kv_store(shape, options)),
        random_(seed) {}

  void begin(int n, Phase phase) { cuda->begin(n, phase), cpu->begin(n, phase); }
  void append(int layer, int n) {
    const std::int64_t size = std::int64_t{n} * cpu->shape().n_kv_heads * cpu->shape().head_dim;
    const std::vector<float> k = random_.normals(size), v = random_.normals(size);
    cuda->append(layer, on_device(k), on_device(v), n);
    cpu->append(layer, k.data(), v.data(), n);
  }
  void rewind(int position) { cuda->rewind(position), cpu->rewind(position); }

  Stream stream;
  std::unique_ptr<KvStore> cuda, cpu;

 private:
  const float* on_device(const std::vector<float>& x) {
    inputs_.emplace_back(x.size(), "x");
    copy_to_device(inputs_.back().data(), x.data(), x.size(), stream);
    return inputs_.back().data();
  }

  Random random_;
  std::vector<DeviceBuffer<float>> inputs_;  // kept: giving memory back waits for everything
};

class BothStores {
 public:
  BothStores(const KvShape& shape, const KvOptions& options, std::uint64_t seed,
             bool wants_events = false)
      : cpu(make_kv_store(shape, options)),
        cuda(make_cuda_tiered_store(shape, options, stream)),
        cpu_step_(wants_events),
        cuda_step_(wants_events),
        random_(seed) {
    cpu->record(&cpu_step_), cuda->record(&cuda_step_);
  }

  void prefill(int n, Mood mood) { step(n, Phase::kPrefill, mood); }
  void restore(int n) { step(n, Phase::kRestore, Mood::kPlain); }
  void decode(int n_steps, Mood mood) {
    for (int i = 0; i < n_steps; ++i) step(1, Phase::kDecode, mood);
  }
  void rewind(int position) {
    cpu->rewind(position), cuda->rewind(position);
    compare_counters();
  }


  void reset(Rung rung, int exact_steps = kAlarmSteps) {
    const double woken = cuda->reset(rung, exact_steps);
    CHECK(cpu->reset(rung, exact_steps) == woken);
    n_woken += woken;
  }

  void step(int n, Phase phase, Mood mood) {
    const KvShape& s = cpu->shape();
    cpu->begin(n, phase), cuda->begin(n, phase);
    for (int layer = 0; layer < s.n_layers; ++layer) {
      const auto size = static_cast<std::int64_t>(n) * s.n_kv_heads * s.head_dim;
      const std::vector<float> k = random_.normals(size, 1.0f), v = random_.normals(size, 1.0f);
      const DeviceBuffer<float> dk(k.size(), "k"), dv(v.size(), "v");
      copy_to_device(dk.data(), k.data(), k.size(), stream);
      copy_to_device(dv.data(), v.data(), v.size(), stream);
      cpu->append(layer, k.data(), v.data(), n);
      cuda->append(layer, dk.data(), dv.data(), n);
      stream.synchronize();
      const KvView view = cpu->view(layer);
      const AttentionStats stats =
          view.lanes.empty() ? prompt_stats(view, n, mood) : decode_stats(view, mood);
      if (phase == Phase::kDecode) compare_hot(view, *cuda->view(layer).device);
      CHECK(cuda->view(layer).recall == view.recall);
      write_stats(stats, cuda->view(layer).device->stats);
      cpu->settle(layer, stats), cuda->settle(layer, {});
    }
    if (phase == Phase::kDecode) compare_counters();
  }

  Stream stream;
  std::unique_ptr<KvStore> cpu, cuda;
  int n_compared = 0;            // hot rows
  double n_woken = 0;            // tokens, by reset()
  std::size_t n_events[6] = {};  // a kind

 private:
  float draw(Mood mood) {
    const float x = static_cast<float>(random_.below(1000)) / 1000;
    if (mood == Mood::kAllHit) return 0.5f + x / 4;
    if (mood == Mood::kNoneHit) return 0;
    if (mood == Mood::kTies) return x < 0.5f ? 0.0f : x < 0.8f ? 0.004f : 0.02f;
    return x * x * x * x * x * x * x * x * 0.3f;
  }

  void fill(AttentionStats::Lane& lane, std::size_t n, Mood mood) {
    for (std::size_t i = 0; i < n; ++i) {
      lane.probability.push_back(draw(mood));
      lane.relevance.push_back(20 * draw(mood));
    }
    lane.entropy = 4 * draw(Mood::kPlain) + 0.5f;
  }

  AttentionStats prompt_stats(const KvView& view, int n, Mood mood) {
    AttentionStats stats;
    stats.n_rows = cpu->stats_rows(n);
    CHECK(cuda->stats_rows(n) == stats.n_rows);
    if (stats.n_rows == 0) return stats;
    stats.lanes.resize(static_cast<std::size_t>(view.n_kv_heads / view.lane_heads));
    for (AttentionStats::Lane& lane : stats.lanes)
      fill(lane, static_cast<std::size_t>(view.kv_len), mood);
    return stats;
  }

  AttentionStats decode_stats(const KvView& view, Mood mood) {
    AttentionStats stats;
    stats.n_rows = 1;
    for (const LaneView& hot : view.lanes) {
      AttentionStats::Lane& lane = stats.lanes.emplace_back();
      fill(lane, hot.tokens.size(), mood);
      lane.ghost_mass = draw(Mood::kPlain);
      for (std::int32_t t = 0; view.ghosts.present() && t < view.kv_len; ++t) {
        const bool is_hot = (hot.hot_mask[t / 32] >> t % 32 & 1) != 0;
        if (!is_hot && random_.below(8) == 0) lane.recalled.push_back({t, draw(mood)});
      }
    }
    return stats;
  }

  // As attention does.
  void write_stats(const AttentionStats& stats, const DeviceStats& to) {
    for (std::size_t i = 0; i < stats.lanes.size(); ++i) {
      const AttentionStats::Lane& lane = stats.lanes[i];
      const auto at = i * static_cast<std::size_t>(to.stride);
      REQUIRE(lane.probability.size() <= static_cast<std::size_t>(to.stride));
      copy_to_device(to.probability + at, lane.probability.data(), lane.probability.size(), stream);
      if (to.relevance)
        copy_to_device(to.relevance + at, lane.relevance.data(), lane.relevance.size(), stream);
      copy_to_device(to.entropy + i, &lane.entropy, 1, stream);
      if (to.ghost_mass) copy_to_device(to.ghost_mass + i, &lane.ghost_mass, 1, stream);
      if (!to.n_recalled) continue;
      std::vector<std::int32_t> tokens;
      std::vector<float> probabilities;
      for (const AttentionStats::Recall& r : lane.recalled)
        tokens.push_back(r.token), probabilities.push_back(r.probability);
      const auto n = static_cast<std::int32_t>(tokens.size());
      REQUIRE(n <= to.recalled_room);
      const auto first = i * static_cast<std::size_t>(to.recalled_room);
      copy_to_device(to.n_recalled + i, &n, 1, stream);
      copy_to_device(to.recalled + first, tokens.data(), tokens.size(), stream);
      copy_to_device(to.recalled_probability + first, probabilities.data(), tokens.size(), stream);
    }
  }

  template <class T>
  std::vector<T> read(const T* from, std::size_t n) const {
    std::vector<T> to(n);
    copy_to_host(to.data(), from, n, stream);
    return to;
  }

  // Tokens in each row, marks by token, and the bytes of the rows.
  void compare_hot(const KvView& view, const DeviceView& device) {
    const DeviceHot& hot = device.hot;
    REQUIRE(hot.n_lanes == static_cast<int>(view.lanes.size()));
    const std::int32_t kv_len = read(device.kv_len, 1)[0];
    CHECK(kv_len == view.kv_len);
    if (hot.n_lanes == 0) return;
    REQUIRE(hot.lane_heads == view.lane_heads);
    const float recall = read(device.recall, 1)[0];
    CHECK(recall == view.recall);
    const std::vector<std::int32_t> n_rows = read(hot.n_rows, view.lanes.size());
    for (std::size_t i = 0; i < view.lanes.size(); ++i) {
      const LaneView& lane = view.lanes[i];
      const std::size_t n = lane.tokens.size();
      REQUIRE(n_rows[i] == static_cast<int>(n));
      const auto tokens = read(hot.tokens + i * static_cast<std::size_t>(hot.room), n);
      REQUIRE(std::equal(tokens.begin(), tokens.end(), lane.tokens.begin()));
      const std::size_t words = static_cast<std::size_t>((view.kv_len + 31) / 32);
      const auto mask = read(hot.mask + i * static_cast<std::size_t>(hot.mask_words), words);
      for (std::size_t w = 0; w < words; ++w)
        REQUIRE(mask[w] == (w < lane.hot_mask.size() ? lane.hot_mask[w] : 0));
      if (++n_lanes_compared_ % 3 == 0) compare_rows(lane, hot, static_cast<int>(i));
    }
  }

  void compare_rows(const LaneView& lane, const DeviceHot& hot, int i) {
    const int n = static_cast<int>(lane.tokens.size());
    const auto pages =
        read(hot.rows.pages + static_cast<std::ptrdiff_t>(i) * hot.lane_pages,
             static_cast<std::size_t>((n + hot.rows.page_rows() - 1) / hot.rows.page_rows()));
    const std::size_t bytes = hot.rows.head_stride * static_cast<std::size_t>(hot.lane_heads);
    int n_wrong = 0;
    for (int first = 0; first < n; first += hot.rows.page_rows()) {
      const auto page = read(pages[static_cast<std::size_t>(first / hot.rows.page_rows())], bytes);
      for (int row = first; row < std::min(n, first + hot.rows.page_rows()); ++row) {
        for (int head = 0; head < hot.lane_heads; ++head) {
          const std::size_t at = static_cast<std::size_t>(head) * hot.rows.head_stride +
                                 static_cast<std::size_t>(row - first) * hot.rows.row_bytes;
          n_wrong += std::memcmp(&page[at], lane.hot.key(head, row), hot.rows.row_bytes) != 0;
          ++n_compared;
        }
      }
    }
    CHECK(n_wrong == 0);
  }

  void compare_counters() {
    const KvCounters &a = cpu->counters(), &b = cuda->counters();
    CHECK(a.steps == b.steps);
    CHECK(a.attended == b.attended);
    CHECK(a.visible == b.visible);
    CHECK(a.recalled == b.recalled);
    CHECK(a.thawed == b.thawed);
    CHECK(a.frozen == b.frozen);
    CHECK(a.cold_bytes_read == b.cold_bytes_read);
    CHECK(a.cold_bytes_visible == b.cold_bytes_visible);
    CHECK(cpu_step_.same_as(cuda_step_));
    compare_events();
    const auto ghost_mass = cuda->ghost_mass();
    CHECK(cpu->ghost_mass() == ghost_mass);
  }

  void compare_events() {
    REQUIRE(cpu_step_.events.size() == cuda_step_.events.size());
    for (std::size_t i = 0; i < cpu_step_.events.size(); ++i) {
      const KvEvent& event = cpu_step_.events[i];
      CAPTURE(i);
      CAPTURE(int{event.kind});
      REQUIRE(same(event, cuda_step_.events[i]));
      ++n_events[event.kind];
    }
    cpu_step_.events.clear(), cuda_step_.events.clear();
  }

  LastStep cpu_step_, cuda_step_;
  Random random_;
  int n_lanes_compared_ = 0;
};

}  // namespace thaw::testing
