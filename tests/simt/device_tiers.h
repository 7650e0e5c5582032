// Both tiers of a layer of a store in host memory, copied to the device, and room for statistics:
// what attention over two tiers is tested with.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "kvstore/device_view.h"
#include "tests/simt/device_pages.h"

namespace thaw::testing {

// A table of pages, of which the host has a copy.
class CopiedPages {
 public:
  CopiedPages(int n_pages, std::size_t page_bytes, const Stream& stream)
      : host_(static_cast<std::size_t>(n_pages), std::vector<std::byte>(page_bytes)),
        table_(static_cast<std::size_t>(n_pages), "table") {
    std::vector<const std::byte*> table;
    for (int i = 0; i < n_pages; ++i) {
      pages_.emplace_back(page_bytes, "page");
      table.push_back(pages_.back().data());
    }
    copy_to_device(table_.data(), table.data(), table.size(), stream);
    stream.synchronize();
  }
  std::byte* at(int page, std::size_t byte) { return &host_[static_cast<std::size_t>(page)][byte]; }
  const std::byte* const* table() const { return table_.data(); }
  void send(const Stream& stream) const {
    for (std::size_t i = 0; i < pages_.size(); ++i)
      copy_to_device(pages_[i].data(), host_[i].data(), host_[i].size(), stream);
  }

 private:
  std::vector<std::vector<std::byte>> host_;
  std::vector<DeviceBuffer<std::byte>> pages_;
  DeviceBuffer<const std::byte*> table_;
};

// Hot rows stand in small pages of a layout of their own.
class DeviceTiers {
 public:
  // For views of the shape of this one, of up to `capacity` tokens.
  DeviceTiers(const KvView& view, int capacity, const Stream& stream)
      : stream_(stream),
        n_lanes_(static_cast<int>(view.lanes.size())),
        lane_heads_(view.lane_heads),
        room_(capacity),
        format_(view.ghosts.format),
        kv_row_(kv_row_bytes(view.type, view.head_dim)),
        lane_pages_((capacity + kPageRows - 1) / kPageRows),
        cold_(tier_pages(capacity), 2 * kTierTokens * view.n_kv_heads * kv_row_, stream),
        hot_(n_lanes_ * lane_pages_, kHotOffset + 2 * kPageRows * lane_heads_ * kv_row_, stream),
        ghosts_(format_.present() ? (capacity - 1) / kGhostGroup / kPageGroups + 1 : 0,
                kGhostOffset + kPageGroups * view.n_kv_heads * format_.group_bytes(), stream) {
    const auto lanes = static_cast<std::size_t>(n_lanes_), room = static_cast<std::size_t>(room_);
    const auto heads = static_cast<std::size_t>(view.n_kv_heads);
    mask_words_ = (capacity + 31) / 32;
    tokens_ = DeviceBuffer<std::int32_t>(lanes * room, "tokens");
    mask_ = DeviceBuffer<std::uint32_t>(lanes * static_cast<std::size_t>(mask_words_), "mask");
    counts_ = DeviceBuffer<std::int32_t>(2 * lanes + 1, "counts");  // hot rows, recalled, kv_len
    floats_ = DeviceBuffer<float>(4 * lanes * room + 2 * lanes + 1, "statistics");
    recalled_ = DeviceBuffer<std::int32_t>(lanes * room, "recalled");
    const std::size_t dim = static_cast<std::size_t>(view.head_dim);
    centres_ = DeviceBuffer<float>(heads * (2 * dim + 2), "centres");
    fill_device(centres_.data(), 0, centres_.bytes(), stream_);
    point(view);
    update(view);
  }
  DeviceTiers(const DeviceTiers&) = delete;
  DeviceTiers& operator=(const DeviceTiers&) = delete;

