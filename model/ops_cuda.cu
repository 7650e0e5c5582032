// The ops on the GPU: each is one kernel for one row of activations. A few rows are taken four at a
// time, which reads the weights once for four; many go through the GEMM, and what one row has
// fused into its kernel is kernels of its own.
#include <algorithm>

#include "device/error.h"
#include "model/gemm_cuda.h"
#include "model/gemv_cuda.cuh"
#include "model/ops_cuda.h"
#include "model/pack_cuda.cuh"

namespace thaw {
namespace {

// A pair of a head by its angle   (RoFormer, 2104.09864, eq. 34)
__device__ inline void rotate(float* first, float* second, int position, float inverse_frequency) {
  float sin, cos;
  sincosf(static_cast<float>(position) * inverse_frequency, &sin, &cos);
  const float a = *first, b = *second;
  *first = a * cos - b * sin;
  *second = a * sin + b * cos;
}

// y (T x w.rows) = W x, or += W x, or = silu(W x) * y. A pair is two rows that follow each other.
enum class Store { kSet, kAdd, kGate };
struct Project {
  DeviceMatrix w;
  float* y;
  Store store;

  __host__ __device__ int n_pairs() const { return (w.rows + 1) / 2; }
  __device__ WeightRow row(int pair, int i) const {
    return row_of(w, min(2 * pair + i, w.rows - 1));
  }
  struct Loaded {
    float y0, y1;
  };
  __device__ float* at(int pair, int t) const {
    return y + static_cast<std::int64_t>(t) * w.rows + 2 * pair;
  }
  __device__ Loaded load(int pair, int t) const {
    if (store == Store::kSet) return {};
    const float* old = at(pair, t);
    return {old[0], 2 * pair + 1 < w.rows ? old[1] : 0.0f};
  }
  __device__ void finish(int pair, int t, float y0, float y1, Loaded old) const {
    float* out = at(pair, t);
    out[0] = stored(y0, old.y0);
    if (2 * pair + 1 < w.rows) out[1] = stored(y1, old.y1);
  }
  __device__ float stored(float value, float old) const {
    return store == Store::kAdd ? value + old : store == Store::kGate ? silu(value) * old : value;
  }
};

// h (T x ffn_dim) = silu(Wgate x) * (Wup x). A pair is the same row of both.
struct SwiGlu {
  DeviceMatrix gate, up;
  float* h;

  __host__ __device__ int n_pairs() const { return gate.rows; }
  __device__ WeightRow row(int pair, int i) const {
    return i == 0 ? row_of(gate, pair) : row_of(up, pair);
  }
  struct Loaded {};
  __device__ Loaded load(int, int) const { return {}; }
  __device__ void finish(int pair, int t, float y0, float y1, Loaded) const {
    h[static_cast<std::int64_t>(t) * gate.rows + pair] = silu(y0) * y1;
  }
};

// q, k, v = Wq x, Wk x, Wv x, with RoPE on q and k. A pair is what RoPE rotates together, of v two
// rows that follow each other. A matrix of 0 rows is left out.
struct QkvRope {
  DeviceMatrix wq, wk, wv;
  float *q, *k, *v;
  const std::int32_t* positions;     // T
  const float* inverse_frequencies;  // half
  int half;                          // head_dim / 2
  bool interleaved;

  struct Place {
    int which;        // 0: q, 1: k, 2: v
    int first, step;  // the pair's rows are first and first + step
    int frequency;
  };
  __device__ Place place(int pair) const {
    const int q_pairs = wq.rows / 2, k_pairs = wk.rows / 2;
    const int which = pair < q_pairs ? 0 : pair < q_pairs + k_pairs ? 1 : 2;
    const int p = pair - (which > 0 ? q_pairs : 0) - (which > 1 ? k_pairs : 0);
    if (which == 2 || interleaved) return {which, 2 * p, 1, p % half};
    return {which, p / half * 2 * half + p % half, half, p % half};
  }

