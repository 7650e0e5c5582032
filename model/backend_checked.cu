// Every op on the GPU and on the CPU, on the same input: the GPU's, copied to the host. So an error
// shows in the op that makes it, and not in those that follow.
//
// An element may be off by a tolerance times (rms of its row + its own size). Errors of sums are
// independent and normal; 8 deviations hold for every element of a run. A deviation is a share of
// what a product's terms would give if they were independent:
//   codes    the CPU takes activations of quantised weights as codes: a block's err evenly within
//            its largest / 32639, and the largest is at most the root of the block's squares, so
//            sqrt(32 / 12) / 32639 = 5.0e-5, whatever the activations
//   rounded  with more than 8 rows the GPU rounds both factors to 16 bits, by u / sqrt(3) of them
//            (u = 2^-11 or 2^-8): 0.82 u
// Terms that cancel give less. That a row keeps a fifth of it is assumed, not derived; SmolLM2's
// do. So 40 deviations: 2^-9, and 32 u. In attention the rounding of queries is multiplied by the
// size of scores, with a deviation of 4 in real models: 8 * 4 u, the same. f32 sums err by less
// than 2^-12, angles of RoPE by position 2^-23.
#include <cmath>
#include <vector>

#include "device/error.h"
#include "model/backend_cuda.h"

namespace thaw {
namespace {

using Vector = std::vector<float>;

constexpr int kExactRows = 8;  // up to which the GPU computes in f32
constexpr double kExact = 0x1p-12, kCodes = 0x1p-9;
constexpr double kRounded = 32;  // units

double unit(bool bf16) { return bf16 ? 0x1p-8 : 0x1p-11; }

double product_tolerance(DType type, std::int64_t n_rows) {
  const double least = dtype_info(type).block > 1 ? kCodes : kExact;
  return n_rows <= kExactRows ? least : kRounded * unit(type == DType::kBF16) + least;
}

class Checker {
 public:
  explicit Checker(const Stream& stream) : stream_(stream) {}

  template <class T>
  std::vector<T> on_host(const T* device, std::int64_t n) const {
    std::vector<T> host(static_cast<std::size_t>(n));
    copy_to_host(host.data(), device, host.size(), stream_);
    return host;
  }

  // Throws Error unless the rows in device memory are those expected.
  void compare(const char* name, int layer, const float* device, const Vector& expected,
               std::int64_t cols, double tolerance) const {
    const Vector found = on_host(device, std::ssize(expected));
    for (std::int64_t first = 0; first < std::ssize(expected); first += cols) {
      double power = 0;
      for (std::int64_t c = 0; c < cols; ++c)
        power += double{expected[first + c]} * expected[first + c];
      const double rms = std::sqrt(power / static_cast<double>(cols));
      for (std::int64_t c = 0; c < cols; ++c) {
        const double e = expected[first + c], f = found[first + c];
        const double limit = tolerance * (rms + std::fabs(e));
        require(std::fabs(f - e) <= limit,
                "checked: ", layer < 0 ? "" : join("layer ", layer, ": "), name, ": row ",
                first / cols, ", element ", c, ": expected ", e, " (cpu), found ", f,
                " (cuda), which is off by ", std::fabs(f - e), ", more than ", limit);
      }
    }
  }

  int running_layer = -1;

 private:
  const Stream& stream_;
};

class CheckedOps final : public Ops {
 public:
  CheckedOps(const Config& config, Ops& cuda, Ops& cpu, Checker& checker)
      : config_(config), cuda_(cuda), cpu_(cpu), checker_(checker) {}

  void observe(Observer observer) override { cuda_.observe(std::move(observer)); }
  bool observed() const override { return cuda_.observed(); }
  void report(std::string_view name, int layer, const float* data, std::int64_t rows,
              std::int64_t cols) const override {
    cuda_.report(name, layer, data, rows, cols);
  }

  void embed(float* x, std::span<const std::int32_t> tokens, const Weights& weights) override {
    cuda_.embed(x, tokens, weights);
    Vector e(tokens.size() * config_.dim);
    cpu_.embed(e.data(), checker_.on_host(tokens.data(), std::ssize(tokens)), weights);
    checker_.compare("embed", -1, x, e, config_.dim, kExact);
  }

