#include "kvstore/shadow_lanes_cuda.h"

namespace thaw {

ShadowLanes::ShadowLanes(const KvShape& shape, const PolicyParams& params, const KvBounds& bounds,
                         const CudaColdTier& cold, const CudaHotTier& hot, const StepCounter& steps,
                         KvRecorder& recorder, const Stream& stream)
    : shape_(shape),
      bounds_(bounds),
      cold_(cold),
      hot_(hot),
      steps_(steps),
      recorder_(recorder),
      stream_(stream),
      memory_(make_memory_pages()),
      arena_(*memory_,
             2 * kv_row_bytes(shape.type, shape.head_dim) *
                 static_cast<std::size_t>(bounds.lane_heads()),
             bounds.most_pages()) {
  lanes_.reserve(static_cast<std::size_t>(hot.lanes().n_lanes()));
  const int n_heads = bounds.lane_heads();
  for (int layer = 0; layer < shape.n_layers; ++layer)
    for (int head = 0; head < shape.n_kv_heads; head += n_heads)
      lanes_.emplace_back(arena_, shape, params, layer, head, n_heads);
}

std::span<Residency> ShadowLanes::lanes(int layer) {
  const auto n = static_cast<std::size_t>(hot_.lanes().per_layer());
  return std::span(lanes_).subspan(static_cast<std::size_t>(layer) * n, n);
}

Moment ShadowLanes::moment(int layer, int kv_len) const {
  Moment now;
  now.kv_len = kv_len;
  now.step = static_cast<int>(steps_.counters().steps);
  now.bound = bounds_.bound(layer, kv_len);
  now.epsilon = hot_.epsilon();
  now.can_freeze = hot_.can_freeze(kv_len);
  now.cold = cold_.host().rows(layer, kv_len);
  now.recorder = &recorder_;
  return now;
}

void ShadowLanes::seed(int first) {
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.clear_for_seed(moment(layer, first));
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.seed(moment(layer, first));
}

void ShadowLanes::begin_decode(int first) {
  for (Residency& lane : lanes_) lane.grow(first + 1);
  if (hot_.attends_all()) return;
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.make_room(moment(layer, first + 1), 1);
}

void ShadowLanes::end_exact(int kv_len) {
  const std::vector<float> scores = hot_.lanes().scores(kv_len);
  const auto n = static_cast<std::size_t>(kv_len);
  for (std::size_t i = 0; i < lanes_.size(); ++i) {
    const LaneReport& report = hot_.lanes().report(static_cast<int>(i));
    lanes_[i].grow(kv_len);
    lanes_[i].take_over(std::span(scores).subspan(i * n, n), report.entropy, report.tau);
  }
}

void ShadowLanes::end_decode(int kv_len, float epsilon) {
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    Moment now = moment(layer, kv_len);
    now.epsilon = epsilon;
    for (Residency& lane : lanes(layer)) lane.append(now, kv_len - 1);
    const DeviceStats stats = hot_.lanes().decode_stats(layer);
    int i = 0;
    for (Residency& lane : lanes(layer))
      lane.settle(now, read_stats(stats, i++, lane.lane().n_rows()));
  }
}

// lane: of the layer.
AttentionStats::Lane ShadowLanes::read_stats(const DeviceStats& from, int lane, int n_rows) const {
  AttentionStats::Lane to;
  const auto read = [&](auto& numbers, const auto* device, int n, int stride) {
    numbers.resize(static_cast<std::size_t>(n));
    copy_to_host(numbers.data(), device + std::int64_t{lane} * stride, numbers.size(), stream_);
  };
  read(to.probability, from.probability, n_rows, from.stride);
  if (from.relevance) read(to.relevance, from.relevance, n_rows, from.stride);
  copy_to_host(&to.entropy, from.entropy + lane, 1, stream_);
  copy_to_host(&to.ghost_mass, from.ghost_mass + lane, 1, stream_);
  if (!from.n_recalled) return to;
  std::int32_t n = 0;
  copy_to_host(&n, from.n_recalled + lane, 1, stream_);
  std::vector<std::int32_t> tokens;
  std::vector<float> probabilities;
  read(tokens, from.recalled, n, from.recalled_room);
  read(probabilities, from.recalled_probability, n, from.recalled_room);
  for (std::size_t i = 0; i < tokens.size(); ++i)
    to.recalled.push_back({tokens[i], probabilities[i]});
  return to;
}

void ShadowLanes::cut(int position) {
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.cut(moment(layer, position), position);
}

void ShadowLanes::reset(Rung rung, int kv_len) {
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.reset(rung, moment(layer, kv_len));
}

}  // namespace thaw