  __host__ __device__ int n_pairs() const { return (wq.rows + wk.rows + wv.rows) / 2; }
  __device__ WeightRow row(int pair, int i) const {
    const Place at = place(pair);
    const int r = at.first + i * at.step;
    return at.which == 0 ? row_of(wq, r) : at.which == 1 ? row_of(wk, r) : row_of(wv, r);
  }
  struct Loaded {
    int position;
    float inverse_frequency;
  };
  __device__ Loaded load(int pair, int t) const {
    return {positions[t], inverse_frequencies[place(pair).frequency]};
  }
  __device__ void finish(int pair, int t, float a, float b, Loaded angle) const {
    const Place at = place(pair);
    float* out = at.which == 0 ? q : at.which == 1 ? k : v;
    const int n_cols = at.which == 0 ? wq.rows : at.which == 1 ? wk.rows : wv.rows;
    out += static_cast<std::int64_t>(t) * n_cols + at.first;
    out[0] = a, out[at.step] = b;
    if (at.which < 2) rotate(out, out + at.step, angle.position, angle.inverse_frequency);
  }
};

constexpr int kThreads = 128;
constexpr int kMaxGemvRows = 8;  // more go through the GEMM

// Computes  x (T x dim) = rows of the table, widened; NaN for a token that it does not have
// Grid      T
// Block     kThreads; threads take units of 16 bytes in turns
// Shared    none
// Bytes     reads T rows of the table, writes x
template <DType kType>
__global__ void embed_rows(float* x, const std::int32_t* tokens, DeviceMatrix table) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int token = tokens[blockIdx.x];
  const bool is_known = token >= 0 && token < table.rows;
  const WeightRow row = row_of(table, is_known ? token : 0);
  x += static_cast<std::int64_t>(blockIdx.x) * table.cols;
  for (int u = static_cast<int>(threadIdx.x); u < table.units; u += kThreads) {
    WeightUnit<kType> w;
    w.load(row, u);
#pragma unroll
    for (int q = 0; q < w.kElements / 4; ++q) {
      const float4 all = w.weights(q);
      const float values[4] = {all.x, all.y, all.z, all.w};
      for (int j = 0; j < 4; ++j) {
        const int col = u * w.kElements + 4 * q + j;
        if (col < table.cols) x[col] = is_known ? values[j] : __uint_as_float(0x7fc00000u);
      }
    }
  }
}

// Computes  n (T x dim) = x / sqrt(mean(x^2) + eps) * w   (Zhang and Sennrich, 1910.07467)
// Grid      T
// Block     kThreads; threads take columns in turns
// Shared    that of block_sum
// Bytes     reads x twice, and w; writes n
__global__ void rms_norm(float* n, const float* x, const float* w, float eps, int dim) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t row = static_cast<std::int64_t>(blockIdx.x) * dim;
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads)
    squares += x[row + i] * x[row + i];
  const float scale = 1 / sqrtf(block_sum(squares) / static_cast<float>(dim) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < dim; i += kThreads)
    n[row + i] = x[row + i] * scale * w[i];
}

// Computes  RoPE on every head of q and k (T x 2 of their pairs), in place; half = head_dim / 2
// Grid      T x {q, k}
// Block     kThreads; threads take pairs in turns, with kLoads turns on their way
// Shared    none
// Bytes     reads and writes q and k
__global__ void rope_rows(float* q, float* k, const std::int32_t* positions,
                          const float* inverse_frequencies, int q_pairs, int k_pairs, int half,
                          bool interleaved) {
  constexpr int kLoads = 4;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int n_pairs = blockIdx.y == 0 ? q_pairs : k_pairs, position = positions[blockIdx.x];
  float* x = (blockIdx.y == 0 ? q : k) + static_cast<std::int64_t>(blockIdx.x) * 2 * n_pairs;
  const int step = interleaved ? 1 : half;
  const auto first_of = [&](int p) { return interleaved ? 2 * p : p / half * 2 * half + p % half; };
  for (int begin = static_cast<int>(threadIdx.x); begin < n_pairs; begin += kLoads * kThreads) {
    float a[kLoads] = {}, b[kLoads] = {};
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int p = begin + j * kThreads;
      if (p < n_pairs) a[j] = x[first_of(p)], b[j] = x[first_of(p) + step];
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      const int p = begin + j * kThreads;
      if (p >= n_pairs) continue;
      rotate(&a[j], &b[j], position, inverse_frequencies[p % half]);
      x[first_of(p)] = a[j], x[first_of(p) + step] = b[j];
    }
  }
}

