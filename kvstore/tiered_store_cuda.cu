#include <algorithm>
#include <cstdio>
#include <optional>
#include <utility>
#include <vector>

#include "device/error.h"
#include "kvstore/append_cuda.cuh"
#include "kvstore/awake_rows_cuda.h"
#include "kvstore/bounds.h"
#include "kvstore/check_cuda.h"
#include "kvstore/cold_tier_cuda.h"
#include "kvstore/ghost_tier_cuda.h"
#include "kvstore/hot_tier_cuda.h"
#include "kvstore/shadow_lanes_cuda.h"
#include "kvstore/staged_rows_cuda.h"
#include "kvstore/step_counter.h"
#include "kvstore/step_order.h"
#include "kvstore/tiered_store_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {
namespace {

constexpr int kUnstaged = 8;  // tokens of a step that reads each earlier one about once anyway

class CudaTieredStore final : public KvStore {
 public:
  CudaTieredStore(const KvShape& shape, const KvOptions& options, const Stream& stream);

  void begin(int n_tokens, Phase phase) override;
  void append(int layer, const float* k, const float* v, int n_tokens) override;
  KvView view(int layer) const override;
  void read(int layer, int first, int n_tokens, std::byte* rows) const override;
  int stats_rows(int n_tokens) const override { return stats_rows(n_tokens, phase_, order_.end()); }
  void settle(int layer, const AttentionStats& stats) override;
  void rewind(int position) override;
  void clear() override { rewind(0), reset(Rung::kNone, 0), counter_.clear(); }
  double reset(Rung rung, int exact_steps) override;
  void check() const override { check_from(0); }
  void record(KvRecorder* recorder) override;

  int length() const override { return order_.length(); }
  const KvShape& shape() const override { return shape_; }
  const KvOptions& options() const override { return options_; }
  KvUsage usage() const override;
  const KvCounters& counters() const override { return catch_up(), counter_.counters(); }
  std::optional<float> ghost_mass() const override;

 private:
  const PolicyParams& params() const { return options_.policy; }
  bool exact(Phase phase) const {
    return is_awake_ || phase != Phase::kDecode || hot_.attends_all();
  }
  bool exact() const { return exact(phase_); }
  int stats_rows(int n_tokens, Phase phase, int kv_len) const {
    const bool asks = phase != Phase::kRestore && kv_len + 1 >= freeze_from_;
    return asks ? rows_to_learn(params(), n_tokens, exact(phase)) : 0;
  }
  bool stays_awake(int first, int kv_len);
  void wake_up();
  void fall_asleep(int kv_len);
  void begin_decode(int first);
  void make_views();
  void catch_up() const;
  struct Ended {
    Phase phase;
    bool exact, awake;
    int n_rows;  // of which there are statistics
    float epsilon;
  };
  void count(const Ended& ended) const;
  void finish_step();
  void write_owed_ghosts();
  void check_from(int first) const;

