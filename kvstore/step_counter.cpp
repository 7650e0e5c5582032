#include "kvstore/step_counter.h"

#include <algorithm>
#include <utility>

namespace thaw {

StepCounter::StepCounter(const KvShape& shape, const PolicyParams& params, int lane_heads)
    : shape_(shape), params_(params), lane_heads_(lane_heads) {
  line_.layers.resize(static_cast<std::size_t>(shape.n_layers));
}

void StepCounter::begin(int kv_len) {
  line_ = {static_cast<std::int32_t>(counters_.steps), kv_len, std::move(line_.layers), 0, 0, 0, false};
  std::fill(line_.layers.begin(), line_.layers.end(), KvStep::Layer{});
}

void StepCounter::count(const Layer& layer, std::span<const LaneStep> lanes) {
  const auto bytes = static_cast<std::int64_t>(2 * kv_row_bytes(shape_.type, shape_.head_dim));
  KvStep::Layer& line = line_.layers[static_cast<std::size_t>(layer.index)];
  counters_.visible += layer.kv_len;
  counters_.cold_bytes_visible += static_cast<double>(layer.kv_len * bytes * shape_.n_kv_heads);
  line.budget = static_cast<float>(layer.bound);
  if (lanes.empty()) {
    counters_.attended += layer.kv_len;
    line.hot = static_cast<float>(layer.kv_len);
    line_.all_hot = true;
  }
  for (const LaneStep& lane : lanes) {
    count_lane(layer, lane);
    // What is recalled is made hot without another read.
    const int read = layer.exact ? layer.kv_len - lane.n_rows : lane.n_recalled + lane.thawed;
    line_.cold_bytes_read += bytes * lane_heads_ * read;
    counters_.cold_bytes_read += bytes * lane_heads_ * read;
  }
}

void StepCounter::count_lane(const Layer& layer, const LaneStep& lane) {
  KvStep::Layer& line = line_.layers[static_cast<std::size_t>(layer.index)];
  const double share = lane_heads_ / static_cast<double>(shape_.n_kv_heads);
  const double recalled = layer.exact ? 0 : share * lane.n_recalled;
  const double thawed = share * (lane.promoted + lane.thawed), frozen = share * lane.frozen;
  counters_.attended += share * (layer.exact ? layer.kv_len : lane.n_attended + lane.n_recalled);
  counters_.recalled += recalled, counters_.thawed += thawed, counters_.frozen += frozen;
  line.recalled += static_cast<float>(recalled);
  line.thawed += static_cast<float>(thawed);
  line.frozen += static_cast<float>(frozen);
  line.hot += static_cast<float>(share * lane.n_rows);
  line.entropy += static_cast<float>(share) * lane.entropy;
  if (!layer.exact) line.ghost_mass += static_cast<float>(share) * lane.ghost_mass;
  if (params_.policy == Policy::kAsr) line.threshold = lane.tau;
  if (params_.policy == Policy::kThaw) line.threshold = layer.epsilon;
}

const KvStep& StepCounter::finish(std::int64_t hot_bytes, std::int64_t ghost_bytes) {
  ++counters_.steps;
  line_.hot_bytes = hot_bytes, line_.ghost_bytes = ghost_bytes;
  return line_;
}

}  // namespace thaw