// Computes  h (n) = silu(h) * up
// Grid      n / kThreads, rounded up
// Block     kThreads; an element each
// Shared    none
// Bytes     reads h and up, writes h
__global__ void swiglu(float* h, const float* up, std::int64_t n) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) h[i] = silu(h[i]) * up[i];
}

// Later rows of activations and outputs of an op.
Project advanced(Project op, std::int64_t n_rows) {
  op.y += n_rows * op.w.rows;
  return op;
}
SwiGlu advanced(SwiGlu op, std::int64_t n_rows) {
  op.h += n_rows * op.gate.rows;
  return op;
}
QkvRope advanced(QkvRope op, std::int64_t n_rows) {
  op.q += n_rows * op.wq.rows, op.k += n_rows * op.wk.rows, op.v += n_rows * op.wv.rows;
  op.positions += n_rows;
  return op;
}

class CudaOps final : public Ops {
 public:
  CudaOps(const Config& config, const DeviceWeights& weights, const Stream& stream)
      : config_(config),
        weights_(weights),
        stream_(stream),
        gemm_(stream),
        n_multiprocessors_(device_facts().n_multiprocessors),
        max_shared_(device_facts().max_shared_bytes) {
    const std::vector<float> frequencies = rope_inverse_frequencies(config);
    inverse_frequencies_ = DeviceBuffer<float>(frequencies.size(), "RoPE frequencies");
    copy_to_device(inverse_frequencies_.data(), frequencies.data(), frequencies.size(), stream);
  }

  void embed(float* x, std::span<const std::int32_t> tokens, const Weights& weights) override {
    const DeviceMatrix& table = weights_.matrix(weights.embedding);
    if (tokens.empty()) return;
    with_type(table.type, [&](auto type) {
      launch_overlapping("embed", embed_rows<decltype(type)::value>,
                         static_cast<unsigned>(tokens.size()), kThreads, 0, stream_, x,
                         tokens.data(), table);
    });
    report("embed", -1, x, static_cast<std::int64_t>(tokens.size()), table.cols);
  }

  void qkv(float* q, float* k, float* v, const float* x, const LayerWeights& w,
           std::span<const std::int32_t> positions) override {
    const auto n_rows = static_cast<std::int64_t>(positions.size());
    report_norm("attn_norm", w.index, x, w.attn_norm, n_rows);
    const DeviceMatrix all[] = {weights_.matrix(w.wq), weights_.matrix(w.wk),
                                weights_.matrix(w.wv)};
    if (n_rows > kMaxGemvRows) {
      normalize(x, w.attn_norm, n_rows);
      float* outputs[] = {q, k, v};
      for (int i = 0; i < 3; ++i) gemm_.multiply("qkv", outputs[i], all[i], false);
      rope(q, k, positions);
      return report_qkv(q, k, v, w.index, n_rows);
    }
    for (int i = 0; i < 3; ++i) {  // a kernel for each format, without the matrices of others
      const auto is_same = [&](const DeviceMatrix& m) { return m.type == all[i].type; };
      if (std::any_of(all, all + i, is_same)) continue;
      QkvRope op{all[0],
                 all[1],
                 all[2],
                 q,
                 k,
                 v,
                 positions.data(),
                 inverse_frequencies_.data(),
                 config_.head_dim / 2,
                 config_.rope_pairing == RopePairing::kInterleaved};
      for (DeviceMatrix* matrix : {&op.wq, &op.wk, &op.wv})
        if (!is_same(*matrix)) matrix->rows = 0;
      multiply("qkv", op, all[i].type, x, weights_.norm(w.attn_norm), n_rows, config_.dim);
    }
    report_qkv(q, k, v, w.index, n_rows);
  }