  void qkv(float* q, float* k, float* v, const float* x, const LayerWeights& w,
           std::span<const std::int32_t> positions) override {
    checker_.running_layer = w.index;
    const auto n_rows = std::ssize(positions);
    const Vector hx = checker_.on_host(x, n_rows * config_.dim);
    const auto host_positions = checker_.on_host(positions.data(), n_rows);
    cuda_.qkv(q, k, v, x, w, positions);
    Vector eq(n_rows * config_.q_dim()), ek(n_rows * config_.kv_dim()), ev(ek.size());
    cpu_.qkv(eq.data(), ek.data(), ev.data(), hx.data(), w, host_positions);
    const double angle = host_positions.back() * 0x1p-23;
    checker_.compare("q", w.index, q, eq, config_.q_dim(),
                     product_tolerance(w.wq.type, n_rows) + angle);
    checker_.compare("k", w.index, k, ek, config_.kv_dim(),
                     product_tolerance(w.wk.type, n_rows) + angle);
    checker_.compare("v", w.index, v, ev, config_.kv_dim(), product_tolerance(w.wv.type, n_rows));
  }

  void project_add(float* x, const float* h, const Tensor& w, std::int64_t n_rows) override {
    Vector e = checker_.on_host(x, n_rows * w.rows);
    const Vector hh = checker_.on_host(h, n_rows * w.cols);
    cuda_.project_add(x, h, w, n_rows);
    cpu_.project_add(e.data(), hh.data(), w, n_rows);
    checker_.compare("project_add", checker_.running_layer, x, e, w.rows,
                     product_tolerance(w.type, n_rows));
  }

  void gate_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) override {
    const Vector hx = checker_.on_host(x, n_rows * config_.dim);
    cuda_.gate_up(h, x, w, n_rows);
    Vector e(n_rows * config_.ffn_dim);
    cpu_.gate_up(e.data(), hx.data(), w, n_rows);
    checker_.compare("ffn_hidden", w.index, h, e, config_.ffn_dim,
                     2 * product_tolerance(w.w_up.type, n_rows));  // a product of two sums
  }

  void logits(float* logits, const float* x, const Weights& weights, std::int64_t n_rows) override {
    const Vector hx = checker_.on_host(x, n_rows * config_.dim);
    cuda_.logits(logits, x, weights, n_rows);
    Vector e(n_rows * config_.vocab_size);
    cpu_.logits(e.data(), hx.data(), weights, n_rows);
    checker_.compare("logits", -1, logits, e, config_.vocab_size,
                     product_tolerance(weights.output.type, n_rows));
  }

 private:
  const Config& config_;
  Ops &cuda_, &cpu_;
  Checker& checker_;
};

class CheckedAttention final : public Attention {
 public:
  CheckedAttention(Attention& cuda, Attention& cpu, Checker& checker)
      : cuda_(cuda), cpu_(cpu), checker_(checker) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats& stats, int stats_rows) override {
    const std::int64_t cols = std::int64_t{n_heads} * kv.head_dim;
    const Vector hq = checker_.on_host(q, n_rows * cols);
    cuda_.attend(o, q, n_rows, n_heads, kv, stats, stats_rows);
    Vector e(n_rows * cols);
    cpu_.attend(e.data(), hq.data(), n_rows, n_heads, kv, stats, stats_rows);
    const double tolerance =
        n_rows <= kExactRows ? kExact : kRounded * unit(kv.type == KvType::kBF16) + kExact;
    checker_.compare("attn_out", checker_.running_layer, o, e, cols, tolerance);
  }

 private:
  Attention &cuda_, &cpu_;
  Checker& checker_;
};

// Both stores; views are the CPU's with the GPU's device rows.
class CheckedKvStore final : public KvStore {
 public:
  CheckedKvStore(std::unique_ptr<KvStore> cuda, std::unique_ptr<KvStore> cpu,
                 const Checker& checker)
      : cuda_(std::move(cuda)), cpu_(std::move(cpu)), checker_(checker) {}

