// The store: tiers, lanes and the policy, step by step.
#include <algorithm>
#include <optional>
#include <utility>

#include "device/error.h"
#include "kvstore/bounds.h"
#include "kvstore/kvstore.h"
#include "kvstore/lane.h"
#include "kvstore/recovery.h"
#include "kvstore/residency.h"
#include "kvstore/step_counter.h"
#include "kvstore/step_order.h"
#include "kvstore/tiers.h"

namespace thaw {

namespace {

class TieredKvStore final : public KvStore {
 public:
  TieredKvStore(const KvShape& shape, const KvOptions& options, std::unique_ptr<PageSource> fast,
                std::unique_ptr<PageSource> cold, ThreadPool* pool);

  void begin(int n_tokens, Phase phase) override;
  void append(int layer, const float* k, const float* v, int n_tokens) override;
  KvView view(int layer) const override;
  void read(int layer, int first, int n_tokens, std::byte* rows) const override {
    copy_rows(rows, shape_, cold_.rows(layer, length()), first, n_tokens);
  }
  int stats_rows(int n_tokens) const override {
    const bool asks = phase_ != Phase::kRestore && bounds_.freezes_at(order_.end() + 1);
    return asks ? rows_to_learn(params(), n_tokens, exact()) : 0;
  }
  void settle(int layer, const AttentionStats& stats) override;
  void rewind(int position) override;
  void clear() override;
  double reset(Rung rung, int exact_steps) override;
  void check() const override { check_from(0); }
  void record(KvRecorder* recorder) override { recorder_ = recorder; }

  int length() const override { return order_.length(); }
  const KvShape& shape() const override { return shape_; }
  const KvOptions& options() const override { return options_; }
  KvUsage usage() const override;
  const KvCounters& counters() const override { return counter_.counters(); }
  std::optional<float> ghost_mass() const override;

 private:
  const PolicyParams& params() const { return options_.policy; }
  bool full() const { return params().policy == Policy::kFull; }
  bool exact() const { return awake_ || phase_ != Phase::kDecode || relief_.exact_steps > 0; }
  int lane_heads() const { return bounds_.lane_heads(); }
  int lanes_per_layer() const { return shape_.n_kv_heads / lane_heads(); }
  std::span<Residency> lanes(int layer);
  std::span<const Residency> lanes(int layer) const;
  void make_lanes();
  void wake_up();
  void fall_asleep(int kv_len);
  void check_options() const;
  Moment moment(int layer, int kv_len) const;
  void make_residency(int kv_len);
  void seed(int kv_len);
  void count(int layer, const AttentionStats& stats);
  void write_owed_ghosts();
  void finish_step();
  void check_from(int first) const;