  // Other contents behind the same pointers.
  void update(const KvView& view) {
    view_ = view;
    view_.device = &device_;
    counts_host_.assign(2 * static_cast<std::size_t>(n_lanes_) + 1, -1);
    for (int t = 0; t < view.kv_len; ++t)
      for (int head = 0; head < view.n_kv_heads; ++head)
        copy_row(cold_.at(t / kTierTokens, at_row(head, t % kTierTokens, kTierTokens)), view.cold,
                 head, t);
    cold_.send(stream_);
    for (int i = 0; i < n_lanes_; ++i) update_lane(view, i);
    hot_.send(stream_);
    counts_host_.back() = view.kv_len;
    copy_to_device(counts_.data(), counts_host_.data(), counts_host_.size(), stream_);
    copy_to_device(floats_.data() + floats_.size() - 1, &view.recall, 1, stream_);
    if (view.ghosts.present()) update_ghosts(view);
    stream_.synchronize();
  }

  const KvView& view() const { return view_; }

  // What attention wrote, as the CPU has it.
  AttentionStats stats() const {
    std::vector<float> numbers(floats_.size());
    std::vector<std::int32_t> counts(counts_.size()), recalled(recalled_.size());
    copy_to_host(numbers.data(), floats_.data(), numbers.size(), stream_);
    copy_to_host(counts.data(), counts_.data(), counts.size(), stream_);
    copy_to_host(recalled.data(), recalled_.data(), recalled.size(), stream_);
    AttentionStats out;
    const std::size_t lanes = static_cast<std::size_t>(n_lanes_), all = lanes * room();
    for (std::size_t i = 0; i < lanes; ++i) {
      AttentionStats::Lane lane;
      const auto n_hot = static_cast<std::size_t>(counts[i]);
      const float *probability = &numbers[i * room()], *relevance = probability + all;
      lane.probability.assign(probability, probability + n_hot);
      lane.relevance.assign(relevance, relevance + n_hot);
      for (int r = 0; format_.present() && r < counts[lanes + i]; ++r)
        lane.recalled.push_back({recalled[i * room() + static_cast<std::size_t>(r)],
                                 relevance[all + static_cast<std::size_t>(r)]});
      lane.entropy = numbers[4 * all + i], lane.ghost_mass = numbers[4 * all + lanes + i];
      out.lanes.push_back(lane);
    }
    return out;
  }

 private:
  static constexpr int kPageShift = 4, kPageRows = 1 << kPageShift;
  static constexpr int kPageGroups = DeviceGhosts::kPageGroups;
  static constexpr std::size_t kHotOffset = 48, kGhostOffset = 64;

  std::size_t room() const { return static_cast<std::size_t>(room_); }
  std::size_t at_row(int head, int row, int page_rows) const {
    return 2 * kv_row_ * static_cast<std::size_t>(head * page_rows + row);
  }
  void copy_row(std::byte* to, const KvRows& from, int head, int row) const {
    std::memcpy(to, from.key(head, row), kv_row_);
    std::memcpy(to + kv_row_, from.value(head, row), kv_row_);
  }

  void update_lane(const KvView& view, int i) {
    const LaneView& lane = view.lanes[static_cast<std::size_t>(i)];
    for (int row = 0; row < lane.hot.n_rows; ++row)
      for (int head = 0; head < lane_heads_; ++head)
        copy_row(hot_.at(i * lane_pages_ + row / kPageRows,
                         kHotOffset + at_row(head, row % kPageRows, kPageRows)),
                 lane.hot, head, row);
    counts_host_[static_cast<std::size_t>(i)] = lane.hot.n_rows;
    std::vector<std::uint32_t> mask(static_cast<std::size_t>(mask_words_));
    std::copy(lane.hot_mask.begin(), lane.hot_mask.end(), mask.begin());
    copy_to_device(mask_.data() + i * mask_words_, mask.data(), mask.size(), stream_);
    copy_to_device(tokens_.data() + i * room_, lane.tokens.data(), lane.tokens.size(), stream_);
  }