  void begin(int n_tokens, Phase phase) override {
    cuda_->begin(n_tokens, phase), cpu_->begin(n_tokens, phase);
  }
  void append(int layer, const float* k, const float* v, int n_tokens) override {
    const std::int64_t n = std::int64_t{n_tokens} * shape().n_kv_heads * shape().head_dim;
    cuda_->append(layer, k, v, n_tokens);
    cpu_->append(layer, checker_.on_host(k, n).data(), checker_.on_host(v, n).data(), n_tokens);
  }
  KvView view(int layer) const override {
    KvView view = cpu_->view(layer);
    view.device = cuda_->view(layer).device;
    return view;
  }
  void read(int layer, int first, int n_tokens, std::byte* rows) const override {
    cuda_->read(layer, first, n_tokens, rows);
  }
  int stats_rows(int n_tokens) const override { return cuda_->stats_rows(n_tokens); }
  void settle(int layer, const AttentionStats& stats) override {
    cuda_->settle(layer, stats), cpu_->settle(layer, stats);
  }
  void rewind(int position) override { cuda_->rewind(position), cpu_->rewind(position); }
  void clear() override { cuda_->clear(), cpu_->clear(); }
  double reset(Rung rung, int exact_steps) override {
    return cpu_->reset(rung, exact_steps), cuda_->reset(rung, exact_steps);
  }
  void check() const override { cuda_->check(), cpu_->check(); }
  void record(KvRecorder* recorder) override { cuda_->record(recorder); }
  int length() const override { return cuda_->length(); }
  const KvShape& shape() const override { return cuda_->shape(); }
  const KvOptions& options() const override { return cuda_->options(); }
  KvUsage usage() const override { return cuda_->usage(); }
  const KvCounters& counters() const override { return cuda_->counters(); }
  std::optional<float> ghost_mass() const override { return cuda_->ghost_mass(); }

 private:
  std::unique_ptr<KvStore> cuda_, cpu_;
  const Checker& checker_;
};

class CheckedBackend final : public Backend {
 public:
  CheckedBackend(const Model& model, int n_threads)
      : Backend(1),
        cuda_(model, 1),
        cpu_(make_cpu_backend(model, n_threads)),
        checker_(cuda_.stream()),
        ops_(model.config, cuda_.ops(), cpu_->ops(), checker_),
        attention_(cuda_.attention(), cpu_->attention(), checker_) {}

  std::string name() const override { return "checked"; }
  Ops& ops() override { return ops_; }
  Attention& attention() override { return attention_; }
  std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options) override {
    return std::make_unique<CheckedKvStore>(cuda_.make_kv_store(shape, options),
                                            cpu_->make_kv_store(shape, options), checker_);
  }
  Scratch begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) override {
    return cuda_.begin(tokens, first_position, n_logits);
  }
  void upload(float* to, std::span<const float> from) override { cuda_.upload(to, from); }
  std::span<const float> fetch(const Scratch& a, std::size_t n) override {
    return cuda_.fetch(a, n);
  }
  std::optional<Prediction> predict(const Scratch& a, Sampler& sampler, int n_vocab) override {
    const std::optional<Prediction> found = cuda_.predict(a, sampler, n_vocab);
    if (!found) return found;
    Sampler host = sampler;
    const auto n = static_cast<std::size_t>(n_vocab);
    const std::int32_t expected = host.sample(fetch(a, n).first(n));
    require(found->token == expected, "checked: sample: expected token ", expected,
            " (cpu), found ", found->token, " (cuda)");
    return found;
  }
  double time_cold(const std::function<void()>& work) override { return cuda_.time_cold(work); }
  double measure_bandwidth() override { return cuda_.measure_bandwidth(); }

 private:
  CudaBackend cuda_;
  std::unique_ptr<Backend> cpu_;
  Checker checker_;
  CheckedOps ops_;
  CheckedAttention attention_;
};

}  // namespace

std::unique_ptr<Backend> make_checked_backend(const Model& model, int n_threads) {
  return std::make_unique<CheckedBackend>(model, n_threads);
}

}  // namespace thaw
