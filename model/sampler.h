// From logits to a token.
//
// Order, always the same: repetition, presence and frequency penalties on the logits; then, when
// temperature is 0, the largest logit (lowest id on a tie); else temperature, top-k, top-p, min-p,
// and one draw from what is left. Each step's formula is at its field; each works on the softmax of
// what the step before it left.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <vector>

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

class Sampler {
 public:
  explicit Sampler(
      const SamplerOptions& options);  // throws UsageError when a field is out of range

  // Chooses a token; does not record it. A logit of -infinity is never chosen. Throws Error when a
  // logit is NaN or +infinity, or when none is finite.
  //
  // The draw: u = (next output of std::mt19937_64 >> 11) * 2^-53, and the first candidate at which
  // the running sum of probabilities exceeds u. The same seed gives the same tokens with every
  // standard library. A greedy choice draws nothing.
  std::int32_t sample(std::span<const float> logits);
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
  const std::int32_t* just_outside_window() const;
  float penalized(float logit, std::size_t token) const;
  void keep_most_probable(std::span<const float> logits, std::size_t k);
  void keep_top_p();
  void filter(std::span<const float> logits);

  SamplerOptions options_;
  std::mt19937_64 rng_;
  std::vector<std::int32_t> accepted_;  // every token, oldest first
  std::vector<std::int32_t> count_;     // of each token, how often it is seen
  std::vector<Candidate> candidates_;   // reused from call to call
};

}  // namespace thaw
