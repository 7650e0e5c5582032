#include <algorithm>
#include <chrono>
#include <numeric>
#include <vector>

#include "device/bandwidth.h"
#include "model/backend.h"

namespace thaw {
namespace {

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Model& model, int n_threads)
      : Backend(n_threads),
        config_(model.config),
        ops_(make_cpu_ops(model.config, pool())),
        attention_(make_cpu_attention(pool())) {}

  std::string name() const override { return "cpu"; }
  Ops& ops() override { return *ops_; }
  Attention& attention() override { return *attention_; }

  std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options) override {
    return thaw::make_kv_store(shape, options, &pool());
  }

  Scratch begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) override {
    const auto n_rows = static_cast<std::int64_t>(tokens.size());
    const auto grown = [](std::vector<float>& buffer, std::int64_t rows, std::int64_t cols) {
      buffer.resize(std::max(buffer.size(), static_cast<std::size_t>(rows * cols)));
      return buffer.data();
    };
    positions_.resize(tokens.size());
    std::iota(positions_.begin(), positions_.end(), first_position);
    return {grown(x_, n_rows, config_.dim),
            grown(q_, n_rows, config_.q_dim()),
            grown(k_, n_rows, config_.kv_dim()),
            grown(v_, n_rows, config_.kv_dim()),
            grown(attn_out_, n_rows, config_.q_dim()),
            grown(h_, n_rows, config_.ffn_dim),
            grown(logits_, n_logits, config_.vocab_size),
            tokens,
            positions_};
  }

  void upload(float* to, std::span<const float> from) override {
    std::copy(from.begin(), from.end(), to);
  }
  std::span<const float> fetch(const Scratch& a, std::size_t n) override { return {a.logits, n}; }

  double time_cold(const std::function<void()>& work) override {
    if (!flusher_) flusher_ = std::make_unique<CacheFlusher>();
    flusher_->flush(pool());
    const auto start = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  double measure_bandwidth() override { return measure_read_bandwidth(pool()); }

 private:
  const Config& config_;
  std::unique_ptr<Ops> ops_;
  std::unique_ptr<Attention> attention_;
  std::vector<float> x_, q_, k_, v_, attn_out_, h_, logits_;  // scratch, most rows so far x width
  std::vector<std::int32_t> positions_;
  std::unique_ptr<CacheFlusher> flusher_;  // once something is timed
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const Model& model, int n_threads) {
  return std::make_unique<CpuBackend>(model, n_threads);
}

}  // namespace thaw
