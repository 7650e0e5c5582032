#include "kvstore/recovery.h"

#include <algorithm>
#include <cmath>

#include "device/fast_math.h"

namespace thaw {
namespace {

constexpr int kMemory = 64;
constexpr float kLeastSd = 0.01f;  // keeps the noise of a constant signal from being a spike

}  // namespace

void RollingStatistics::add(float x) {
  count_ = std::min(count_ + 1, kMemory);
  const float a = 1.0f / static_cast<float>(count_);
  const float d = x - mean_;
  mean_ += a * d;
  variance_ = (1 - a) * (variance_ + a * d * d);
}

float RollingStatistics::sd() const { return std::sqrt(variance_); }

void Relief::begin(Rung rung, const PolicyParams& params, int steps) {
  if (rung == Rung::kNone) *this = {};
  const bool timed = params.policy == Policy::kThaw || params.policy == Policy::kAsr;
  if (rung == Rung::kSoft && params.policy == Policy::kThaw) alarm_steps = kAlarmSteps;
  if (rung >= Rung::kFull)
    exact_steps = std::max(exact_steps, steps);
  else if (rung != Rung::kNone && !timed)
    exact_steps = std::max(exact_steps, rung == Rung::kSoft ? 1 : 4);
}

void Relief::step() {
  exact_steps = std::max(0, exact_steps - 1);
  alarm_steps = std::max(0, alarm_steps - 1);
}

// Leads down the ladder for the calm since the last firing.
Rung Recovery::armed(int position) {
  for (; position - quiet_since_ >= params_.calm && level_ > 1; --level_)
    quiet_since_ += params_.calm;
  return static_cast<Rung>(std::min(level_, static_cast<int>(params_.highest)));
}

Rung Recovery::observe(int position, float entropy, std::optional<float> ghost_mass,
                       bool can_rewalk) {
  if (!on()) return Rung::kNone;
  const auto spikes = [&](const RollingStatistics& statistics, float value) {
    return statistics.count() >= params_.warmup &&
           value > statistics.mean() + params_.z * std::max(statistics.sd(), kLeastSd);
  };
  Rung rung = armed(position);
  const bool by_mass = ghost_mass && spikes(ghost_mass_, *ghost_mass);
  const bool fires = position >= silent_until_ && (by_mass || spikes(entropy_, entropy));
  if (fires) {
    if (rung == Rung::kRewalk && !can_rewalk) rung = Rung::kFull;
    const RollingStatistics& statistics = by_mass ? ghost_mass_ : entropy_;
    firings_.push_back({position, rung, by_mass ? Signal::kGhostMass : Signal::kEntropy,
                        by_mass ? *ghost_mass : entropy, statistics.mean(), statistics.sd()});
    level_ = std::min(level_ + 1, static_cast<int>(params_.highest));
    quiet_since_ = position;
    silent_until_ = position + params_.cooldown;
  }
  entropy_.add(entropy);
  if (ghost_mass) ghost_mass_.add(*ghost_mass);
  return fires ? rung : Rung::kNone;
}

int Recovery::count(Rung rung) const {
  return static_cast<int>(std::count_if(firings_.begin(), firings_.end(),
                                        [rung](const Firing& f) { return f.rung == rung; }));
}

float softmax_entropy(std::span<const float> logits) {
  const float largest = *std::max_element(logits.begin(), logits.end());
  float sum = 0, weighted = 0;
#pragma omp simd reduction(+ : sum, weighted)
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float x = logits[i] - largest;
    const float e = exp_fast(x);
    sum += e;
    weighted += e > 0 ? e * x : 0;  // x may be -infinity
  }
  return std::log(sum) - weighted / sum;
}

}  // namespace thaw