  KvShape shape_;
  KvOptions options_;
  mutable KvBounds bounds_;
  const Stream& stream_;
  std::unique_ptr<PageSource> fast_;
  CudaColdTier cold_;
  mutable CudaStagedRows staged_;
  mutable CudaAwakeRows awake_;
  CudaGhostTier ghosts_;
  mutable StepCounter counter_;
  CudaHotTier hot_;
  GhostCheck ghost_check_;
  std::vector<DeviceView> views_;  // a layer, of the running step
  StepOrder order_;
  Phase phase_ = Phase::kPrefill;
  int freeze_from_;                     // KvBounds::freeze_from(), or less: memory was refused
  bool is_awake_ = true;                // the running step's context is shorter: no lane has a row
  bool owes_ghosts_ = false;            // of the step's token, which is hot in the step itself
  bool is_staged_ = false;              // they are written to, and read in, staged_
  mutable bool reporting_ = false;      // work is queued that writes reports
  mutable std::optional<Ended> ended_;  // a step that is not in the counters yet
  bool was_exact_ = true;               // the last step attended all tokens exactly
  KvRecorder* recorder_ = nullptr;
  mutable std::optional<ShadowLanes> shadow_;  // where it wants events
};

void check_options(const KvShape& shape, const KvOptions& o) {
  require(o.cold_file.empty(), "--cold-file: expected --backend cpu: on the GPU every token is in ",
          "pinned memory, found ", o.cold_file);
  require(shape.head_dim % kRowUnit == 0 && shape.head_dim <= GhostQuery::kMaxDim,
          "KV store: expected a head_dim that ", kRowUnit, " divides, up to ", GhostQuery::kMaxDim,
          ", on the GPU, found ", shape.head_dim);
}

CudaTieredStore::CudaTieredStore(const KvShape& shape, const KvOptions& options,
                                 const Stream& stream)
    : shape_(shape),
      options_(options),
      bounds_(shape_, options_),
      stream_(stream),
      fast_(make_device_pages(stream)),
      cold_(shape, options.check, stream),
      staged_(cold_, shape_, stream),
      awake_(cold_, shape_, stream),
      ghosts_(*fast_, shape, bounds_.ghost_format(), bounds_.centre_tokens(), stream),
      counter_(shape_, options_.policy, bounds_.lane_heads()),
      hot_(*fast_, shape_, options_, bounds_, cold_.rows(0), counter_, stream),
      ghost_check_(shape, bounds_.ghost_format(), bounds_.centre_tokens()),
      views_(static_cast<std::size_t>(shape.n_layers)),
      order_(shape.n_layers),
      freeze_from_(bounds_.freeze_from()) {}

// Waits until what the device reported of the last steps is here, and counts it.
void CudaTieredStore::catch_up() const {
  staged_.join();
  if (reporting_) stream_.synchronize();
  reporting_ = false;
  const std::optional<Ended> ended = std::exchange(ended_, {});
  if (!ended) return;
  if (shadow_ && ended->exact)
    shadow_->end_exact(length());
  else if (shadow_)
    shadow_->end_decode(length(), ended->epsilon);
  if (ended->phase == Phase::kDecode) count(*ended);
  if (ended->phase == Phase::kPrefill)
    for (int layer = 0; layer < shape_.n_layers; ++layer)
      bounds_.learn(layer, hot_.lanes().report(layer * hot_.lanes().per_layer()).entropy,
                    ended->n_rows);
}

// Whether a step's context is too short to freeze, and there is memory to hold it.
bool CudaTieredStore::stays_awake(int first, int kv_len) {
  if (kv_len >= freeze_from_) return false;
  try {
    awake_.begin(first, kv_len);
  } catch (const Error& error) {
    std::fprintf(stderr, "thaw: %s; freezing begins now, not at %d tokens\n", error.what(),
                 freeze_from_);
    freeze_from_ = kv_len;
    return false;
  }
  return true;
}

// A context that was rewound is short again: all lanes give their rows back.
void CudaTieredStore::wake_up() {
  hot_.cut(0, order_.most());
  if (shadow_) shadow_->cut(0);
  staged_.release();
  is_awake_ = true;
}

// The cold tier gets what it lacks, and tokens that came while nothing froze get their ghosts.
void CudaTieredStore::fall_asleep(int kv_len) {
  is_awake_ = false;
  if (kv_len == 0) return;
  awake_.save(kv_len);
  bool reads_cold = false;
  try {
    ghosts_.reserve(kv_len);
  } catch (const Error&) {  // there is more when the rows are gone
    awake_.release();
    ghosts_.reserve(kv_len);
    reads_cold = true;
  }
  hot_.begin_exact(0, kv_len);
  for (int layer = 0; layer < shape_.n_layers; ++layer)
    ghosts_.write(layer, reads_cold ? cold_.rows(layer) : awake_.tier().rows(layer), hot_.moment(),
                  kv_len);
  awake_.release();
}

void CudaTieredStore::begin(int n_tokens, Phase phase) {
  const int first = length(), kv_len = first + n_tokens;
  order_.prepare(shape_, n_tokens, phase);
  catch_up();
  write_owed_ghosts();
  hot_.close(first);
  cold_.reserve(kv_len);
  const bool awake = stays_awake(first, kv_len);
  if (awake != is_awake_) awake ? wake_up() : fall_asleep(first);
  if (!awake) ghosts_.reserve(kv_len);
  hot_.reserve(kv_len, exact(phase) && stats_rows(n_tokens, phase, kv_len) > 0 ? kv_len : 0);
  is_staged_ =
      !awake && phase == Phase::kPrefill && n_tokens > kUnstaged && staged_.begin(first, kv_len);
  if (phase == Phase::kDecode && !awake)
    staged_.release(), begin_decode(first);
  else
    hot_.begin_exact(first, kv_len);
  phase_ = phase, order_.begin(n_tokens);
  make_views();
}

// Memory may be refused between the two: who is hot by then stays so.
void CudaTieredStore::begin_decode(int first) {
  if (hot_.seed(first) && shadow_) shadow_->seed(first);
  hot_.begin_decode(first);
  if (shadow_) shadow_->begin_decode(first);
}

void CudaTieredStore::make_views() {
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    DeviceView& view = views_[static_cast<std::size_t>(layer)] = {};
    view.rows = is_awake_    ? awake_.tier().rows(layer)
                : is_staged_ ? staged_.rows(layer)
                             : cold_.rows(layer);
    view.kv_len = &hot_.moment()->kv_len;
    if (exact()) {
      if (stats_rows(order_.n_tokens()) > 0) view.stats = hot_.lanes().exact_stats();
      continue;
    }
    view.hot = hot_.lanes().hot(layer);
    view.ghosts = ghosts_.view(layer);
    view.recall = &hot_.moment()->epsilon;
    view.caution = caution_of(options_.policy);
    view.stats = hot_.lanes().decode_stats(layer);
  }
}

