#include <algorithm>
#include <limits>
#include <vector>

#include "device/error.h"
#include "kvstore/append_cuda.cuh"
#include "kvstore/bounds.h"
#include "kvstore/check_cuda.h"
#include "kvstore/cold_tier_cuda.h"
#include "kvstore/ghost_tier_cuda.h"
#include "kvstore/lanes_cuda.h"
#include "kvstore/tiered_store_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {
namespace {

constexpr int kCheckSteps = 64;  // decode steps between checks of every token

GhostFormat ghost_format(const KvShape& shape, const PolicyParams& p) {
  if (p.policy != Policy::kThaw) return {0, 0, shape.head_dim};
  return {p.ghost_key_bits, p.ghost_value_bits, shape.head_dim};
}

int lane_heads_of(const KvShape& shape, const PolicyParams& p) {
  return p.policy == Policy::kThaw && p.per_head ? 1 : shape.n_kv_heads;
}

class CudaTieredStore final : public KvStore {
 public:
  CudaTieredStore(const KvShape& shape, const KvOptions& options, const Stream& stream);

  void begin(int n_tokens, Phase phase) override;
  void append(int layer, const float* k, const float* v, int n_tokens) override;
  KvView view(int layer) const override;
  int stats_rows(int n_tokens) const override { return stats_rows(n_tokens, phase_); }
  void settle(int layer, const AttentionStats& stats) override;
  void rewind(int position) override;
  void clear() override { rewind(0), counters_ = {}; }
  double reset(Rung rung) override;
  void check() const override { check_from(0); }
  void record(KvRecorder* recorder) override;

  int length() const override { return *std::min_element(appended_.begin(), appended_.end()); }
  const KvShape& shape() const override { return shape_; }
  const KvOptions& options() const override { return options_; }
  KvUsage usage() const override;
  const KvCounters& counters() const override { return catch_up(), counters_; }
  float ghost_mass() const override;

 private:
  const PolicyParams& params() const { return options_.policy; }
  bool exact() const { return phase_ == Phase::kPrefill; }
  int stats_rows(int n_tokens, Phase phase) const;
  DeviceMoment moment(int first, int kv_len) const;
  void send_moment(const DeviceMoment& moment);
  void reserve(int kv_len, int n_tokens, Phase phase);
  LaneWork work(bool next) const {
    return lanes_.work(moment_.data(), limits_.data() + (next ? shape_.n_layers : 0));
  }
  void make_residency(int kv_len);
  void send_limits(int kv_len);
  void seed(int kv_len);
  void open_rows(int kv_len);
  int most_rows(int n_rows, int bound, int kv_len) const;
  void close_rows(int position);
  void cut(int position);
  void make_views();
  void catch_up() const;
  void count() const;
  void count_layer(int layer) const;
  void finish_step();
  void check_from(int first) const;

