#include <algorithm>

#include "attention/attention_cuda.h"
#include "attention/decode_tiles_cuda.cuh"
#include "attention/growing_buffer_cuda.h"
#include "attention/prefill_cuda.cuh"
#include "attention/stats_cuda.h"
#include "attention/tiered_cuda.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kDecodeRows = 8;             // more go through tensor cores
constexpr int kMaxDim = kWarp * kRowUnit;  // of decode_attention: a warp has a head
constexpr int kMaxTileDim = 128;           // of prefill_attention

class CudaAttention final : public Attention {
 public:
  explicit CudaAttention(const Stream& stream)
      : stream_(stream),
        n_multiprocessors_(device_facts().n_multiprocessors),
        tiered_(stream, n_multiprocessors_),
        prompt_stats_(stream, n_multiprocessors_) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats& stats, int stats_rows) override {
    require(n_rows >= 1 && n_rows <= kv.kv_len, "attend: rows: expected 1 to kv_len = ", kv.kv_len,
            ", found ", n_rows);
    require(kv.n_kv_heads > 0 && n_heads % kv.n_kv_heads == 0,
            "attend: n_heads: expected a multiple of ", kv.n_kv_heads, ", found ", n_heads);
    require(kv.head_dim % kRowUnit == 0 && kv.head_dim <= kMaxDim,
            "attend: head_dim: expected a multiple of ", kRowUnit, " up to ", kMaxDim,
            " on the GPU, found ", kv.head_dim);
    require(stats_rows >= 0 && stats_rows <= n_rows, "attend: stats_rows: expected 0 to ", n_rows,
            ", found ", stats_rows);
    require(kv.device != nullptr, "attend: expected a store in device memory");
    const int page_rows = kv.device->rows.page_rows();
    require(page_rows % kTileTokens == 0, "attend: page_rows: expected a multiple of ", kTileTokens,
            ", found ", page_rows);
    stats.n_rows = stats_rows;
    stats.lanes.clear();
    if (kv.device->hot.n_lanes > 0) {
      require(n_rows == 1, "attend: expected 1 row under a policy, found ", n_rows);
      stats.n_rows = 1;
      return tiered_.attend(o, q, n_heads, kv);
    }
    const int group = n_heads / kv.n_kv_heads;
    const ExactProblem p{o,       q,     *kv.device,  n_rows,
                         n_heads, group, kv.head_dim, score_scale(kv.head_dim)};
    attend_exactly(p, kv);
    if (stats_rows > 0) prompt_stats_.attend(p, kv, stats_rows);
  }

 private:
  void attend_exactly(const ExactProblem& p, const KvView& kv) {
    if (p.n_rows <= kDecodeRows || kv.head_dim > kMaxTileDim || kv.type == KvType::kF32)
      return decode(p, kv);
    with_kv_type(kv.type, [&](auto type) {
      if constexpr (decltype(type)::value != KvType::kF32) prefill<decltype(type)::value>(p, kv);
    });
  }

  void decode(const ExactProblem& p, const KvView& kv) {
    if (kv.type == KvType::kF16 && kv.head_dim <= kMaxTileDim) {
      if (kv.head_dim <= 64) return launch_tiles<64>(p, kv);
      if (kv.head_dim <= 80) return launch_tiles<80>(p, kv);
      if (kv.head_dim <= 96) return launch_tiles<96>(p, kv);
      return launch_tiles<128>(p, kv);
    }
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
    launch_splits(decode_attention<kType, kLanes, kQ>, kQ, kDecodeShared<kLanes, kQ>, p, kv);
  }

  template <int kDim>
  void launch_tiles(const ExactProblem& p, const KvView& kv) {
    launch_splits(decode_tiles<kDim>, kDecodeTileQueries, kDecodeTileShared<kDim>, p, kv);
  }

  // A decode kernel whose blocks take chunk_queries queries.
  void launch_splits(void (*kernel)(DecodeProblem), int chunk_queries, std::size_t shared_bytes,
                     const ExactProblem& p, const KvView& kv) {
    const int n_chunks = (p.n_queries() + chunk_queries - 1) / chunk_queries;
    const int n_blocks = kDecodeBlocks * n_multiprocessors_;
    const int n_splits = std::clamp(n_blocks / (kv.n_kv_heads * n_chunks), 1, kMaxSplits);
    const std::int64_t n_parts = std::int64_t{n_splits} * p.n_rows * p.n_heads;
    float* sums = parts_.reserve(n_parts * (kv.head_dim + 2));
    auto* states = reinterpret_cast<float2*>(sums + n_parts * kv.head_dim);
    unsigned* n_arrived = n_arrived_.reserve_zeros(std::int64_t{n_chunks} * kv.n_kv_heads, stream_);
    launch_overlapping("attend", kernel,
                       dim3(static_cast<unsigned>(n_splits), static_cast<unsigned>(kv.n_kv_heads),
                            static_cast<unsigned>(n_chunks)),
                       kDecodeThreads, shared_bytes, stream_,
                       DecodeProblem{p, sums, states, n_arrived});
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
  GrowingBuffer<float> parts_;
  GrowingBuffer<unsigned> n_arrived_;
  CudaTieredDecode tiered_;
  CudaPromptStats prompt_stats_;
};

}  // namespace

std::unique_ptr<Attention> make_cuda_attention(const Stream& stream) {
  return std::make_unique<CudaAttention>(stream);
}

}  // namespace thaw