  KvShape shape_;
  KvOptions options_;
  KvBounds bounds_;
  std::unique_ptr<PageSource> fast_, slow_;
  ColdTier cold_;
  GhostTier ghosts_;
  std::optional<HotArena> arena_;
  std::vector<Residency> lanes_;  // layer x lane; none for full
  StepOrder order_;
  bool owes_ghosts_ = false;  // those of the running step's token, in all layers that have it
  Phase phase_ = Phase::kPrefill;
  bool awake_ = true;      // the running step's context is too short to freeze: no lane has a row
  bool seeded_ = false;    // residency has been decided since the last exact step
  bool was_exact_ = true;  // the last step attended all tokens exactly
  Relief relief_;
  StepCounter counter_;
  KvRecorder* recorder_ = nullptr;
};

TieredKvStore::TieredKvStore(const KvShape& shape, const KvOptions& options,
                             std::unique_ptr<PageSource> fast, std::unique_ptr<PageSource> cold,
                             ThreadPool* pool)
    : shape_((check_shape(shape), shape)),
      options_(options),
      bounds_(shape_, options_),
      fast_(std::move(fast)),
      slow_(std::move(cold)),
      cold_(*slow_, shape, options.check),
      ghosts_(*fast_, shape, bounds_.ghost_format(), bounds_.centre_tokens(), pool),
      order_(shape.n_layers),
      counter_(shape_, options_.policy, lane_heads()) {
  check_options();
  make_lanes();
}

void TieredKvStore::make_lanes() {
  if (full()) return;
  const std::size_t row = 2 * kv_row_bytes(shape_.type, shape_.head_dim) * lane_heads();
  arena_.emplace(*fast_, row, bounds_.most_pages());
  lanes_.reserve(static_cast<std::size_t>(shape_.n_layers) * lanes_per_layer());
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (int lane = 0; lane < lanes_per_layer(); ++lane)
      lanes_.emplace_back(*arena_, shape_, params(), layer, lane * lane_heads(), lane_heads());
}

void TieredKvStore::check_options() const {
  require(shape_.head_dim <= GhostQuery::kMaxDim || !bounds_.has_ghosts(),
          "--ghost: expected a head_dim of at most ", GhostQuery::kMaxDim,
          ", or --ghost off or --policy full, found a head_dim of ", shape_.head_dim);
}

std::span<Residency> TieredKvStore::lanes(int layer) {
  if (full()) return {};
  const auto n = static_cast<std::size_t>(lanes_per_layer());
  return std::span(lanes_).subspan(static_cast<std::size_t>(layer) * n, n);
}

std::span<const Residency> TieredKvStore::lanes(int layer) const {
  if (full()) return {};
  const auto n = static_cast<std::size_t>(lanes_per_layer());
  return std::span(lanes_).subspan(static_cast<std::size_t>(layer) * n, n);
}

Moment TieredKvStore::moment(int layer, int kv_len) const {
  Moment now;
  now.kv_len = kv_len;
  now.step = static_cast<int>(counter_.counters().steps);
  now.bound = bounds_.bound(layer, kv_len);
  now.epsilon = relief_.epsilon(params());
  const GhostView ghosts = ghosts_.view(layer);
  now.can_freeze = !ghosts.format.present() || kv_len >= ghosts_.centre_tokens();
  now.cold = cold_.rows(layer, kv_len);
  now.recorder = recorder_;
  return now;
}

void TieredKvStore::seed(int kv_len) {
  std::int64_t pages = 0;
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) pages += lane.clear_for_seed(moment(layer, kv_len));
  arena_->reserve(pages);
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.seed(moment(layer, kv_len));
  seeded_ = true;
}

// Before a decode step: hot tokens are chosen, if that is still to be done, and there is memory for
// one more in every lane.
void TieredKvStore::make_residency(int kv_len) {
  if (!seeded_) bounds_.adopt();
  bounds_.share(kv_len + 1);
  if (relief_.exact_steps == 0 && !seeded_) seed(kv_len);
  arena_->reserve(std::count_if(lanes_.begin(), lanes_.end(), [](const Residency& lane) {
    return lane.lane().n_rows() % kHotPageRows == 0;  // its newest token opens a page
  }));
}

// A context that was rewound is short again: all lanes give their rows back.
void TieredKvStore::wake_up() {
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.cut(moment(layer, 0), 0);
  seeded_ = false, awake_ = true;
}

// Tokens that came while nothing froze get their ghosts.
void TieredKvStore::fall_asleep(int kv_len) {
  for (int layer = 0; kv_len > 0 && layer < shape_.n_layers; ++layer)
    ghosts_.write(layer, cold_.rows(layer, kv_len), 0, kv_len);
  awake_ = false;
}

void TieredKvStore::begin(int n_tokens, Phase phase) {
  const int first = length();
  order_.prepare(shape_, n_tokens, phase);
  write_owed_ghosts();
  const int kv_len = first + n_tokens;
  const bool freezes = bounds_.freezes_at(kv_len);
  cold_.reserve(kv_len);
  if (freezes) ghosts_.reserve(kv_len);
  for (Residency& lane : lanes_) lane.grow(kv_len);
  if (freezes == awake_) freezes ? fall_asleep(first) : wake_up();
  if (phase == Phase::kDecode && freezes) make_residency(first);
  phase_ = phase;
  order_.begin(n_tokens);
  counter_.begin(kv_len);
  for (int layer = 0; !exact() && layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer)) lane.make_room(moment(layer, kv_len), 1);
}