  KvShape shape_;
  KvOptions options_;
  KvBounds bounds_;
  const Stream& stream_;
  std::unique_ptr<PageSource> fast_;
  CudaColdTier cold_;
  CudaGhostTier ghosts_;
  CudaLanes lanes_;
  GhostCheck ghost_check_;
  DeviceBuffer<DeviceMoment> moment_;
  DeviceBuffer<std::int32_t> limits_;       // a layer, before the step's token; likewise, with it
  PinnedBuffer<std::int32_t> host_limits_;  // the same
  std::vector<DeviceView> views_;           // a layer, of the running step
  std::vector<float> entropy_;              // budget: of each layer's attention to the prompt
  std::vector<int> appended_;               // tokens held, a layer
  std::vector<char> unsettled_;             // a layer: appended, and not settled yet
  Phase phase_ = Phase::kPrefill;
  int n_step_ = 0;                  // tokens of the step
  bool seeded_ = false;             // residency has been decided since the last exact step
  bool is_open_ = false;            // a decode step has begun, and its end is not queued yet
  mutable bool reporting_ = false;  // work is queued that writes reports
  mutable bool uncounted_ = false;  // and that of a decode step is not in the counters yet
  mutable KvCounters counters_;
  mutable KvStep line_;  // of the last decode step that was counted
  KvRecorder* recorder_ = nullptr;
};

void check_options(const KvShape& shape, const KvOptions& o) {
  require(o.cold_file.empty(), "--cold-file: expected --backend cpu: on the GPU every token is in ",
          "pinned memory, found ", o.cold_file);
  require(shape.head_dim % kRowUnit == 0 && shape.head_dim <= GhostQuery::kMaxDim,
          "KV store: expected a head_dim that ", kRowUnit, " divides, up to ", GhostQuery::kMaxDim,
          ", on the GPU, found ", shape.head_dim);
}

std::int64_t most_pages(const KvShape& shape, const KvOptions& o) {
  if (o.hot_bytes == 0) return std::numeric_limits<std::int64_t>::max() / 2;
  const std::size_t row = 2 * kv_row_bytes(shape.type, shape.head_dim) *
                          static_cast<std::size_t>(lane_heads_of(shape, o.policy));
  return o.hot_bytes / static_cast<std::int64_t>(row * kHotPageRows);
}

CudaTieredStore::CudaTieredStore(const KvShape& shape, const KvOptions& options,
                                 const Stream& stream)
    : shape_(shape),
      options_(options),
      bounds_(shape_, options_),
      stream_(stream),
      fast_(make_device_pages(stream)),
      cold_(shape, options.check, stream),
      ghosts_(*fast_, shape, ghost_format(shape, options.policy), bounds_.centre_tokens(), stream),
      lanes_(*fast_, shape_, options_.policy, lane_heads_of(shape, options.policy), cold_.rows(0),
             most_pages(shape, options), stream),
      ghost_check_(shape, ghost_format(shape, options.policy), bounds_.centre_tokens()),
      moment_(1, "KV store"),
      limits_(2 * static_cast<std::size_t>(shape.n_layers), "KV store"),
      host_limits_(limits_.size(), "KV store"),
      views_(static_cast<std::size_t>(shape.n_layers)),
      entropy_(static_cast<std::size_t>(shape.n_layers), 1.0f),
      appended_(static_cast<std::size_t>(shape.n_layers)),
      unsettled_(static_cast<std::size_t>(shape.n_layers)) {
  fill_device(limits_.data(), 0, limits_.bytes(), stream);
  line_.layers.resize(static_cast<std::size_t>(shape.n_layers));
}

int CudaTieredStore::stats_rows(int n_tokens, Phase phase) const {
  switch (params().policy) {
    case Policy::kWindow:
      return phase == Phase::kPrefill ? 0 : 1;
    case Policy::kH2o:
    case Policy::kBudget:
      return n_tokens;
    default:
      return std::min(n_tokens, std::max(1, params().window));
  }
}

DeviceMoment CudaTieredStore::moment(int first, int kv_len) const {
  DeviceMoment now;
  now.first = first, now.kv_len = kv_len;
  now.can_freeze = !ghosts_.present() || kv_len >= ghosts_.centre_tokens();
  now.epsilon = params().epsilon;
  return now;
}

void CudaTieredStore::send_moment(const DeviceMoment& moment) {
  launch_overlapping("begin", set_place<DeviceMoment>, 1, kWarp, 0, stream_, moment_.data(),
                     moment);
}

// Waits until what the device reported of the last steps is here, and counts it.
void CudaTieredStore::catch_up() const {
  if (reporting_) stream_.synchronize();
  reporting_ = false;
  if (uncounted_) count();
  uncounted_ = false;
}

void CudaTieredStore::reserve(int kv_len, int n_tokens, Phase phase) {
  cold_.reserve(kv_len);
  ghosts_.reserve(kv_len);
  lanes_.reserve_tokens(kv_len);
  if (phase == Phase::kPrefill && stats_rows(n_tokens, phase) > 0)
    lanes_.reserve_statistics(kv_len);
}

void CudaTieredStore::begin(int n_tokens, Phase phase) {
  const int first = length();
  check_step(shape_, appended_, n_tokens, phase);
  catch_up();
  if (is_open_) close_rows(first);
  reserve(first + n_tokens, n_tokens, phase);
  if (phase == Phase::kDecode) make_residency(first);
  phase_ = phase, n_step_ = n_tokens;
  if (phase == Phase::kPrefill) send_moment(moment(first, first + n_tokens));
  make_views();
}

// Before a decode step: hot tokens are chosen, if that is still to be done, and every lane has a
// row for one more.
void CudaTieredStore::make_residency(int kv_len) {
  if (!seeded_ && params().policy == Policy::kBudget && kv_len > 0)
    for (int layer = 0; layer < shape_.n_layers; ++layer)
      entropy_[static_cast<std::size_t>(layer)] =
          std::max(1e-6f, lanes_.report(layer * lanes_.per_layer()).entropy);
  bounds_.share(kv_len + 1, entropy_);
  send_limits(kv_len);
  if (!seeded_) seed(kv_len);
  open_rows(kv_len + 1);
}

void CudaTieredStore::send_limits(int kv_len) {
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    host_limits_.data()[layer] = bounds_.bound(layer, kv_len);
    host_limits_.data()[shape_.n_layers + layer] = bounds_.bound(layer, kv_len + 1);
  }
  copy_to_device(limits_.data(), host_limits_.data(), limits_.size(), stream_);
}

