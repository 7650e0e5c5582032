#include <algorithm>

#include "kvstore/append_cuda.cuh"
#include "kvstore/hot_tier_cuda.h"

namespace thaw {

CudaHotTier::CudaHotTier(PageSource& source, const KvShape& shape, const KvOptions& options,
                         KvBounds& bounds, const DeviceRows& cold, const StepCounter& steps,
                         const Stream& stream)
    : shape_(shape),
      options_(options),
      steps_(steps),
      stream_(stream),
      bounds_(bounds),
      lanes_(source, shape, options.policy, bounds_.lane_heads(), cold, bounds_.most_pages(),
             stream),
      moment_(1, "KV store"),
      limits_(2 * static_cast<std::size_t>(shape.n_layers), "KV store"),
      host_limits_(limits_.size(), "KV store"),
      taken_(static_cast<std::size_t>(lanes_.n_lanes())) {
  fill_device(limits_.data(), 0, limits_.bytes(), stream);
}

bool CudaHotTier::can_freeze(int kv_len) const {
  return !bounds_.has_ghosts() || kv_len >= bounds_.centre_tokens();
}

void CudaHotTier::send_moment(int first, int kv_len) {
  DeviceMoment now;
  now.first = first, now.kv_len = kv_len;
  now.step = static_cast<std::int32_t>(steps_.counters().steps);
  now.can_freeze = can_freeze(kv_len);
  now.epsilon = epsilon();
  launch_overlapping("begin", set_place<DeviceMoment>, 1, kWarp, 0, stream_, moment_.data(), now);
}

void CudaHotTier::send_limits(int kv_len) {
  limits_read_.synchronize();  // the copy of the last ones has read host_limits_
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    host_limits_.data()[layer] = bounds_.bound(layer, kv_len);
    host_limits_.data()[shape_.n_layers + layer] = bounds_.bound(layer, kv_len + 1);
  }
  copy_to_device(limits_.data(), host_limits_.data(), limits_.size(), stream_);
  limits_read_.record(stream_);
}

void CudaHotTier::reserve(int kv_len, int stats_of) {
  lanes_.reserve_tokens(kv_len);
  if (stats_of > 0) lanes_.reserve_statistics(stats_of);
}

void CudaHotTier::begin_exact(int first, int kv_len) { send_moment(first, kv_len); }

bool CudaHotTier::seed(int first) {
  if (!seeded_) bounds_.adopt();
  bounds_.share(first + 1);
  if (attends_all()) return false;
  send_limits(first);
  if (seeded_) return false;
  choose(first);
  return true;
}

void CudaHotTier::begin_decode(int first) {
  if (attends_all()) return send_moment(first, first + 1);
  open(first + 1);
}

// Most rows of a lane after a step that begins with n_rows.
int CudaHotTier::most_rows(int n_rows, int bound, int kv_len) const {
  if (options_.policy.policy == Policy::kAsr) return kv_len;
  return std::min(bound, n_rows + std::min(lanes_.most_recalled(epsilon()), kv_len));
}

void CudaHotTier::choose(int kv_len) {
  send_moment(kv_len, kv_len);
  work(false).choose();
  stream_.synchronize();  // how many are chosen is known
  int most = 1;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane)
    most = std::max({most, lanes_.report(lane).n_chosen, lanes_.report(lane).n_rows});
  lanes_.reserve_rows(options_.policy.policy == Policy::kAsr ? std::max(most, kv_len) : most);
  work(false).seed();
  seeded_ = true;
  stream_.synchronize();  // and who has a row
}

void CudaHotTier::open(int kv_len) {
  std::vector<int> rows(static_cast<std::size_t>(lanes_.n_lanes()));
  bool crowded = false;
  int most = 1;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane) {
    const int n = lanes_.report(lane).n_rows;
    const int bound = bounds_.bound(lane / lanes_.per_layer(), kv_len);
    crowded |= n + 1 > bound;
    rows[static_cast<std::size_t>(lane)] = std::min(n, bound - 1) + 1;
    most = std::max({most, n, most_rows(rows[static_cast<std::size_t>(lane)], bound, kv_len)});
  }
  lanes_.reserve_rows(most);
  lanes_.reserve_pages(rows);
  send_moment(kv_len - 1, kv_len);
  if (crowded) work(true).make_room();
  lanes_.share_pages(rows);
  work(true).place();
  is_open_ = true;
}

