#include "model/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "device/error.h"

namespace thaw {
namespace {

void check(bool holds, const char* field, const char* expected, double found) {
  if (!holds) throw UsageError(join(field, ": expected ", expected, ", found ", found));
}

// The order of candidates: a strict total one, so that ties never depend on an algorithm's whims.
bool more_probable(const Sampler::Candidate& a, const Sampler::Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}
bool less_probable(const Sampler::Candidate& a, const Sampler::Candidate& b) {
  return more_probable(b, a);
}

}  // namespace

Sampler::Sampler(const SamplerOptions& options) : options_(options), rng_(options.seed) {
  const SamplerOptions& o = options_;
  check(o.temperature >= 0 && std::isfinite(o.temperature), "temperature", "a number >= 0",
        o.temperature);
  check(o.top_k >= 0, "top_k", "a number >= 0", o.top_k);
  check(o.top_p > 0 && o.top_p <= 1, "top_p", "a number above 0, at most 1", o.top_p);
  check(o.min_p >= 0 && o.min_p <= 1, "min_p", "a number from 0 to 1", o.min_p);
  check(o.repeat_penalty > 0 && std::isfinite(o.repeat_penalty), "repeat_penalty", "a number > 0",
        o.repeat_penalty);
  check(std::isfinite(o.presence_penalty), "presence_penalty", "a number", o.presence_penalty);
  check(std::isfinite(o.frequency_penalty), "frequency_penalty", "a number", o.frequency_penalty);
  check(o.penalty_window >= -1, "penalty_window", "a number >= -1", o.penalty_window);
}

bool Sampler::has_penalties() const {
  const SamplerOptions& o = options_;
  return o.penalty_window != 0 &&
         (o.repeat_penalty != 1 || o.presence_penalty != 0 || o.frequency_penalty != 0);
}

void Sampler::accept(std::int32_t token) {
  require(token >= 0, "sampler: expected a token >= 0, found ", token);
  if (!has_penalties()) return;
  if (static_cast<std::size_t>(token) >= count_.size()) count_.resize(token + std::size_t{1});
  ++count_[token];
  accepted_.push_back(token);
  if (const std::int32_t* left = just_outside_window()) --count_[*left];
}

void Sampler::forget(std::size_t n) {
  for (n = std::min(n, accepted_.size()); n > 0; --n) {
    if (const std::int32_t* left = just_outside_window()) ++count_[*left];
    --count_[accepted_.back()];
    accepted_.pop_back();
  }
}

// The accepted tokens that the penalties look at.
std::span<const std::int32_t> Sampler::window() const {
  const std::size_t n = options_.penalty_window < 0 ? SIZE_MAX : options_.penalty_window;
  return std::span(accepted_).last(std::min(n, accepted_.size()));
}

// The newest accepted token that is not in the window any more, if there is one.
const std::int32_t* Sampler::just_outside_window() const {
  const std::size_t outside = accepted_.size() - window().size();
  return outside > 0 ? &accepted_[outside - 1] : nullptr;
}

std::vector<Sampler::Seen> Sampler::seen() const {
  std::vector<Seen> seen;
  for (const std::int32_t token : window()) seen.push_back({token, count_[token]});
  const auto by_token = [](Seen a, Seen b) { return a.token < b.token; };
  std::sort(seen.begin(), seen.end(), by_token);
  const auto same = [](Seen a, Seen b) { return a.token == b.token; };
  seen.erase(std::unique(seen.begin(), seen.end(), same), seen.end());
  return seen;
}

// With penalties.
float Sampler::logit_of(std::span<const float> logits, std::size_t token) const {
  const int count = token < count_.size() ? count_[token] : 0;
  const SamplerOptions& o = options_;
  return count == 0 ? logits[token]
                    : penalized(logits[token], count, o.repeat_penalty, o.presence_penalty,
                                o.frequency_penalty);
}

// candidates_ = the k most probable of the finite logits, most probable first; all of them, in
// order of id, when there are no more than k. A heap whose top is the least probable one kept: most
// logits cost one comparison.
void Sampler::keep_most_probable(std::span<const float> logits, std::size_t k) {
  candidates_.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float logit = logit_of(logits, i);
    const bool full = candidates_.size() == k;
    if (full && logit <= candidates_.front().logit) continue;
    if (logit == -std::numeric_limits<float>::infinity()) continue;
    require(std::isfinite(logit), "logits: token ", i, ": expected a finite number, found ", logit);
    if (full) {
      std::pop_heap(candidates_.begin(), candidates_.end(), more_probable);
      candidates_.back() = {static_cast<std::int32_t>(i), logit, 0};
      std::push_heap(candidates_.begin(), candidates_.end(), more_probable);
      continue;
    }
    candidates_.push_back({static_cast<std::int32_t>(i), logit, 0});
    if (candidates_.size() == k)
      std::make_heap(candidates_.begin(), candidates_.end(), more_probable);
  }
  require(!candidates_.empty(), "logits: expected at least one finite number, found none");
  if (candidates_.size() == k)
    std::sort_heap(candidates_.begin(), candidates_.end(), more_probable);
}