// Most rows of a lane after a step that begins with n_rows.
int CudaTieredStore::most_rows(int n_rows, int bound, int kv_len) const {
  if (params().policy == Policy::kAsr) return kv_len;
  return std::min(bound, n_rows + std::min(lanes_.most_recalled(), kv_len));
}

void CudaTieredStore::seed(int kv_len) {
  send_moment(moment(kv_len, kv_len));
  work(false).choose();
  stream_.synchronize();  // how many are chosen is known
  int most = 1;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane)
    most = std::max({most, lanes_.report(lane).n_chosen, lanes_.report(lane).n_rows});
  lanes_.reserve_rows(params().policy == Policy::kAsr ? std::max(most, kv_len) : most);
  work(false).seed();
  seeded_ = true;
  stream_.synchronize();  // and who has a row
}

void CudaTieredStore::open_rows(int kv_len) {
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
  send_moment(moment(kv_len - 1, kv_len));
  if (crowded) work(true).make_room();
  lanes_.share_pages(rows);
  work(true).place();
  is_open_ = true;
}

void CudaTieredStore::make_views() {
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    DeviceView& view = views_[static_cast<std::size_t>(layer)] = {};
    view.rows = cold_.rows(layer);
    view.kv_len = &moment_.data()->kv_len;
    if (exact()) {
      if (stats_rows(n_step_) > 0) view.stats = lanes_.exact_stats();
      continue;
    }
    view.hot = lanes_.hot(layer);
    view.ghosts = ghosts_.view(layer);
    view.recall = &moment_.data()->epsilon;
    view.stats = lanes_.decode_stats(layer);
  }
}

void CudaTieredStore::append(int layer, const float* k, const float* v, int n_tokens) {
  int& n = appended_.at(static_cast<std::size_t>(layer));
  require(n + n_tokens <= cold_.host().room(), "KV store: append without begin");
  const auto heads = static_cast<unsigned>(shape_.n_kv_heads);
  const DeviceRows cold = cold_.rows(layer);
  const DeviceHot hot = lanes_.hot(layer);
  std::int32_t* filled =
      lanes_.all().from + std::int64_t{layer} * lanes_.per_layer() * lanes_.all().room;
  with_kv_type(shape_.type, [&](auto type) {
    constexpr KvType kType = decltype(type)::value;
    if (exact())
      launch_overlapping("append", append_rows<kType>, dim3(static_cast<unsigned>(n_tokens), heads),
                         kAppendThreads, 0, stream_, cold, k, v, moment_.data(), shape_.head_dim);
    else
      launch_overlapping("append", append_hot_row<kType>, heads, kAppendThreads, 0, stream_, cold,
                         hot, filled, k, v, moment_.data(), shape_.head_dim);
  });
  ghosts_.write(layer, cold, exact() ? nullptr : &hot, moment_.data(), n_tokens);
  n += n_tokens;
  unsettled_[static_cast<std::size_t>(layer)] = 1;
}