  void update_ghosts(const KvView& view) {
    for (int group = 0; group * kGhostGroup < view.kv_len; ++group)
      for (int head = 0; head < view.n_kv_heads; ++head) {
        const auto place = static_cast<std::size_t>(head * kPageGroups + group % kPageGroups);
        std::memcpy(ghosts_.at(group / kPageGroups, kGhostOffset + place * format_.group_bytes()),
                    view.ghosts.group(head, group), format_.group_bytes());
      }
    ghosts_.send(stream_);
    std::vector<float> means, units;
    for (const GhostCentre& c : view.ghosts.centres) {
      means.insert(means.end(), c.key_mean, c.key_mean + view.head_dim);
      means.insert(means.end(), c.value_mean, c.value_mean + view.head_dim);
      units.push_back(c.key_unit), units.push_back(c.value_unit);
    }
    copy_to_device(centres_.data(), means.data(), means.size(), stream_);
    copy_to_device(centres_.data() + means.size(), units.data(), units.size(), stream_);
    const GhostRope::Tables rope = view.ghosts.rope->tables();
    copy_to_device(tables_.data() + within_, rope.within.data(), rope.within.size(), stream_);
    copy_to_device(tables_.data() + cubic_, rope.cubic.data(), rope.cubic.size(), stream_);
    const std::vector<std::uint16_t> rows = SplitRope::of(rope);
    copy_to_device(rows_.data(), rows.data(), rows.size(), stream_);
    copy_to_device(tables_.data(), rope.middle.data(), rope.middle.size(), stream_);
  }

  void point(const KvView& view) {
    const std::size_t lanes = static_cast<std::size_t>(n_lanes_), all = lanes * room();
    float* numbers = floats_.data();
    const std::size_t row = 2 * kv_row_;
    device_.rows = {cold_.table(), 0, kv_row_, kTierTokens * row, row, kTierShift};
    device_.kv_len = counts_.data() + 2 * lanes;
    device_.recall = numbers + floats_.size() - 1;
    device_.caution = view.caution;
    device_.hot = {n_lanes_, lane_heads_, room_, mask_words_,
                   {hot_.table(), kHotOffset, kv_row_, kPageRows * row, row, kPageShift},
                   lane_pages_, counts_.data(), tokens_.data(), mask_.data()};
    device_.stats = {room_, numbers, numbers + all, numbers + 4 * all, numbers + 4 * all + lanes,
                     room_, counts_.data() + lanes, recalled_.data(), numbers + 2 * all};
    device_.ghosts.format = format_;
    if (!format_.present()) return;
    device_.ghosts.centre_tokens = kCentre;
    device_.ghosts.pages = ghosts_.table();
    device_.ghosts.offset = kGhostOffset;
    device_.ghosts.means = centres_.data();
    device_.ghosts.units = centres_.data() + view.n_kv_heads * 2 * view.head_dim;
    if (view.ghosts.present()) point_rope(view);
  }

  void point_rope(const KvView& view) {
    const GhostRope::Tables rope = view.ghosts.rope->tables();
    const auto spans = static_cast<std::size_t>((room_ + GhostRope::kSpan - 1) / GhostRope::kSpan);
    within_ = spans * static_cast<std::size_t>(view.head_dim);
    cubic_ = within_ + rope.within.size();
    tables_ = DeviceBuffer<float>(cubic_ + rope.cubic.size(), "rope");
    rows_ = DeviceBuffer<std::uint16_t>(SplitRope::of(rope).size(), "rope");
    std::vector<DeviceRope::Pair> pairs;
    for (const GhostRope::Pair& p : rope.pairs) pairs.push_back({p.first, p.second});
    pairs_ = DeviceBuffer<DeviceRope::Pair>(pairs.size(), "pairs");
    copy_to_device(pairs_.data(), pairs.data(), pairs.size(), stream_);
    float* tables = tables_.data();
    device_.ghosts.rope = {rope.n_fast,      pairs_.data(),   tables,
                           tables + within_, tables + cubic_, rows_.data()};
  }

  static constexpr int kCentre = 16;  // as TieredScene has it

  const Stream& stream_;
  const int n_lanes_, lane_heads_, room_;
  int mask_words_ = 0;
  const GhostFormat format_;
  const std::size_t kv_row_;
  const int lane_pages_;
  CopiedPages cold_, hot_, ghosts_;
  DeviceBuffer<std::int32_t> tokens_, counts_, recalled_;
  DeviceBuffer<std::uint32_t> mask_;
  DeviceBuffer<float> floats_, centres_, tables_;
  DeviceBuffer<DeviceRope::Pair> pairs_;
  std::size_t within_ = 0, cubic_ = 0;
  DeviceBuffer<std::uint16_t> rows_;
  std::vector<std::int32_t> counts_host_;
  KvView view_;
  DeviceView device_ = {};
};

}  // namespace thaw::testing
