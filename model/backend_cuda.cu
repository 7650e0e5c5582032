#include <algorithm>
#include <numeric>

#include "attention/attention_cuda.h"
#include "device/error.h"
#include "kvstore/full_store_cuda.h"
#include "model/backend_cuda.h"
#include "model/ops_cuda.h"

namespace thaw {
namespace {

constexpr std::size_t kMaxRecordings = 16;

int best_rows_of(const Config& c) {
  constexpr int kLeast = 512, kBest = 2048;
  // x, attn_out and q, k and v, gate and up and what is packed of them, and logits.
  const std::size_t numbers = std::size_t{1} * c.dim + 2 * c.q_dim() + 2 * c.kv_dim() +
                              3 * std::size_t{1} * c.ffn_dim + c.vocab_size;
  const bool has_room = device_facts().free_memory / 8 >= kBest * numbers * sizeof(float);
  return has_room ? kBest : kLeast;
}

}  // namespace

CudaBackend::CudaBackend(const Model& model, int n_threads)
    : Backend(n_threads),
      config_((device_facts(), model.config)),  // the first to say that there is no device
      weights_(model.weights, stream_),
      ops_(make_cuda_ops(model.config, weights_, stream_)),
      attention_(make_cuda_attention(stream_)),
      sampler_(stream_),
      best_rows_(best_rows_of(model.config)) {}

std::unique_ptr<KvStore> CudaBackend::make_kv_store(const KvShape& shape,
                                                    const KvOptions& options) {
  return make_cuda_kv_store(shape, options, stream_);
}

float* CudaBackend::grown(DeviceBuffer<float>& buffer, std::int64_t rows, std::int64_t cols,
                          const char* what) {
  const auto n = static_cast<std::size_t>(rows * cols);
  if (buffer.size() < n) {
    recordings_.clear();  // they refer to the memory that is given back
    buffer = {};
    buffer = DeviceBuffer<float>(n, what);
  }
  return buffer.data();
}

Scratch CudaBackend::begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) {
  for (const std::int32_t token : tokens)
    require(token >= 0 && token < config_.vocab_size, "embed: token: expected 0 to ",
            config_.vocab_size - 1, ", found ", token);
  const auto n_rows = static_cast<std::int64_t>(tokens.size());
  Scratch a = {};
  a.x = grown(x_, n_rows, config_.dim, "x");
  a.q = grown(q_, n_rows, config_.q_dim(), "q");
  a.k = grown(k_, n_rows, config_.kv_dim(), "k");
  a.v = grown(v_, n_rows, config_.kv_dim(), "v");
  a.attn_out = grown(attn_out_, n_rows, config_.q_dim(), "attn_out");
  a.h = grown(h_, n_rows, config_.ffn_dim, "ffn_hidden");
  a.logits = grown(logits_, n_logits, config_.vocab_size, "logits");
  send_ids(tokens, first_position);
  n_rows_ = tokens.size(), has_logits_ = n_logits > 0;
  a.tokens = {ids_.data(), tokens.size()};
  a.positions = {ids_.data() + tokens.size(), tokens.size()};
  return a;
}

void CudaBackend::send_ids(std::span<const std::int32_t> tokens, int first_position) {
  const std::size_t n = tokens.size();
  ids_read_.synchronize();  // the copy of the last pass's has read host_ids_
  if (ids_.size() < 2 * n) {
    recordings_.clear();  // likewise
    host_ids_ = {}, ids_ = {};
    host_ids_ = PinnedBuffer<std::int32_t>(2 * n, "tokens");
    ids_ = DeviceBuffer<std::int32_t>(2 * n, "tokens");
  }
  std::copy(tokens.begin(), tokens.end(), host_ids_.data());
  std::iota(host_ids_.data() + n, host_ids_.data() + 2 * n, first_position);
  copy_to_device(ids_.data(), host_ids_.data(), 2 * n, stream_);
  ids_read_.record(stream_);
}

CudaBackend::Recording* CudaBackend::find_recording(const KvStore& kv, const KvView& view) {
  for (Recording& r : recordings_)
    if (r.store == kv.id() && r.view == *view.device && r.type == view.type &&
        r.has_logits == has_logits_)
      return &r;
  return nullptr;
}

void CudaBackend::run(const KvStore& kv, const std::function<void()>& pass) {
  const KvView view = kv.view(0);
  const bool waits = ops_->observed() || kv.options().check;  // for what the device has, midway
  if (!uses_graphs_ || n_rows_ != 1 || waits || view.device == nullptr) return pass();
  Recording* recording = find_recording(kv, view);
  if (recording == nullptr) {  // a pass that takes its memory
    if (recordings_.size() == kMaxRecordings) recordings_.erase(recordings_.begin());
    recordings_.push_back({kv.id(), *view.device, view.type, has_logits_, {}});
    return pass();
  }
  if (!recording->graph) {
    recording->graph = Graph(stream_, pass);
    return recording->graph.launch(stream_);
  }
  recording->graph.launch(stream_);  // first: the device need not wait for the host's part
  const Stream::Muted muted(stream_);
  pass();
}

std::span<const float> CudaBackend::fetch(const Scratch& a, std::size_t n) {
  if (n == 0) return {};
  if (host_logits_.size() < n) {
    host_logits_ = {};
    host_logits_ = PinnedBuffer<float>(n, "logits");
  }
  copy_to_host(host_logits_.data(), a.logits, n, stream_);
  stream_.synchronize();  // the pass is done, and its logits are here
  return {host_logits_.data(), n};
}

void CudaBackend::enter_layer(int layer) {
  layer_.reset();
  if (layer >= 0) layer_.emplace(join("layer ", layer).c_str());
}

double CudaBackend::time_cold(const std::function<void()>& work) {
  const std::size_t bytes = std::max<std::size_t>(2 * device_facts().l2_bytes, 1 << 20);
  if (flush_.size() < bytes) flush_ = DeviceBuffer<std::byte>(bytes, "cache flush");
  fill_device(flush_.data(), 0, bytes, stream_);
  const Event start, end;
  start.record(stream_);
  {
    const ProfileRange range("timed");  // by which make profile finds it
    work();
  }
  end.record(stream_);
  end.synchronize();
  return milliseconds(start, end) / 1e3;
}

double CudaBackend::measure_bandwidth() {
  const std::size_t n = std::min<std::size_t>(device_facts().free_memory / 4, std::size_t{1} << 30);
  const DeviceBuffer<std::byte> from(n, "bandwidth"), to(n, "bandwidth");
  fill_device(from.data(), 1, n, stream_);
  double best = 0;
  for (int pass = 0; pass < 6; ++pass) {  // the first warms up
    const Event start, end;
    start.record(stream_);
    copy_on_device(to.data(), from.data(), n, stream_);
    end.record(stream_);
    end.synchronize();
    const double seconds = milliseconds(start, end) / 1e3;
    if (pass > 0) best = std::max(best, 2.0 * static_cast<double>(n) / seconds / 1e9);
  }
  return best;
}

bool has_cuda() { return true; }

std::string cuda_device_name() { return device_facts().name; }

std::unique_ptr<Backend> make_cuda_backend(const Model& model, int n_threads) {
  return std::make_unique<CudaBackend>(model, n_threads);
}

}  // namespace thaw