KvView CudaTieredStore::view(int layer) const {
  KvView view;
  view.type = shape_.type;
  view.kv_len = appended_.at(static_cast<std::size_t>(layer));
  view.n_kv_heads = shape_.n_kv_heads;
  view.head_dim = shape_.head_dim;
  view.cold = cold_.host().rows(layer, view.kv_len);
  view.device = &views_[static_cast<std::size_t>(layer)];
  view.lane_heads = lanes_.all().lane_heads;
  if (!exact()) view.recall = params().epsilon;
  return view;
}

void CudaTieredStore::settle(int layer, const AttentionStats&) {
  const auto i = static_cast<std::size_t>(layer);
  require(unsettled_.at(i) != 0, "KV store: layer ", layer, ": settled without an append");
  unsettled_[i] = 0;
  const int n_rows = stats_rows(n_step_);
  if (exact() && n_rows > 0) work(false).learn(layer, lanes_.exact_stats(), n_rows);
  reporting_ = true;
  if (layer + 1 == shape_.n_layers) finish_step();
}

// Every layer's statistics are there: one kernel settles all lanes.
void CudaTieredStore::finish_step() {
  if (exact()) {
    seeded_ = false;
  } else {
    work(true).settle();
    is_open_ = false, uncounted_ = true;
  }
  if (!options_.check) return;
  stream_.synchronize();  // what the kernels wrote can be read
  const int n = length(), first = n - n_step_;
  for (int token = first; token < n; ++token)
    for (int l = 0; l < shape_.n_layers; ++l) cold_.wrote(l, token);
  catch_up();
  check_from(!exact() && counters_.steps % kCheckSteps == 0 ? 0 : first);
}

// As the CPU's store counts, lane by lane and in that order.
void CudaTieredStore::count() const {
  line_ = {static_cast<std::int32_t>(counters_.steps), length(), std::move(line_.layers), 0, 0, 0};
  std::fill(line_.layers.begin(), line_.layers.end(), KvStep::Layer{});
  for (int layer = 0; layer < shape_.n_layers; ++layer) count_layer(layer);
  ++counters_.steps;
  counters_.cold_bytes_read += line_.cold_bytes_read;
  if (!recorder_) return;
  line_.hot_bytes = lanes_.hot_bytes(), line_.ghost_bytes = ghosts_.bytes();
  recorder_->step(line_);
}

void CudaTieredStore::count_layer(int layer) const {
  const double heads = shape_.n_kv_heads, share = lanes_.all().lane_heads / heads;
  const int kv_len = appended_[static_cast<std::size_t>(layer)];
  const std::int64_t row = 2 * static_cast<std::int64_t>(lanes_.all().kv_row);
  KvStep::Layer& line = line_.layers[static_cast<std::size_t>(layer)];
  counters_.visible += kv_len;
  counters_.cold_bytes_visible += static_cast<double>(kv_len * row * shape_.n_kv_heads);
  line.budget = static_cast<float>(bounds_.bound(layer, kv_len));
  for (int i = 0; i < lanes_.per_layer(); ++i) {
    const LaneReport& lane = lanes_.report(layer * lanes_.per_layer() + i);
    const double recalled = share * lane.n_recalled, frozen = share * lane.frozen;
    const double thawed = share * (lane.promoted + lane.thawed);
    counters_.attended += share * (lane.n_attended + lane.n_recalled);
    counters_.recalled += recalled, counters_.thawed += thawed, counters_.frozen += frozen;
    line_.cold_bytes_read += row * lanes_.all().lane_heads * (lane.n_recalled + lane.thawed);
    line.recalled += static_cast<float>(recalled);
    line.thawed += static_cast<float>(thawed);
    line.frozen += static_cast<float>(frozen);
    line.hot += static_cast<float>(share * lane.n_rows);
    line.entropy += static_cast<float>(share) * lane.entropy;
    line.ghost_mass += static_cast<float>(share) * lane.ghost_mass;
    line.threshold = params().policy == Policy::kAsr    ? lane.tau
                     : params().policy == Policy::kThaw ? params().epsilon
                                                        : 0.0f;
  }
}

void CudaTieredStore::rewind(int position) {
  require(position >= 0 && position <= length(), "KV store: rewind: expected a position from 0 to ",
          length(), ", found ", position);
  catch_up();
  cut(position);
  for (int& n : appended_) n = position;
  std::fill(unsettled_.begin(), unsettled_.end(), char{0});
  ghost_check_.cut(position);
}