// Keeps, most probable first, the smallest set of most probable candidates whose sum of p reaches
// top_p. Only as many as are kept come off the heap.
void Sampler::keep_top_p() {
  std::make_heap(candidates_.begin(), candidates_.end(), less_probable);
  auto end = candidates_.end();
  for (double sum = 0; end != candidates_.begin() && sum < options_.top_p;) {
    std::pop_heap(candidates_.begin(), end, less_probable);
    sum += (--end)->p;
  }
  candidates_.erase(candidates_.begin(), end);
  std::reverse(candidates_.begin(), candidates_.end());
}

void Sampler::filter(std::span<const float> logits) {
  const bool greedy = options_.temperature == 0;
  const auto k = static_cast<std::size_t>(greedy ? 1 : options_.top_k);
  keep_most_probable(logits, k == 0 ? logits.size() + 1 : k);

  float largest = candidates_.front().logit;
  for (const Candidate& c : candidates_) largest = std::max(largest, c.logit);
  const auto normalize = [this] {
    double sum = 0;
    for (const Candidate& c : candidates_) sum += c.p;
    for (Candidate& c : candidates_) c.p /= sum;
  };
  for (Candidate& c : candidates_) {
    c.p = greedy ? 1 : std::exp((double{c.logit} - largest) / options_.temperature);
  }
  normalize();
  if (options_.top_p < 1) keep_top_p();
  if (options_.min_p > 0) {
    double most = 0;
    for (const Candidate& c : candidates_) most = std::max(most, c.p);
    std::erase_if(candidates_, [&](const Candidate& c) { return c.p < options_.min_p * most; });
  }
  normalize();
}

std::span<const Sampler::Candidate> Sampler::distribution(std::span<const float> logits) {
  filter(logits);
  std::sort(candidates_.begin(), candidates_.end(), more_probable);
  return candidates_;
}

float Sampler::lead(std::span<const float> logits) const {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  if (options_.temperature > 0) return kInfinity;
  float first = -kInfinity, second = -kInfinity;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float logit = logit_of(logits, i);
    second = std::max(second, std::min(logit, first));
    first = std::max(first, logit);
  }
  return second > -kInfinity ? first - second : kInfinity;
}

double Sampler::next_draw() {
  if (!draw_) draw_ = static_cast<double>(rng_() >> 11) * 0x1p-53;
  return *draw_;
}

std::int32_t Sampler::take(const Prediction& prediction) {
  if (prediction.drawn) draw_.reset();
  return prediction.token;
}

// Only as many candidates as it takes come off the heap.
std::int32_t Sampler::sample(std::span<const float> logits) {
  filter(logits);
  if (candidates_.size() == 1) return candidates_.front().token;
  const double u = next_draw();
  draw_.reset();
  std::make_heap(candidates_.begin(), candidates_.end(), less_probable);
  auto end = candidates_.end();
  for (double sum = 0;;) {
    std::pop_heap(candidates_.begin(), end, less_probable);
    sum += (--end)->p;
    if (sum > u || end == candidates_.begin()) return end->token;  // rounding: 1 may not be reached
  }
}

}  // namespace thaw