void TieredKvStore::append(int layer, const float* k, const float* v, int n_tokens) {
  order_.check_append(layer, n_tokens);
  const int first = order_.first(), n = first + n_tokens;
  const int width = shape_.n_kv_heads * shape_.head_dim;
  for (int t = 0; t < n_tokens; ++t)
    cold_.write(layer, first + t, k + std::int64_t{t} * width, v + std::int64_t{t} * width);
  order_.append(layer);
  if (!exact() && ghosts_.has_centre(layer))
    owes_ghosts_ = true;
  else if (!awake_)
    ghosts_.write(layer, cold_.rows(layer, n), first, n_tokens);
  if (!exact())
    for (Residency& lane : lanes(layer)) lane.append(moment(layer, n), n - 1);
}

KvView TieredKvStore::view(int layer) const {
  KvView view;
  view.type = shape_.type;
  view.kv_len = order_.tokens(layer);
  view.n_kv_heads = shape_.n_kv_heads;
  view.head_dim = shape_.head_dim;
  view.cold = cold_.rows(layer, view.kv_len);
  view.lane_heads = lane_heads();
  if (exact()) return view;
  for (const Residency& lane : lanes(layer)) view.lanes.push_back(lane.lane().view());
  view.ghosts = ghosts_.view(layer);
  view.recall = relief_.epsilon(params());
  view.caution = caution_of(params());
  return view;
}

void TieredKvStore::count(int layer, const AttentionStats& stats) {
  std::vector<LaneStep> steps;
  for (Residency& lane : awake_ ? std::span<Residency>() : lanes(layer)) {
    const Residency::Tally tally = lane.take_tally();
    LaneStep& step = steps.emplace_back();
    step = {lane.lane().n_rows(),
            0,
            0,
            tally.promoted,
            tally.thawed,
            tally.frozen,
            lane.entropy(),
            lane.ghost_mass(),
            lane.tau()};
    if (exact()) continue;
    const AttentionStats::Lane& seen = stats.lanes[steps.size() - 1];
    step.n_attended = static_cast<int>(seen.probability.size());
    step.n_recalled = static_cast<int>(seen.recalled.size());
  }
  const int kv_len = order_.tokens(layer);
  const Moment now = moment(layer, kv_len);
  counter_.count({layer, kv_len, now.bound, exact(), now.epsilon}, steps);
}

void TieredKvStore::settle(int layer, const AttentionStats& stats) {
  order_.settle(layer);
  const int kv_len = order_.tokens(layer);
  const bool decode = phase_ == Phase::kDecode;
  std::size_t i = 0;
  for (Residency& lane : lanes(layer)) {
    if (!exact()) {
      lane.settle(moment(layer, kv_len), stats.lanes[i++]);
    } else if (!stats.lanes.empty()) {
      lane.learn(stats.lanes[i++], stats.n_rows, kv_len);
    }
  }
  if (decode) count(layer, stats);
  if (layer + 1 == shape_.n_layers) finish_step();
}

// Of a step of decode, if every layer has its token. Nobody asks for them in the step itself, in
// which the token is hot, and so one loop writes them all.
void TieredKvStore::write_owed_ghosts() {
  const int n = order_.length();
  if (std::exchange(owes_ghosts_, false) && n == order_.most()) ghosts_.write_newest(cold_, n - 1);
}

void TieredKvStore::finish_step() {
  write_owed_ghosts();
  if ((was_exact_ = exact())) seeded_ = false;
  if (phase_ == Phase::kPrefill && !full())
    for (int layer = 0; layer < shape_.n_layers; ++layer)
      bounds_.learn(layer, lanes(layer)[0].entropy(), stats_rows(order_.n_tokens()));
  if (phase_ == Phase::kDecode) {
    const KvUsage used = usage();
    const KvStep& line = counter_.finish(used.resident - used.ghosts, used.ghosts);
    if (recorder_) recorder_->step(line);
    relief_.step();
  }
  if (!options_.check) return;
  const bool all = phase_ == Phase::kDecode && counter_.counters().steps % kCheckSteps == 0;
  check_from(all ? 0 : order_.first());
}