// The rows that a step opened, which was given up.
void CudaTieredStore::close_rows(int position) {
  work(false).drop(position);
  stream_.synchronize();  // how many rows are left is known
  is_open_ = false;
}

// Lanes without the tokens from `position` on. Waits for the stream.
void CudaTieredStore::cut(int position) {
  stream_.synchronize();  // limits may be on their way
  if (position == 0) seeded_ = false, std::fill(entropy_.begin(), entropy_.end(), 1.0f);
  bounds_.share(position, entropy_);
  send_limits(position);
  const DeviceMoment now = moment(position, position);
  int most = 1, longest = position;
  for (const int n : appended_) longest = std::max(longest, n);
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane) {
    const int bound = bounds_.bound(lane / lanes_.per_layer(), position);
    const int must = now.can_freeze == 0
                         ? position
                         : params().sinks + position - first_recent(params(), position, bound);
    const int n = lanes_.report(lane).n_rows + (is_open_ ? 1 : 0);
    most = std::max({most, n, std::min(bound, n + must)});
  }
  lanes_.reserve_rows(params().policy == Policy::kAsr ? std::max(most, position) : most);
  send_moment(now);
  work(false).cut(position, longest);
  stream_.synchronize();  // whether every lane is complete is known
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane)
    seeded_ = seeded_ && lanes_.report(lane).complete != 0;
  is_open_ = false;
}

double CudaTieredStore::reset(Rung rung) {
  require(rung == Rung::kNone, "--recovery: runs on the CPU backend only; expected --recovery off ",
          "or --backend cpu");
  return 0;
}

void CudaTieredStore::record(KvRecorder* recorder) {
  require(recorder == nullptr || !recorder->wants_events(),
          "KV store: which tokens freeze and thaw is told by the CPU backend only: expected ",
          "--backend cpu, or neither --report nor --trace");
  catch_up();
  recorder_ = recorder;
}

KvUsage CudaTieredStore::usage() const {
  KvUsage u;
  u.cold = cold_.host().bytes();
  u.full = length() * shape_.bytes_per_token();
  u.ghosts = ghosts_.bytes();
  u.hot = lanes_.hot_bytes();
  u.bookkeeping = ghosts_.bookkeeping_bytes() + lanes_.bookkeeping_bytes() + cold_.table_bytes() +
                  static_cast<std::int64_t>(moment_.bytes() + limits_.bytes());
  u.resident = u.hot + u.ghosts;
  return u;
}

float CudaTieredStore::ghost_mass() const {
  catch_up();
  float sum = 0;
  for (int lane = 0; lane < lanes_.n_lanes(); ++lane) sum += lanes_.report(lane).ghost_mass;
  return sum / static_cast<float>(lanes_.n_lanes());
}

void CudaTieredStore::check_from(int first) const {
  catch_up();
  stream_.synchronize();  // what kernels wrote can be read, in the middle of a step, too
  const int n = length();
  cold_.host().check(first, n);
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    const KvRows cold = cold_.host().rows(layer, n);
    ghost_check_.check(layer, cold, ghosts_.view(layer), first, n, stream_);
    if (!seeded_ || exact()) continue;
    for (int i = 0; i < lanes_.per_layer(); ++i)
      check_lane(
          lanes_.snapshot(layer * lanes_.per_layer() + i, n),
          {params(), layer, i * lanes_.all().lane_heads, lanes_.all().lane_heads, n,
           bounds_.bound(layer, n), moment(n, n).can_freeze != 0, lanes_.all().kv_row, cold});
  }
  lanes_.check_pages();
  require(options_.hot_bytes == 0 || lanes_.hot_bytes() <= options_.hot_bytes,
          "KV check: ", lanes_.hot_bytes(), " hot bytes, more than the ", options_.hot_bytes,
          " promised");
}

}  // namespace

std::unique_ptr<KvStore> make_cuda_tiered_store(const KvShape& shape, const KvOptions& options,
                                                const Stream& stream) {
  require(options.policy.policy != Policy::kFull, "--policy full: freezes nothing");
  check_shape(shape);
  check_options(shape, options);
  return std::make_unique<CudaTieredStore>(shape, options, stream);
}

}  // namespace thaw
