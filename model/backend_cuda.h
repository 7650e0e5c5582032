// The GPU as a backend: the weights and the activations in device memory, all work on one stream.
#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "device/cuda.h"
#include "kvstore/device_view.h"
#include "model/backend.h"
#include "model/device_weights.h"
#include "model/sampler_cuda.h"

namespace thaw {

class CudaBackend final : public Backend {
 public:
  // Keeps a reference to `model`. Throws Error when there is no device or too little memory.
  CudaBackend(const Model& model, int n_threads);

  std::string name() const override { return "cuda"; }
  Ops& ops() override { return *ops_; }
  Attention& attention() override { return *attention_; }
  // 2,048: products of fewer rows leave multiprocessors idle, and quantised weights are widened for
  // every pass. Fewer where activations of so many would take more than an eighth of the memory
  // that the weights leave.
  int best_rows() const override { return best_rows_; }
  int best_freeze_from() const override { return 65536; }  // docs/performance-gpu.md
  std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options) override;

  // The tokens are on their way to the device when it returns. Throws Error on a token outside the
  // vocabulary, with nothing changed.
  Scratch begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) override;
  // A pass of one row is recorded as a graph the second time that a store sees it, and launched as
  // a whole from then on, unless somebody observes or the store checks itself.
  void run(const KvStore& kv, const std::function<void()>& pass) override;
  void upload(float* to, std::span<const float> from) override {
    copy_to_device(to, from.data(), from.size(), stream_);
  }
  // Waits for the stream.
  std::span<const float> fetch(const Scratch& a, std::size_t n) override;
  std::optional<Prediction> predict(const Scratch& a, Sampler& sampler, int n_vocab) override {
    return sampler_.draw(a.logits, config_.vocab_size, n_vocab, sampler);
  }

  void enter_layer(int layer) override;  // an NVTX range, "layer 3"
  double time_cold(const std::function<void()>& work) override;
  // Of a copy within device memory, bytes read and written.
  double measure_bandwidth() override;

  const Stream& stream() const { return stream_; }
  void use_graphs(bool use) { uses_graphs_ = use; }  // true at first

 private:
  // What a graph refers to besides the weights and the activations: all that the store has, of
  // which what can move moves with the view.
  struct Recording {
    std::uint64_t store;  // its id()
    DeviceView view;      // of the first layer
    KvType type;
    bool has_logits;
    Graph graph;  // none yet when it was seen only once
  };
  Recording* find_recording(const KvStore& kv, const KvView& view);

  float* grown(DeviceBuffer<float>& buffer, std::int64_t rows, std::int64_t cols, const char* what);
  void send_ids(std::span<const std::int32_t> tokens, int first_position);

  const Config& config_;
  Stream stream_;
  DeviceWeights weights_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Attention> attention_;
  CudaSampler sampler_;
  DeviceBuffer<float> x_, q_, k_, v_, attn_out_, h_, logits_;  // most rows so far x width
  PinnedBuffer<float> host_logits_;
  PinnedBuffer<std::int32_t> host_ids_;  // tokens, then positions
  DeviceBuffer<std::int32_t> ids_;       // the same
  Event ids_read_;                       // host_ids_ may be written again
  std::vector<Recording> recordings_;    // oldest first
  bool uses_graphs_ = true, has_logits_ = false;
  const int best_rows_;
  std::size_t n_rows_ = 0;  // of the running pass
  std::optional<ProfileRange> layer_;
  DeviceBuffer<std::byte> flush_;  // what is written to empty the caches; once something is timed
};

}  // namespace thaw