void CudaTieredStore::append(int layer, const float* k, const float* v, int n_tokens) {
  order_.check_append(layer, n_tokens);
  const auto heads = static_cast<unsigned>(shape_.n_kv_heads);
  const DeviceRows rows = views_[static_cast<std::size_t>(layer)].rows;
  const DeviceHot hot = hot_.lanes().hot(layer);
  std::int32_t* filled = hot_.lanes().all().from +
                         std::int64_t{layer} * hot_.lanes().per_layer() * hot_.lanes().all().room;
  if (is_staged_) staged_.fetch(layer);
  with_kv_type(shape_.type, [&](auto type) {
    constexpr KvType kType = decltype(type)::value;
    if (exact())
      launch_overlapping("append", append_rows<kType>, dim3(static_cast<unsigned>(n_tokens), heads),
                         kAppendThreads, 0, stream_, rows, k, v, hot_.moment(), shape_.head_dim);
    else
      launch_overlapping("append", append_hot_row<kType>, heads, kAppendThreads, 0, stream_, rows,
                         hot, filled, k, v, hot_.moment(), shape_.head_dim);
  });
  if (is_staged_) staged_.save(layer);
  if (!exact())
    owes_ghosts_ = true;
  else if (!is_awake_)
    ghosts_.write(layer, rows, hot_.moment(), n_tokens);
  order_.append(layer);
}

KvView CudaTieredStore::view(int layer) const {
  KvView view;
  view.type = shape_.type;
  view.kv_len = order_.tokens(layer);
  view.n_kv_heads = shape_.n_kv_heads;
  view.head_dim = shape_.head_dim;
  view.cold = cold_.host().rows(layer, view.kv_len);
  view.device = &views_[static_cast<std::size_t>(layer)];
  view.lane_heads = hot_.lanes().all().lane_heads;
  if (!exact()) view.recall = hot_.epsilon(), view.caution = caution_of(options_.policy);
  return view;
}

void CudaTieredStore::read(int layer, int first, int n_tokens, std::byte* rows) const {
  if (is_awake_) return awake_.tier().read(layer, first, n_tokens, rows);
  catch_up();  // what has settled is written
  copy_rows(rows, shape_, cold_.host().rows(layer, length()), first, n_tokens);
}

void CudaTieredStore::settle(int layer, const AttentionStats&) {
  order_.settle(layer);
  const int n_rows = stats_rows(order_.n_tokens());
  if (exact() && n_rows > 0) hot_.learn(layer, n_rows);
  if (!is_awake_ || n_rows > 0) reporting_ = true;
  if (layer + 1 == shape_.n_layers) finish_step();
}

// Those of a step of decode, if every layer has its token. No kernel of the step itself asks for
// them, and so one kernel writes them all, while the token's rows are still the last ones.
void CudaTieredStore::write_owed_ghosts() {
  if (std::exchange(owes_ghosts_, false) && order_.length() == order_.most())
    ghosts_.write_newest(cold_.rows(0), cold_.layer_bytes(), hot_.lanes().hot(0), hot_.moment());
}

// Every layer's statistics are there: one kernel settles all lanes.
void CudaTieredStore::finish_step() {
  const bool decode = phase_ == Phase::kDecode;
  was_exact_ = exact();
  write_owed_ghosts();
  if (was_exact_)
    hot_.end_exact();
  else
    hot_.settle();
  staged_.join();
  ended_ = {phase_, was_exact_, is_awake_, stats_rows(order_.n_tokens()), hot_.epsilon()};
  if (decode) hot_.end_decode();
  if (!options_.check) return;
  stream_.synchronize();  // what the kernels wrote can be read
  const int n = length(), first = order_.first();
  if (is_awake_) awake_.save(n);
  for (int token = first; token < n; ++token)
    for (int l = 0; l < shape_.n_layers; ++l) cold_.wrote(l, token);
  catch_up();
  check_from(decode && counter_.counters().steps % kCheckSteps == 0 ? 0 : first);
}

