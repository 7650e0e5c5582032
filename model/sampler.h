// From logits to a token.
//
// Order, always the same: repetition, presence and frequency penalties on the logits; then, when
// temperature is 0, the largest logit (lowest id on a tie); else temperature, top-k, top-p, min-p,
// and one draw from what is left. Each step's formula is at its field; each works on the softmax of
// what the step before it left.
#pragma once

#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <vector>

#include "device/host_device.h"

namespace thaw {

struct SamplerOptions {
  float temperature = 0.8f;     // >= 0; logits are divided by it; 0 is greedy
  int top_k = 40;               // >= 0; keep the k most probable; 0 keeps all
  float top_p = 0.95f;          // (0, 1]; keep the smallest set of most probable that reaches p
                                // (Holtzman et al., 1904.09751)
  float min_p = 0.05f;          // [0, 1]; keep those with p >= min_p * max p (2407.01082)
  float repeat_penalty = 1.0f;  // > 0; seen tokens: logit > 0 ? logit / r : logit * r (1909.05858)
  float presence_penalty = 0.0f;   // subtracted once from every seen token
  float frequency_penalty = 0.0f;  // subtracted as often as the token was seen
  int penalty_window = 64;         // how many of the last tokens are "seen"; -1: all of them
  std::uint64_t seed = 0;
};

// The logit of a token that the penalties saw `count` times, at least once.
THAW_HOST_DEVICE inline float penalized(float logit, int count, float repeat, float presence,
                                        float frequency) {
  logit = logit > 0 ? logit / repeat : logit * repeat;
  return logit - presence - frequency * static_cast<float>(count);
}

// What a device made of a step's logits in a sampler's place.
struct Prediction {
  std::int32_t token;
  bool drawn;     // by next_draw(); false where there was only one candidate
  float lead;     // as Sampler::lead()
  float entropy;  // nats, of the softmax of all logits, without penalties
};

class Sampler {
 public:
  explicit Sampler(
      const SamplerOptions& options);  // throws UsageError when a field is out of range

  // Chooses a token; does not record it. A logit of -infinity is never chosen. Throws Error when a
  // logit is NaN or +infinity, or when none is finite.
  //
  // The draw: u = (next output of std::mt19937_64 >> 11) * 2^-53, and the first candidate, the most
  // probable ones first, at which the running sum of probabilities exceeds u. The same seed gives
  // the same tokens with every standard library. A choice of one draws nothing.
  std::int32_t sample(std::span<const float> logits);

  // For who samples in its place: the u of the next draw, and what the penalties have seen; take()
  // has it drawn, and returns the token.
  double next_draw();
  struct Seen {
    std::int32_t token, count;
  };
  std::vector<Seen> seen() const;  // each token once; empty when there are no penalties
  std::int32_t take(const Prediction& prediction);

  // Records a token (of the prompt or the output) as seen by the penalties.
  void accept(std::int32_t token);
  // Takes back the last n accepted. Draws that were made stay made: the next one is a new one.
  void forget(std::size_t n);

  struct Candidate {
    std::int32_t token;
    float logit;  // with penalties
    double p;
  };
  // The candidates that survive every filter, with their final probabilities (sum 1), most probable
  // first, lowest id first on a tie: what sample() draws from. Valid until the next call.
  std::span<const Candidate> distribution(std::span<const float> logits);

  // How far the most probable token leads the next one, in nats, penalties included: what a greedy
  // choice hangs on. Infinity where sampling is not greedy, or only one logit is finite.
  float lead(std::span<const float> logits) const;

  const SamplerOptions& options() const { return options_; }

 private:
  bool has_penalties() const;
  std::span<const std::int32_t> window() const;
  const std::int32_t* just_outside_window() const;
  float logit_of(std::span<const float> logits, std::size_t token) const;
  void keep_most_probable(std::span<const float> logits, std::size_t k);
  void keep_top_p();
  void filter(std::span<const float> logits);

  SamplerOptions options_;
  std::mt19937_64 rng_;
  std::optional<double> draw_;          // the next one, once somebody has asked
  std::vector<std::int32_t> accepted_;  // every token, oldest first
  std::vector<std::int32_t> count_;     // of each token, how often it is seen
  std::vector<Candidate> candidates_;   // reused from call to call
};

}  // namespace thaw