  void project_add(float* x, const float* h, const Tensor& w, std::int64_t n_rows) override {
    const DeviceMatrix& matrix = weights_.matrix(w);
    if (n_rows > kMaxGemvRows) {
      gemm_.set_activations(h, nullptr, 0, static_cast<int>(n_rows), matrix.cols);
      return gemm_.multiply("project_add", x, matrix, true);
    }
    multiply("project_add", Project{matrix, x, Store::kAdd}, matrix.type, h, nullptr, n_rows,
             matrix.cols);
  }

  void gate_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) override {
    report_norm("ffn_norm", w.index, x, w.ffn_norm, n_rows);
    const DeviceMatrix &gate = weights_.matrix(w.w_gate), &up = weights_.matrix(w.w_up);
    const float* norm = weights_.norm(w.ffn_norm);
    if (n_rows > kMaxGemvRows) {
      multiply_gate_and_up(h, x, w, n_rows);
      const std::int64_t n = n_rows * config_.ffn_dim;
      launch_overlapping("swiglu", swiglu, static_cast<unsigned>((n + kThreads - 1) / kThreads),
                         kThreads, 0, stream_, h, up_.data(), n);
    } else if (gate.type == up.type) {
      multiply("gate_up", SwiGlu{gate, up, h}, gate.type, x, norm, n_rows, config_.dim);
    } else {
      multiply("up", Project{up, h, Store::kSet}, up.type, x, norm, n_rows, config_.dim);
      multiply("gate", Project{gate, h, Store::kGate}, gate.type, x, norm, n_rows, config_.dim);
    }
    report("ffn_hidden", w.index, h, n_rows, config_.ffn_dim);
  }

  // Of many rows, h is packed for the product with Wdown as it is computed.
  void feed_forward(float* x, float* h, const LayerWeights& w, std::int64_t n_rows) override {
    if (n_rows <= kMaxGemvRows || observed()) return Ops::feed_forward(x, h, w, n_rows);
    multiply_gate_and_up(h, x, w, n_rows);
    gemm_.set_gated(h, up_.data(), static_cast<int>(n_rows), config_.ffn_dim);
    gemm_.multiply("project_add", x, weights_.matrix(w.w_down), true);
  }

  void logits(float* logits, const float* x, const Weights& weights, std::int64_t n_rows) override {
    report_norm("final_norm", -1, x, weights.final_norm, n_rows);
    const DeviceMatrix& matrix = weights_.matrix(weights.output);
    if (n_rows > kMaxGemvRows) {
      normalize(x, weights.final_norm, n_rows);
      gemm_.multiply("logits", logits, matrix, false);
    } else {
      multiply("logits", Project{matrix, logits, Store::kSet}, matrix.type, x,
               weights_.norm(weights.final_norm), n_rows, config_.dim);
    }
    report("logits", -1, logits, n_rows, config_.vocab_size);
  }

  void report(std::string_view name, int layer, const float* data, std::int64_t rows,
              std::int64_t cols) const override {
    if (!observed()) return;
    std::vector<float> host(static_cast<std::size_t>(rows * cols));
    copy_to_host(host.data(), data, host.size(), stream_);
    Ops::report(name, layer, host.data(), rows, cols);
  }

 private:
  // No op needs the normalised rows on their own; an observer does.
  void report_norm(std::string_view name, int layer, const float* x, const std::vector<float>& norm,
                   std::int64_t n_rows) const {
    if (!observed() || n_rows == 0) return;
    const DeviceBuffer<float> n(static_cast<std::size_t>(n_rows * config_.dim), "norm");
    launch_overlapping("rms_norm", rms_norm, static_cast<unsigned>(n_rows), kThreads, 0, stream_,
                       n.data(), x, weights_.norm(norm), config_.norm_eps, config_.dim);
    report(name, layer, n.data(), n_rows, config_.dim);
  }

  void report_qkv(const float* q, const float* k, const float* v, int layer,
                  std::int64_t n_rows) const {
    report("q", layer, q, n_rows, config_.q_dim());
    report("k", layer, k, n_rows, config_.kv_dim());
    report("v", layer, v, n_rows, config_.kv_dim());
  }

  void normalize(const float* x, const std::vector<float>& norm, std::int64_t n_rows) {
    gemm_.set_activations(x, weights_.norm(norm), config_.norm_eps, static_cast<int>(n_rows),
                          config_.dim);
  }

  // Both products alone: of gate in h, of up in up_.
  void multiply_gate_and_up(float* h, const float* x, const LayerWeights& w, std::int64_t n_rows) {
    const auto n = static_cast<std::size_t>(n_rows * config_.ffn_dim);
    if (up_.size() < n) up_ = {}, up_ = DeviceBuffer<float>(n, "up");
    normalize(x, w.ffn_norm, n_rows);
    gemm_.multiply("gate_up", h, weights_.matrix(w.w_gate), false);
    gemm_.multiply("gate_up", up_.data(), weights_.matrix(w.w_up), false);
  }

  void rope(float* q, float* k, std::span<const std::int32_t> positions) const {
    launch_overlapping("rope", rope_rows, dim3(static_cast<unsigned>(positions.size()), 2),
                       kThreads, 0, stream_, q, k, positions.data(), inverse_frequencies_.data(),
                       config_.q_dim() / 2, config_.kv_dim() / 2, config_.head_dim / 2,
                       config_.rope_pairing == RopePairing::kInterleaved);
  }

  // op's products with x (n_rows x cols), normalised if norm is not null.
  template <class Op>
  void multiply(const char* name, const Op& op, DType type, const float* x, const float* norm,
                std::int64_t n_rows, int cols) const {
    with_type(type, [&](auto known) {
      constexpr DType kType = decltype(known)::value;
      for (std::int64_t t = 0; t < n_rows;) {
        const int n = static_cast<int>(std::min<std::int64_t>(4, n_rows - t));
        const GemvInput in{x + t * cols, norm, config_.norm_eps, n, cols, 0};
        n == 1 ? launch_gemv<kType, 1>(name, advanced(op, t), in)
               : launch_gemv<kType, 4>(name, advanced(op, t), in);
        t += n;
      }
    });
  }

  template <DType kType, int kT, class Op>
  void launch_gemv(const char* name, const Op& op, GemvInput in) const {
    constexpr int kSpan = WeightStep<kType>::kElements;
    const std::size_t room = std::min(kGemvStaged, max_shared_ - kGemvRing<kType>);
    const auto n_spans = static_cast<int>(room / (kT * Staged<kType>::bytes(kSpan)));
    in.chunk = std::min(n_spans, (in.cols + kSpan - 1) / kSpan) * kSpan;
    // Every warp the same number of pairs, as far as possible.
    const int max_warps = n_multiprocessors_ * kGemvBlocks * kGemvWarps;
    const int n_turns = (op.n_pairs() + max_warps - 1) / max_warps;
    const int n_warps = (op.n_pairs() + n_turns - 1) / n_turns;
    launch_overlapping(name, gemv<kType, kT, Op>,
                       static_cast<unsigned>((n_warps + kGemvWarps - 1) / kGemvWarps), kGemvThreads,
                       kT * Staged<kType>::bytes(in.chunk) + kGemvRing<kType>, stream_, op, in);
  }

  const Config& config_;
  const DeviceWeights& weights_;
  const Stream& stream_;
  Gemm gemm_;
  const int n_multiprocessors_;
  const std::size_t max_shared_;
  DeviceBuffer<float> inverse_frequencies_;
  DeviceBuffer<float> up_;  // of many rows
};

}  // namespace

std::unique_ptr<Ops> make_cuda_ops(const Config& config, const DeviceWeights& weights,
                                   const Stream& stream) {
  return std::make_unique<CudaOps>(config, weights, stream);
}

}  // namespace thaw