// As the CPU's store counts, lane by lane and in that order.
void CudaTieredStore::count(const Ended& ended) const {
  counter_.begin(length());
  const int n = hot_.lanes().per_layer();
  std::vector<LaneStep> steps(static_cast<std::size_t>(ended.awake ? 0 : n));
  for (int layer = 0; layer < shape_.n_layers; ++layer) {
    for (std::size_t i = 0; i < steps.size(); ++i)
      steps[i] = hot_.take_step(layer * n + static_cast<int>(i));
    const int kv_len = order_.tokens(layer);
    counter_.count({layer, kv_len, bounds_.bound(layer, kv_len), ended.exact, ended.epsilon},
                   steps);
  }
  const KvUsage used = usage();
  const KvStep& line = counter_.finish(used.resident - used.ghosts, used.ghosts);
  if (recorder_) recorder_->step(line);
}

void CudaTieredStore::rewind(int position) {
  require(position >= 0 && position <= length(), "KV store: rewind: expected a position from 0 to ",
          length(), ", found ", position);
  catch_up();
  write_owed_ghosts();
  if (is_awake_)
    awake_.cut(position);
  else
    hot_.cut(position, order_.most());
  was_exact_ |= position == 0;
  order_.rewind(position);
  ghost_check_.cut(position);
  if (!shadow_) return;
  if (!is_awake_) shadow_->cut(position);
  const auto step = static_cast<std::int32_t>(counter_.counters().steps);
  recorder_->event({KvEvent::kRewind, step, -1, -1, position, 0, 0, 0});
}

double CudaTieredStore::reset(Rung rung, int exact_steps) {
  catch_up();
  write_owed_ghosts();
  const double woken = hot_.reset(rung, length(), exact_steps);
  if (shadow_) shadow_->reset(rung, length());
  return woken;
}

void CudaTieredStore::record(KvRecorder* recorder) {
  catch_up();
  const bool wants_events = recorder && recorder->wants_events();
  require(!wants_events || length() == 0,
          "KV store: a recorder of freezes and thaws: expected an empty store, found ", length(),
          " tokens");
  recorder_ = recorder;
  shadow_.reset();
  if (wants_events)
    shadow_.emplace(shape_, params(), bounds_, cold_, hot_, counter_, *recorder, stream_);
}

KvUsage CudaTieredStore::usage() const {
  KvUsage u;
  u.cold = cold_.host().bytes();
  u.full = length() * shape_.bytes_per_token();
  u.ghosts = ghosts_.bytes();
  u.hot = hot_.lanes().hot_bytes();
  u.bookkeeping = ghosts_.bookkeeping_bytes() + hot_.bookkeeping_bytes() + cold_.table_bytes() +
                  staged_.bytes() + awake_.tier().table_bytes();
  u.resident = u.hot + u.ghosts + (is_awake_ ? u.full : 0);
  u.hot += awake_.tier().bytes();
  if (is_awake_) u.awake_until = freeze_from_;
  return u;
}

std::optional<float> CudaTieredStore::ghost_mass() const {
  if (was_exact_) return {};
  catch_up();
  float sum = 0;
  for (int lane = 0; lane < hot_.lanes().n_lanes(); ++lane)
    sum += hot_.lanes().report(lane).ghost_mass;
  return sum / static_cast<float>(hot_.lanes().n_lanes());
}

void CudaTieredStore::check_from(int first) const {
  catch_up();
  stream_.synchronize();  // what kernels wrote can be read, in the middle of a step, too
  const int n = length();
  if (is_awake_) awake_.save(n), awake_.tier().check();
  cold_.host().check(first, n);
  for (int layer = 0; !is_awake_ && layer < shape_.n_layers; ++layer) {
    const KvRows cold = cold_.host().rows(layer, n);
    ghost_check_.check(layer, cold, ghosts_.view(layer), first, owes_ghosts_ ? n - 1 : n, stream_);
    if (!hot_.is_seeded() || phase_ != Phase::kDecode) continue;
    for (int i = 0; i < hot_.lanes().per_layer(); ++i)
      check_lane(hot_.lanes().snapshot(layer * hot_.lanes().per_layer() + i, n),
                 {params(), layer, i * hot_.lanes().all().lane_heads, hot_.lanes().all().lane_heads,
                  n, bounds_.bound(layer, n), hot_.can_freeze(n), hot_.lanes().all().kv_row, cold});
  }
  hot_.lanes().check_pages();
  require(options_.hot_bytes == 0 || hot_.lanes().hot_bytes() <= options_.hot_bytes,
          "KV check: ", hot_.lanes().hot_bytes(), " hot bytes, more than the ", options_.hot_bytes,
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
