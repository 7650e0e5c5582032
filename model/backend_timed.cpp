#include "model/backend_timed.h"

#include <algorithm>

namespace thaw {

class TimedBackend::TimedOps final : public Ops {
 public:
  explicit TimedOps(TimedBackend& timer) : timer_(timer), ops_(timer.inner_->ops()) {}

  void embed(float* x, std::span<const std::int32_t> tokens, const Weights& weights) override {
    timer_.measure("embed", [&] { ops_.embed(x, tokens, weights); });
  }
  void qkv(float* q, float* k, float* v, const float* x, const LayerWeights& w,
           std::span<const std::int32_t> positions) override {
    timer_.measure("qkv", [&] { ops_.qkv(q, k, v, x, w, positions); });
  }
  void project_add(float* x, const float* h, const Tensor& w, std::int64_t n_rows) override {
    timer_.measure("project_add", [&] { ops_.project_add(x, h, w, n_rows); });
  }
  void gate_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) override {
    timer_.measure("gate_up", [&] { ops_.gate_up(h, x, w, n_rows); });
  }
  void logits(float* logits, const float* x, const Weights& weights, std::int64_t n_rows) override {
    timer_.measure("logits", [&] { ops_.logits(logits, x, weights, n_rows); });
  }
  void observe(Observer observer) override { ops_.observe(std::move(observer)); }
  bool observed() const override { return ops_.observed(); }
  void report(std::string_view name, int layer, const float* data, std::int64_t rows,
              std::int64_t cols) const override {
    ops_.report(name, layer, data, rows, cols);
  }

 private:
  TimedBackend& timer_;
  Ops& ops_;
};

class TimedBackend::TimedAttention final : public Attention {
 public:
  explicit TimedAttention(TimedBackend& timer)
      : timer_(timer), attention_(timer.inner_->attention()) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats& stats, int stats_rows) override {
    timer_.measure("attend",
                   [&] { attention_.attend(o, q, n_rows, n_heads, kv, stats, stats_rows); });
  }

 private:
  TimedBackend& timer_;
  Attention& attention_;
};

namespace {

class TimedKvStore final : public KvStore {
 public:
  TimedKvStore(TimedBackend& timer, std::unique_ptr<KvStore> kv)
      : timer_(timer), kv_(std::move(kv)) {}

  void append(int layer, const float* k, const float* v, int n_tokens) override {
    timer_.measure("append", [&] { kv_->append(layer, k, v, n_tokens); });
  }
  void settle(int layer, const AttentionStats& stats) override {
    timer_.measure("settle", [&] { kv_->settle(layer, stats); });
  }
  void begin(int n_tokens, Phase phase) override { kv_->begin(n_tokens, phase); }
  KvView view(int layer) const override { return kv_->view(layer); }
  void read(int layer, int first, int n_tokens, std::byte* rows) const override {
    kv_->read(layer, first, n_tokens, rows);
  }
  int stats_rows(int n_tokens) const override { return kv_->stats_rows(n_tokens); }
  void rewind(int position) override { kv_->rewind(position); }
  void clear() override { kv_->clear(); }
  double reset(Rung rung, int exact_steps) override { return kv_->reset(rung, exact_steps); }
  void check() const override { kv_->check(); }
  void record(KvRecorder* recorder) override { kv_->record(recorder); }
  int length() const override { return kv_->length(); }
  const KvShape& shape() const override { return kv_->shape(); }
  const KvOptions& options() const override { return kv_->options(); }
  KvUsage usage() const override { return kv_->usage(); }
  const KvCounters& counters() const override { return kv_->counters(); }
  std::optional<float> ghost_mass() const override { return kv_->ghost_mass(); }

 private:
  TimedBackend& timer_;
  std::unique_ptr<KvStore> kv_;
};

}  // namespace

TimedBackend::TimedBackend(std::unique_ptr<Backend> inner, std::vector<std::string> ops,
                           OpTimes& times)
    : Backend(1),
      inner_(std::move(inner)),
      wanted_(std::move(ops)),
      times_(times),
      ops_(std::make_unique<TimedOps>(*this)),
      attention_(std::make_unique<TimedAttention>(*this)) {}

TimedBackend::~TimedBackend() = default;

Ops& TimedBackend::ops() { return *ops_; }

Attention& TimedBackend::attention() { return *attention_; }

std::unique_ptr<KvStore> TimedBackend::make_kv_store(const KvShape& shape,
                                                     const KvOptions& options) {
  return std::make_unique<TimedKvStore>(*this, inner_->make_kv_store(shape, options));
}

Scratch TimedBackend::begin(std::span<const std::int32_t> tokens, int first_position,
                            int n_logits) {
  one_row_ = tokens.size() == 1;
  return inner_->begin(tokens, first_position, n_logits);
}

void TimedBackend::measure(const std::string& op, const std::function<void()>& work) {
  if (!one_row_ || std::find(wanted_.begin(), wanted_.end(), op) == wanted_.end()) return work();
  times_[op].push_back(inner_->time_cold(work));
}

}  // namespace thaw