void TieredKvStore::rewind(int position) {
  require(position >= 0 && position <= length(), "KV store: rewind: expected a position from 0 to ",
          length(), ", found ", position);
  write_owed_ghosts();
  ghosts_.cut(position);
  order_.rewind(position);
  if (position == 0) {
    seeded_ = false, was_exact_ = true;
    bounds_.forget();
  }
  bounds_.share(position);
  for (int layer = 0; !awake_ && layer < shape_.n_layers; ++layer)
    for (Residency& lane : lanes(layer))
      seeded_ = lane.cut(moment(layer, position), position) && seeded_;
  if (recorder_)
    recorder_->event({KvEvent::kRewind, static_cast<std::int32_t>(counter_.counters().steps), -1,
                      -1, position, 0, 0, 0});
}

void TieredKvStore::clear() {
  rewind(0);
  reset(Rung::kNone, 0);
  counter_.clear();
}

double TieredKvStore::reset(Rung rung, int exact_steps) {
  if (full()) return 0;
  relief_.begin(rung, params(), exact_steps);
  double thawed = 0;
  const int kv_len = length();
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    for (Residency& lane : lanes(layer)) {
      const Moment now = moment(layer, kv_len);
      const int before = lane.lane().n_rows();
      lane.reset(rung, now);
      thawed +=
          (lane.lane().n_rows() - before) * lane_heads() / static_cast<double>(shape_.n_kv_heads);
    }
  }
  return thawed;
}

// Lanes, and the exact copies and ghosts of tokens from `first` on.
void TieredKvStore::check_from(int first) const {
  const int n = length();
  cold_.check(first, n);
  std::int64_t lent = 0;
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    if (!awake_) ghosts_.check(layer, cold_.rows(layer, n), first, n);
    for (const Residency& lane : lanes(layer)) {
      lent += (lane.lane().n_rows() + kHotPageRows - 1) / kHotPageRows;
      if (seeded_ && phase_ == Phase::kDecode) lane.check(moment(layer, n));
    }
  }
  if (!arena_) return;
  require(lent + arena_->free_pages() == arena_->pages(), "KV check: ", arena_->pages(),
          " hot pages, but ", lent, " in use and ", arena_->free_pages(), " free");
  require(options_.hot_bytes == 0 || arena_->bytes() <= options_.hot_bytes,
          "KV check: ", arena_->bytes(), " hot bytes, more than the ", options_.hot_bytes,
          " promised");
}

KvUsage TieredKvStore::usage() const {
  KvUsage u;
  u.cold = cold_.bytes();
  u.full = length() * shape_.bytes_per_token();
  u.ghosts = ghosts_.bytes();
  u.bookkeeping = ghosts_.bookkeeping_bytes();
  if (arena_) u.hot = arena_->bytes();
  for (const Residency& lane : lanes_) u.bookkeeping += lane.bookkeeping_bytes();
  u.resident = u.hot + u.ghosts + (awake_ ? u.full : 0);
  if (awake_ && !full()) u.awake_until = bounds_.freeze_from();
  return u;
}

std::optional<float> TieredKvStore::ghost_mass() const {
  if (was_exact_) return {};
  float sum = 0;
  for (const Residency& lane : lanes_) sum += lane.ghost_mass();
  return sum / static_cast<float>(lanes_.size());
}

}  // namespace

std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options,
                                       ThreadPool* pool) {
  return make_kv_store(
      shape, options, make_memory_pages(),
      options.cold_file.empty() ? make_memory_pages() : make_file_pages(options.cold_file), pool);
}

std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options,
                                       std::unique_ptr<PageSource> fast,
                                       std::unique_ptr<PageSource> cold, ThreadPool* pool) {
  return std::make_unique<TieredKvStore>(shape, options, std::move(fast), std::move(cold), pool);
}

}  // namespace thaw
