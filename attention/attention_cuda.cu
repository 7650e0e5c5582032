#include <algorithm>
#include <cmath>
#include <vector>

#include "attention/attention_cuda.h"
#include "attention/decode_cuda.cuh"
#include "attention/prefill_cuda.cuh"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kDecodeRows = 8;               // more go through tensor cores
constexpr int kMaxDim = 256;                 // of decode_attention
constexpr int kMaxTileDim = 128;             // of prefill_attention
constexpr int kBlocksPerMultiprocessor = 3;  // that decode aims at
constexpr int kMaxSplits = 128;

class CudaAttention final : public Attention {
 public:
  explicit CudaAttention(const Stream& stream)
      : stream_(stream), n_multiprocessors_(device_facts().n_multiprocessors) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats& stats, int stats_rows) override {
    require(n_rows >= 1 && n_rows <= kv.kv_len, "attend: rows: expected 1 to kv_len = ", kv.kv_len,
            ", found ", n_rows);
    require(kv.n_kv_heads > 0 && n_heads % kv.n_kv_heads == 0,
            "attend: n_heads: expected a multiple of ", kv.n_kv_heads, ", found ", n_heads);
    require(kv.head_dim % kRowUnit == 0 && kv.head_dim <= kMaxDim,
            "attend: head_dim: expected a multiple of ", kRowUnit, " up to ", kMaxDim,
            " on the GPU, found ", kv.head_dim);
    require(kv.device != nullptr && kv.lanes.empty() && stats_rows == 0,
            "attend: expected a store in device memory under --policy full");
    require(kv.device->rows.page_rows % kTileTokens == 0, "attend: page_rows: expected a multiple ",
            "of ", kTileTokens, ", found ", kv.device->rows.page_rows);
    stats.n_rows = 0;
    stats.lanes.clear();
    const ExactProblem p{
        o,           q,
        *kv.device,  n_rows,
        n_heads,     n_heads / kv.n_kv_heads,
        kv.head_dim, static_cast<float>(1.4426950408889634 / std::sqrt(double(kv.head_dim)))};
    if (n_rows <= kDecodeRows || kv.head_dim > kMaxTileDim || kv.type == KvType::kF32)
      return decode(p, kv);
    with_kv_type(kv.type, [&](auto type) {
      if constexpr (decltype(type)::value != KvType::kF32) prefill<decltype(type)::value>(p, kv);
    });
  }

 private:
  void decode(const ExactProblem& p, const KvView& kv) {
    with_kv_type(kv.type, [&](auto type) {
      constexpr KvType kType = decltype(type)::value;
      const int n_lanes = kv.head_dim <= 64 ? 8 : kv.head_dim <= 128 ? 16 : 32;
      if (n_lanes == 8) decode_with<kType, 8>(p, kv);
      if (n_lanes == 16) decode_with<kType, 16>(p, kv);
      if (n_lanes == 32) decode_with<kType, 32>(p, kv);
    });
  }

  template <KvType kType, int kLanes>
  void decode_with(const ExactProblem& p, const KvView& kv) {
    if (p.n_queries() == 1) return launch_decode<kType, kLanes, 1>(p, kv);
    if (p.n_queries() <= 4) return launch_decode<kType, kLanes, 4>(p, kv);
    launch_decode<kType, kLanes, 8>(p, kv);
  }

  template <KvType kType, int kLanes, int kQ>
  void launch_decode(const ExactProblem& p, const KvView& kv) {
    const int n_chunks = (p.n_queries() + kQ - 1) / kQ;
    const int n_blocks = kBlocksPerMultiprocessor * n_multiprocessors_;
    const int n_splits = std::clamp(n_blocks / (kv.n_kv_heads * n_chunks), 1, kMaxSplits);
    reserve(std::int64_t{n_splits} * p.n_rows * p.n_heads * (kv.head_dim + 2),
            std::int64_t{n_chunks} * kv.n_kv_heads);
    launch_overlapping("attend", decode_attention<kType, kLanes, kQ>,
                       dim3(static_cast<unsigned>(n_splits), static_cast<unsigned>(kv.n_kv_heads),
                            static_cast<unsigned>(n_chunks)),
                       kDecodeThreads, kDecodeShared<kLanes, kQ>, stream_,
                       DecodeProblem{p, parts_.data(), n_arrived_.data()});
  }

  // What is outgrown stays: graphs may refer to it.
  void reserve(std::int64_t n_parts, std::int64_t n_counts) {
    if (parts_.size() < static_cast<std::size_t>(n_parts)) {
      outgrown_parts_.push_back(std::move(parts_));
      parts_ = DeviceBuffer<float>(static_cast<std::size_t>(n_parts), "attention");
    }
    if (n_arrived_.size() >= static_cast<std::size_t>(n_counts)) return;
    outgrown_counts_.push_back(std::move(n_arrived_));
    n_arrived_ = DeviceBuffer<unsigned>(static_cast<std::size_t>(n_counts), "attention");
    fill_device(n_arrived_.data(), 0, n_arrived_.bytes(), stream_);
  }

  template <KvType kType>
  void prefill(const ExactProblem& p, const KvView& kv) {
    if (kv.head_dim <= 64) return launch_prefill<kType, 64>(p, kv);
    if (kv.head_dim <= 80) return launch_prefill<kType, 80>(p, kv);
    if (kv.head_dim <= 96) return launch_prefill<kType, 96>(p, kv);
    launch_prefill<kType, 128>(p, kv);
  }

  template <KvType kType, int kDim>
  void launch_prefill(const ExactProblem& p, const KvView& kv) {
    const auto n_tiles = static_cast<unsigned>((p.n_queries() + kTileQueries - 1) / kTileQueries);
    launch_overlapping("attend", prefill_attention<kType, kDim>,
                       dim3(n_tiles, static_cast<unsigned>(kv.n_kv_heads)), kPrefillThreads,
                       kPrefillShared<kDim>, stream_, p);
  }

  const Stream& stream_;
  const int n_multiprocessors_;
  DeviceBuffer<float> parts_;
  DeviceBuffer<unsigned> n_arrived_;
  std::vector<DeviceBuffer<float>> outgrown_parts_;
  std::vector<DeviceBuffer<unsigned>> outgrown_counts_;
};

}  // namespace

std::unique_ptr<Attention> make_cuda_attention(const Stream& stream) {
  return std::make_unique<CudaAttention>(stream);
}

}  // namespace thaw
