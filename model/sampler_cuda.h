// Samples from logits where they are, on the device, as Sampler does on the host.
#pragma once

#include <cstdint>
#include <optional>

#include "device/cuda.h"
#include "model/sampler.h"

namespace thaw {

// What the kernels say of one draw.
struct DeviceChoice {
  enum Outcome : std::int32_t { kChosen, kNotFinite, kTooClose };
  Outcome outcome;
  std::int32_t token;
  std::int32_t drawn;  // 0 or 1
  float lead, entropy;
};

class CudaSampler {
 public:
  explicit CudaSampler(const Stream& stream);

  // The choice of sampler.sample() among the first n_vocab of n logits in device memory, which
  // sampler.take() must be told of. Probabilities are multiples of 2^-40 of the largest one, so a
  // token below that is never drawn. None where a logit is not finite, or where more than 1,024
  // tokens are so close to a border (of top-k, top-p, or the draw) that it runs between them: the
  // host's sampler has the answer then. Waits for the stream.
  std::optional<Prediction> draw(const float* logits, int n, int n_vocab, Sampler& sampler);

 private:
  const float* with_penalties(const float* logits, int n_vocab, const Sampler& sampler);

  const Stream& stream_;
  DeviceBuffer<std::byte> room_;
  PinnedBuffer<DeviceChoice> choice_;
  DeviceBuffer<float> penalized_;
  DeviceBuffer<Sampler::Seen> seen_;
  PinnedBuffer<Sampler::Seen> host_seen_;
  DeviceBuffer<std::byte> slices_;
};

}  // namespace thaw
