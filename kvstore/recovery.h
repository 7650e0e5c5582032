// The alarm that a model misses what was frozen, and the ladder of answers to it. ASR-KF-EGR
// (2512.11221) names the rungs and leaves them as future work; what each thaws is the store's
// (KvStore::reset). Pure numbers: what is observed goes in, a rung comes out.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "kvstore/policy.h"

namespace thaw {

// Mean and variance of the recent past, exponentially weighted (Finch, Incremental calculation of
// weighted mean and variance, 2009, section 9). With d = x - mean and a = max(1/64, 1/n):
//   mean += a d,  variance = (1 - a) (variance + a d^2)
// so the first 64 values weigh the same, and later ones forget the past over about 64 values.
class RollingStatistics {
 public:
  void add(float x);
  float mean() const { return mean_; }
  float sd() const;
  int count() const { return count_; }  // stops at 64

 private:
  float mean_ = 0, variance_ = 0;
  int count_ = 0;
};

// What a rung does to a store for a while. Decode steps are counted; a milder rung does not shorten
// the help of a stronger one.
struct Relief {
  int exact_steps = 0;  // that still attend every token, exactly
  int alarm_steps = 0;  // with a lower epsilon

  // steps: for how many the strongest rungs help. kNone ends all help.
  void begin(Rung rung, const PolicyParams& params, int steps);
  void step();  // one is over
  float epsilon(const PolicyParams& params) const {
    return params.epsilon * (alarm_steps > 0 ? kAlarmEpsilon : 1.0f);
  }
};

struct RecoveryParams {
  Rung highest = Rung::kNone;  // kNone: nothing is ever done
  float z = 2;                 // a spike: value > mean + z max(sd, 0.01)
  int warmup = 16;             // values seen before the first alarm
  int cooldown = 16;           // positions from a firing to the next
  int calm = 64;               // positions without a firing that lead one rung down
  int rewalk_tokens = 8;       // generated again by a rewalk
};

// One text's alarm. It starts at the soft rung; each firing arms the next rung, up to the highest
// allowed, and every `calm` positions without one arm the rung before.
class Recovery {
 public:
  enum class Signal : std::uint8_t { kEntropy, kGhostMass };
  struct Firing {
    int position;  // tokens in the context when it fired
    Rung rung;
    Signal signal;
    float value, mean, sd;  // of the signal, and what it was compared with
  };

  explicit Recovery(const RecoveryParams& params) : params_(params) {}

  // After each decode step: the context's length, the entropy of the next token's distribution in
  // nats, and the attention mass on frozen tokens, of a step that had some: others, which are
  // exact, say nothing of it. Returns the rung to climb now, mostly kNone. Positions may go back
  // after a rewalk; the cooldown keeps it from firing again at the same place. Where no rewalk is
  // possible, can_rewalk is false and a full reset takes its place.
  Rung observe(int position, float entropy, std::optional<float> ghost_mass, bool can_rewalk);

  bool on() const { return params_.highest != Rung::kNone; }
  const RecoveryParams& params() const { return params_; }
  const std::vector<Firing>& firings() const { return firings_; }
  int count(Rung rung) const;  // how often it fired

 private:
  Rung armed(int position);

  RecoveryParams params_;
  RollingStatistics entropy_, ghost_mass_;
  std::vector<Firing> firings_;
  int level_ = 1;         // the armed rung
  int quiet_since_ = 0;   // position of the last firing or of the last rung down
  int silent_until_ = 0;  // no firing before this position
};

// Entropy of softmax(logits), in nats: ln sum e^(x - m) - sum p (x - m), with m the largest.
float softmax_entropy(std::span<const float> logits);

}  // namespace thaw