void CudaHotTier::learn(int layer, int n_rows) const {
  work(false).learn(layer, lanes_.exact_stats(), n_rows);
}

void CudaHotTier::settle() {
  work(true).settle();
  is_open_ = false;
}

void CudaHotTier::close(int first) {
  if (!is_open_) return;
  work(false).drop(first);
  stream_.synchronize();  // how many rows are left is known
  is_open_ = false;
}

void CudaHotTier::cut(int position, int length) {
  stream_.synchronize();  // a step that was opened has reported
  if (position == 0) {
    seeded_ = false;
    bounds_.forget();
  }
  bounds_.share(position);
  send_limits(position);
  int most = 1;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane) {
    const int bound = bounds_.bound(lane / lanes_.per_layer(), position);
    const PolicyParams& p = options_.policy;
    const int must =
        can_freeze(position) ? p.sinks + position - first_recent(p, position, bound) : position;
    const int n = lanes_.report(lane).n_rows + (is_open_ ? 1 : 0);
    most = std::max({most, n, std::min(bound, n + must)});
  }
  lanes_.reserve_rows(options_.policy.policy == Policy::kAsr ? std::max(most, position) : most);
  send_moment(position, position);
  work(false).cut(position, length);
  stream_.synchronize();  // whether every lane is complete is known
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane)
    seeded_ = seeded_ && lanes_.report(lane).complete != 0;
  is_open_ = false;
}

double CudaHotTier::reset(Rung rung, int kv_len, int exact_steps) {
  close(kv_len);
  send_limits(kv_len);
  send_moment(kv_len, kv_len);
  relief_.begin(rung, options_.policy, exact_steps);
  if (rung == Rung::kWindow || (rung == Rung::kSoft && options_.policy.policy == Policy::kAsr))
    return wake(rung, kv_len);
  if (rung >= Rung::kFull) work(false).forget();
  return 0;
}

double CudaHotTier::wake(Rung rung, int kv_len) {
  work(false).choose_woken(rung);
  stream_.synchronize();  // how many rows there will be is known
  std::vector<int> before;
  int most = options_.policy.policy == Policy::kAsr ? kv_len : 1;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane) {
    before.push_back(lanes_.report(lane).n_rows);
    most = std::max(most, lanes_.report(lane).n_chosen);
  }
  lanes_.reserve_rows(most);
  work(false).wake();
  stream_.synchronize();  // and how many there are
  double woken = 0;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane)
    woken += (lanes_.report(lane).n_rows - before[static_cast<std::size_t>(lane)]) *
             lanes_.all().lane_heads / static_cast<double>(shape_.n_kv_heads);
  return woken;
}

LaneStep CudaHotTier::take_step(int lane) const {
  const LaneReport& now = lanes_.report(lane);
  LaneTally& taken = taken_[static_cast<std::size_t>(lane)];
  const auto since = [](std::uint32_t all, std::uint32_t until) {
    return static_cast<int>(all - until);
  };
  const LaneStep step = {now.n_rows,
                         now.n_attended,
                         now.n_recalled,
                         since(now.tally.promoted, taken.promoted),
                         since(now.tally.thawed, taken.thawed),
                         since(now.tally.frozen, taken.frozen),
                         now.entropy,
                         now.ghost_mass,
                         now.tau};
  taken = now.tally;
  return step;
}

std::int64_t CudaHotTier::bookkeeping_bytes() const {
  return lanes_.bookkeeping_bytes() + static_cast<std::int64_t>(moment_.bytes() + limits_.bytes());
}

}  // namespace thaw
