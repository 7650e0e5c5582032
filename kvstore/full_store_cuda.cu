#include <vector>

#include "device/error.h"
#include "kvstore/append_cuda.cuh"
#include "kvstore/device_view.h"
#include "kvstore/exact_tier_cuda.h"
#include "kvstore/full_store_cuda.h"
#include "kvstore/step_counter.h"
#include "kvstore/step_order.h"
#include "kvstore/tiered_store_cuda.h"

namespace thaw {
namespace {

class CudaKvStore final : public KvStore {
 public:
  CudaKvStore(const KvShape& shape, const KvOptions& options, const Stream& stream);

  void begin(int n_tokens, Phase phase) override;
  void append(int layer, const float* k, const float* v, int n_tokens) override;
  KvView view(int layer) const override;
  void read(int layer, int first, int n_tokens, std::byte* rows) const override {
    tier_.read(layer, first, n_tokens, rows);
  }
  int stats_rows(int) const override { return 0; }
  void settle(int layer, const AttentionStats& stats) override;
  void rewind(int position) override;
  void clear() override { rewind(0), counter_.clear(); }
  double reset(Rung, int) override { return 0; }  // nothing sleeps
  void check() const override;
  void record(KvRecorder* recorder) override { recorder_ = recorder; }

  int length() const override { return order_.length(); }
  const KvShape& shape() const override { return shape_; }
  const KvOptions& options() const override { return options_; }
  KvUsage usage() const override;
  const KvCounters& counters() const override { return counter_.counters(); }
  std::optional<float> ghost_mass() const override { return {}; }

 private:
  void finish_step();

  KvShape shape_;
  KvOptions options_;
  const Stream& stream_;
  CudaExactTier tier_;
  DeviceBuffer<StepPlace> place_;
  std::vector<DeviceView> views_;  // a layer
  StepOrder order_;
  Phase phase_ = Phase::kPrefill;
  StepCounter counter_;
  KvRecorder* recorder_ = nullptr;
};

void check_options(const KvOptions& o) {
  require(o.cold_file.empty(),
          "--cold-file: expected --backend cpu: on the GPU every token is in "
          "device memory, found ",
          o.cold_file);
}

CudaKvStore::CudaKvStore(const KvShape& shape, const KvOptions& options, const Stream& stream)
    : shape_(shape),
      options_(options),
      stream_(stream),
      tier_(shape, stream),
      place_(1, "KV store"),
      order_(shape.n_layers),
      counter_(shape_, options_.policy, shape.n_kv_heads) {
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    DeviceView view;
    view.rows = tier_.rows(layer);
    view.kv_len = &place_.data()->kv_len;
    views_.push_back(view);
  }
}

void CudaKvStore::begin(int n_tokens, Phase phase) {
  const int first = length();
  order_.prepare(shape_, n_tokens, phase);
  tier_.reserve(first + n_tokens);
  launch_overlapping("begin", set_place<StepPlace>, 1, kWarp, 0, stream_, place_.data(),
                     StepPlace{first, first + n_tokens});
  phase_ = phase, order_.begin(n_tokens);
  counter_.begin(first + n_tokens);
}

void CudaKvStore::append(int layer, const float* k, const float* v, int n_tokens) {
  order_.check_append(layer, n_tokens);
  const DeviceRows& rows = views_[static_cast<std::size_t>(layer)].rows;
  with_kv_type(shape_.type, [&](auto type) {
    launch_overlapping(
        "append", append_rows<decltype(type)::value>,
        dim3(static_cast<unsigned>(n_tokens), static_cast<unsigned>(shape_.n_kv_heads)),
        kAppendThreads, 0, stream_, rows, k, v, place_.data(), shape_.head_dim);
  });
  order_.append(layer);
}

KvView CudaKvStore::view(int layer) const {
  KvView view;
  view.type = shape_.type;
  view.kv_len = order_.tokens(layer);
  view.n_kv_heads = view.lane_heads = shape_.n_kv_heads;
  view.head_dim = shape_.head_dim;
  view.device = &views_[static_cast<std::size_t>(layer)];
  return view;
}

void CudaKvStore::settle(int layer, const AttentionStats&) {
  order_.settle(layer);
  if (phase_ == Phase::kDecode) {
    const int kv_len = order_.tokens(layer);
    counter_.count({layer, kv_len, kv_len, true, 0}, {});
  }
  if (layer + 1 == shape_.n_layers) finish_step();
}

void CudaKvStore::finish_step() {
  if (phase_ == Phase::kDecode) {
    const KvStep& line = counter_.finish(usage().resident, 0);
    if (recorder_) recorder_->step(line);
  }
  if (options_.check) check();
}

void CudaKvStore::rewind(int position) {
  require(position >= 0 && position <= length(), "KV store: rewind: expected a position from 0 to ",
          length(), ", found ", position);
  order_.rewind(position);
  if (recorder_)
    recorder_->event(
        {KvEvent::kRewind, static_cast<std::int32_t>(counters().steps), -1, -1, position, 0, 0, 0});
}

void CudaKvStore::check() const {
  require(order_.most() <= tier_.room(), "KV check: expected at most ", tier_.room(),
          " tokens, found ", order_.most());
  tier_.check();
}

KvUsage CudaKvStore::usage() const {
  KvUsage u;
  u.full = u.resident = length() * shape_.bytes_per_token();
  u.hot = tier_.bytes();
  u.bookkeeping = tier_.table_bytes();
  return u;
}

}  // namespace

std::unique_ptr<KvStore> make_cuda_kv_store(const KvShape& shape, const KvOptions& options,
                                            const Stream& stream) {
  if (options.policy.policy != Policy::kFull) return make_cuda_tiered_store(shape, options, stream);
  check_options(options);
  check_shape(shape);
  return std::make_unique<CudaKvStore>(shape, options, stream);
}

}  // namespace thaw
