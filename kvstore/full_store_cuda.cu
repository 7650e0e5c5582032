#include <algorithm>
#include <vector>

#include "device/error.h"
#include "kvstore/append_cuda.cuh"
#include "kvstore/device_view.h"
#include "kvstore/full_store_cuda.h"
#include "kvstore/step_order.h"
#include "kvstore/tiered_store_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {
namespace {

class CudaKvStore final : public KvStore {
 public:
  CudaKvStore(const KvShape& shape, const KvOptions& options, const Stream& stream);

  void begin(int n_tokens, Phase phase) override;
  void append(int layer, const float* k, const float* v, int n_tokens) override;
  KvView view(int layer) const override;
  void read(int layer, int first, int n_tokens, std::byte* rows) const override;
  int stats_rows(int) const override { return 0; }
  void settle(int layer, const AttentionStats& stats) override;
  void rewind(int position) override;
  void clear() override { rewind(0), counters_ = {}; }
  double reset(Rung, int) override { return 0; }  // nothing sleeps
  void check() const override;
  void record(KvRecorder* recorder) override { recorder_ = recorder; }

  int length() const override { return order_.length(); }
  const KvShape& shape() const override { return shape_; }
  const KvOptions& options() const override { return options_; }
  KvUsage usage() const override;
  const KvCounters& counters() const override { return counters_; }
  std::optional<float> ghost_mass() const override { return {}; }

 private:
  std::size_t page_bytes() const {
    return kTierTokens * static_cast<std::size_t>(shape_.bytes_per_token());
  }
  int room() const { return static_cast<int>(pages_.size()) * kTierTokens; }  // tokens
  void reserve(int n_tokens);
  void finish_step();

  KvShape shape_;
  KvOptions options_;
  const Stream& stream_;
  std::vector<DeviceBuffer<std::byte>> pages_;
  DeviceBuffer<const std::byte*> table_;       // of the pages; room for all
  PinnedBuffer<const std::byte*> host_table_;  // the same, which copies read
  DeviceBuffer<StepPlace> place_;
  std::vector<DeviceView> views_;  // a layer
  StepOrder order_;
  Phase phase_ = Phase::kPrefill;
  KvCounters counters_;
  KvStep line_;  // of the running decode step
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
      place_(1, "KV store"),
      order_(shape.n_layers) {
  const auto n_pages = static_cast<std::size_t>(tier_pages(shape.capacity));
  table_ = DeviceBuffer<const std::byte*>(n_pages, "KV store");
  host_table_ = PinnedBuffer<const std::byte*>(n_pages, "KV store");
  pages_.reserve(n_pages);
  line_.layers.resize(static_cast<std::size_t>(shape.n_layers));
  const std::size_t row = kv_row_bytes(shape.type, shape.head_dim);
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    DeviceView view;
    view.rows.pages = table_.data();
    view.rows.row_bytes = row;
    view.rows.value_offset = kTierTokens * row;
    view.rows.head_stride = 2 * kTierTokens * row;
    view.rows.offset = static_cast<std::size_t>(layer) * shape.n_kv_heads * view.rows.head_stride;
    view.rows.page_shift = kTierShift;
    view.kv_len = &place_.data()->kv_len;
    views_.push_back(view);
  }
}

// What begin() had taken when memory ran out is given back.
void CudaKvStore::reserve(int n_tokens) {
  const std::size_t had = pages_.size();
  const auto wanted = static_cast<std::size_t>(tier_pages(n_tokens));
  try {
    while (pages_.size() < wanted) {
      pages_.emplace_back(page_bytes(), "KV store");
      host_table_.data()[pages_.size() - 1] = pages_.back().data();
    }
  } catch (const Error& error) {
    const int fits = std::min(room(), shape_.capacity);
    pages_.resize(had);
    fail(error.what(), "; ", n_tokens, " tokens were asked for, ", fits, " would fit");
  }
  if (wanted > had)
    copy_to_device(table_.data() + had, host_table_.data() + had, wanted - had, stream_);
}

void CudaKvStore::begin(int n_tokens, Phase phase) {
  const int first = length();
  order_.prepare(shape_, n_tokens, phase);
  reserve(first + n_tokens);
  launch_overlapping("begin", set_place<StepPlace>, 1, kWarp, 0, stream_, place_.data(),
                     StepPlace{first, first + n_tokens});
  phase_ = phase, order_.begin(n_tokens);
  const int kv_len = first + n_tokens;
  line_ = {static_cast<std::int32_t>(counters_.steps), kv_len, std::move(line_.layers), 0, 0, 0, true};
  std::fill(line_.layers.begin(), line_.layers.end(), KvStep::Layer{});
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

// Page by page, through a copy of the layer's part of it.
void CudaKvStore::read(int layer, int first, int n_tokens, std::byte* rows) const {
  const DeviceRows& all = views_[static_cast<std::size_t>(layer)].rows;
  std::vector<std::byte> part(static_cast<std::size_t>(shape_.n_kv_heads) * all.head_stride);
  const std::byte* const page = part.data();
  const KvRows here = {{&page, 1},    0,          all.value_offset, all.head_stride,
                       all.row_bytes, kTierShift, kTierTokens};
  for (int token = first, end = first + n_tokens; token < end;) {
    const int at = token % kTierTokens, n = std::min(kTierTokens - at, end - token);
    copy_to_host(part.data(),
                 pages_[static_cast<std::size_t>(token / kTierTokens)].data() + all.offset,
                 part.size(), stream_);
    copy_rows(rows, shape_, here, at, n);
    rows += std::size_t{2} * all.row_bytes * static_cast<std::size_t>(shape_.n_kv_heads * n);
    token += n;
  }
}

void CudaKvStore::settle(int layer, const AttentionStats&) {
  order_.settle(layer);
  if (phase_ == Phase::kDecode) {
    const int kv_len = order_.tokens(layer);
    counters_.visible += kv_len;
    counters_.attended += kv_len;
    counters_.cold_bytes_visible += static_cast<double>(kv_len) *
                                    static_cast<double>(shape_.bytes_per_token()) / shape_.n_layers;
    line_.layers[static_cast<std::size_t>(layer)].hot = static_cast<float>(kv_len);
  }
  if (layer + 1 == shape_.n_layers) finish_step();
}

void CudaKvStore::finish_step() {
  if (phase_ == Phase::kDecode) {
    ++counters_.steps;
    line_.hot_bytes = usage().resident;
    if (recorder_) recorder_->step(line_);
  }
  if (options_.check) check();
}

void CudaKvStore::rewind(int position) {
  require(position >= 0 && position <= length(), "KV store: rewind: expected a position from 0 to ",
          length(), ", found ", position);
  order_.rewind(position);
  if (recorder_)
    recorder_->event(
        {KvEvent::kRewind, static_cast<std::int32_t>(counters_.steps), -1, -1, position, 0, 0, 0});
}

void CudaKvStore::check() const {
  require(order_.most() <= room(), "KV check: expected at most ", room(), " tokens, found ",
          order_.most());
  std::vector<const std::byte*> table(pages_.size());
  copy_to_host(table.data(), table_.data(), table.size(), stream_);
  for (std::size_t i = 0; i < table.size(); ++i)
    require(table[i] == pages_[i].data(), "KV check: page ", i, ": the device's table is wrong");
}

KvUsage CudaKvStore::usage() const {
  KvUsage u;
  u.full = u.resident = length() * shape_.bytes_per_token();
  u.hot = std::ssize(pages_) * static_cast<std::int64_t>(page_bytes());
  u.bookkeeping = static_cast<std::int64_t>(table_.bytes());
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
