// Who is hot on the device, decided once more on the host, for a recorder that wants to be told of
// every decision: kernels only know what comes out of them. The same statistics lead to the same
// decisions (kvstore/residency_cuda.h), so what the CPU's lanes tell is what the device's did.
#pragma once

#include <memory>
#include <vector>

#include "kvstore/cold_tier_cuda.h"
#include "kvstore/hot_tier_cuda.h"
#include "kvstore/residency.h"

namespace thaw {

class ShadowLanes {
 public:
  // Of a store that holds no token. Keeps references.
  ShadowLanes(const KvShape& shape, const PolicyParams& params, const KvBounds& bounds,
              const CudaColdTier& cold, const CudaHotTier& hot, const StepCounter& steps,
              KvRecorder& recorder, const Stream& stream);

  // Each follows the hot tier's call of that name, when the device is done with what was before.
  void seed(int first);  // where that chose
  void begin_decode(int first);
  void end_exact(int kv_len);
  void end_decode(int kv_len, float epsilon);
  void cut(int position);
  void reset(Rung rung, int kv_len);

 private:
  std::span<Residency> lanes(int layer);
  Moment moment(int layer, int kv_len) const;
  AttentionStats::Lane read_stats(const DeviceStats& from, int lane, int n_rows) const;

  const KvShape& shape_;
  const KvBounds& bounds_;
  const CudaColdTier& cold_;
  const CudaHotTier& hot_;
  const StepCounter& steps_;
  KvRecorder& recorder_;
  const Stream& stream_;
  std::unique_ptr<PageSource> memory_;
  HotArena arena_;
  std::vector<Residency> lanes_;  // layer x lane
};

}  // namespace thaw
