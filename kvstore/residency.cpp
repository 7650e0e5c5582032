#include "kvstore/residency.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "device/error.h"
#include "device/prefetch_cpu.h"

namespace thaw {
namespace {

// The q-quantile of values.
float quantile(std::vector<float> values, float q) {
  if (values.empty()) return 0;
  const auto at = values.begin() + quantile_index(q, static_cast<int>(values.size()));
  std::nth_element(values.begin(), at, values.end());
  return *at;
}

}  // namespace

Residency::Residency(HotArena& arena, const KvShape& shape, const PolicyParams& params, int layer,
                     int first_head, int n_heads)
    : params_(params),
      layer_(layer),
      first_head_(first_head),
      n_heads_(n_heads),
      lane_(arena, shape, layer, first_head, n_heads) {}

void Residency::grow(int kv_len) {
  const auto n = static_cast<std::size_t>(kv_len);
  if (n <= hits_.size()) return;
  hits_.resize(n);
  timer_.resize(n);
  score_.resize(n);
  stamp_.resize(n);
}

int Residency::first_recent(const Moment& now) const {
  return thaw::first_recent(params_, now.kv_len, now.bound);
}

bool Residency::always(const Moment& now, std::int32_t token) const {
  return token < params_.sinks || token >= first_recent(now);
}

void Residency::tell(const Moment& now, KvEvent::Kind kind, std::int32_t token,
                     float probability) const {
  if (!now.recorder) return;
  const auto t = static_cast<std::size_t>(token);
  const int head = params_.per_head && params_.policy == Policy::kThaw ? first_head_ : -1;
  now.recorder->event({kind, now.step, layer_, head, token, probability, hits_[t], timer_[t]});
}

bool Residency::thaw(const Moment& now, std::int32_t token, KvEvent::Kind why, float probability) {
  if (lane_.n_rows() >= now.bound || !lane_.thaw(now.cold, token)) return false;
  tally_.promoted += why == KvEvent::kRecall;
  tally_.thawed += why == KvEvent::kThaw;
  tell(now, why, token, probability);
  return true;
}

void Residency::freeze(const Moment& now, int row, float probability) {
  const std::int32_t token = lane_.token(row);
  lane_.freeze(row);
  ++tally_.frozen;
  stamp_[static_cast<std::size_t>(token)] = now.step + 1;
  tell(now, KvEvent::kFreeze, token, probability);
}

// rows: ascending; freezing from the last on leaves the rows before it in place.
void Residency::freeze_rows(const Moment& now, const std::vector<int>& rows,
                            const std::vector<float>* probability) {
  for (std::size_t i = rows.size(); i-- > 0;)
    freeze(now, rows[i], probability ? (*probability)[static_cast<std::size_t>(rows[i])] : 0.0f);
}

// Freezes rows (ascending) for want of room: a sleeper of asr is judged again as soon as there is.
void Residency::evict(const Moment& now, const std::vector<int>& rows) {
  for (const int row : rows) {
    const std::int32_t token = lane_.token(row);
    timer_[static_cast<std::size_t>(token)] = 0;
    if (params_.policy == Policy::kAsr) sleep(token, 1);
  }
  freeze_rows(now, rows, nullptr);
}

void Residency::sleep(std::int32_t token, int steps) {
  asleep_.push_back({token, steps});
  timer_[static_cast<std::size_t>(token)] = static_cast<std::uint16_t>(steps);
}

void Residency::learn(const AttentionStats::Lane& stats, int n_rows, int kv_len) {
  entropy_ = stats.entropy;
  spread_ = attention_spread(entropy_);
  const bool sums = accumulates(params_);
  for (std::size_t t = 0; t < stats.probability.size(); ++t) {
    if (sums) {
      score_[t] = accumulated_score(score_[t], stats.probability[t], n_rows);
    } else {
      score_[t] = entropy_score(stats.probability[t], spread_);
    }
  }
  if (params_.policy == Policy::kAsr && !stats.relevance.empty())
    tau_ = quantile({stats.relevance.begin(), stats.relevance.begin() + kv_len}, params_.quantile);
}

void Residency::take_over(std::span<const float> scores, float entropy, float tau) {
  std::copy(scores.begin(), scores.end(), score_.begin());
  entropy_ = entropy, tau_ = tau;
  spread_ = attention_spread(entropy);
}

// The tokens that should be hot as decoding begins, ascending, at most now.bound.
std::vector<std::int32_t> Residency::choose(const Moment& now) const {
  std::vector<std::int32_t> chosen, others;
  const bool all = params_.policy == Policy::kAsr || !now.can_freeze;
  const bool ranked = seeds_by_rank(params_);
  const float least = params_.policy == Policy::kThaw ? entropy_score(now.epsilon, spread_) : 0.0f;
  for (std::int32_t t = 0; t < now.kv_len; ++t) {
    if (always(now, t)) {
      chosen.push_back(t);
    } else if (all || (ranked && score_[static_cast<std::size_t>(t)] >= least)) {
      others.push_back(t);
    }
  }
  const std::size_t room = static_cast<std::size_t>(now.bound) - chosen.size();
  if (others.size() > room) {
    std::nth_element(others.begin(), others.begin() + static_cast<std::ptrdiff_t>(room),
                     others.end(), [&](std::int32_t a, std::int32_t b) {
                       const float x = score_[static_cast<std::size_t>(a)],
                                   y = score_[static_cast<std::size_t>(b)];
                       return x != y ? x > y : a > b;
                     });
    others.resize(room);
  }
  chosen.insert(chosen.end(), others.begin(), others.end());
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

std::int64_t Residency::clear_for_seed(const Moment& now) {
  const std::vector<std::int32_t> chosen = choose(now);
  std::vector<int> leaving;
  for (int row = 0; row < lane_.n_rows(); ++row)
    if (!std::binary_search(chosen.begin(), chosen.end(), lane_.token(row))) leaving.push_back(row);
  evict(now, leaving);
  const auto pages = [](std::int64_t rows) { return (rows + kHotPageRows - 1) / kHotPageRows; };
  return pages(std::ssize(chosen)) - pages(lane_.n_rows());
}

void Residency::seed(const Moment& now) {
  for (const std::int32_t token : choose(now)) {
    const auto t = static_cast<std::size_t>(token);
    if (params_.policy == Policy::kThaw && !always(now, token)) {
      if (hits_[t] == 0) hits_[t] = 1;
      timer_[t] = static_cast<std::uint16_t>(stay_steps(params_, hits_[t]));
    }
    if (!lane_.is_hot(token))
      thaw(now, token, KvEvent::kSeed, accumulates(params_) ? 0 : score_[t] / spread_);
  }
  if (params_.policy != Policy::kAsr) return;
  asleep_.clear();
  for (std::int32_t t = 0; t < now.kv_len; ++t)
    if (!lane_.is_hot(t)) sleep(t, 1);
}

void Residency::make_room(const Moment& now, int incoming) {
  const int excess = lane_.n_rows() + incoming - now.bound;
  if (excess <= 0) return;
  std::vector<int> rows;
  for (int row = 0; row < lane_.n_rows(); ++row)
    if (!always(now, lane_.token(row))) rows.push_back(row);
  const auto n = std::min(std::ssize(rows), static_cast<std::ptrdiff_t>(excess));
  std::partial_sort(rows.begin(), rows.begin() + n, rows.end(), [&](int a, int b) {
    const std::int32_t x = lane_.token(a), y = lane_.token(b);
    const float p = score_[static_cast<std::size_t>(x)], q = score_[static_cast<std::size_t>(y)];
    return p != q ? p < q : x < y;
  });
  rows.resize(static_cast<std::size_t>(n));
  std::sort(rows.begin(), rows.end());
  evict(now, rows);
}

void Residency::append(const Moment& now, std::int32_t token) {
  thaw(now, token, KvEvent::kAppend, 0);
}

void Residency::settle(const Moment& now, const AttentionStats::Lane& stats) {
  entropy_ = stats.entropy;
  spread_ = attention_spread(entropy_);
  ghost_mass_ = stats.ghost_mass;
  switch (params_.policy) {
    case Policy::kThaw:
      settle_thaw(now, stats);
      break;
    case Policy::kAsr:
      settle_asr(now, stats);
      break;
    default:  // h2o, budget: accumulated attention; window: nothing to learn
      for (int row = 0; row < lane_.n_rows(); ++row)
        score_[static_cast<std::size_t>(lane_.token(row))] +=
            stats.probability[static_cast<std::size_t>(row)];
  }
  make_room(now, 0);
}

void Residency::settle_thaw(const Moment& now, const AttentionStats::Lane& stats) {
  for (int row = 0; row < lane_.n_rows(); ++row) {  // they stand far apart
    const auto t = static_cast<std::size_t>(lane_.token(row));
    prefetch(hits_[t]), prefetch(timer_[t]), prefetch(score_[t]);
  }
  std::vector<int> leaving;
  for (int row = 0; row < lane_.n_rows(); ++row) {
    const std::int32_t token = lane_.token(row);
    const auto t = static_cast<std::size_t>(token);
    const float p = stats.probability[static_cast<std::size_t>(row)];
    score_[t] = entropy_score(p, spread_);
    if (!thaw_stays(params_, p, now.epsilon, always(now, token), hits_[t], timer_[t]) &&
        now.can_freeze)
      leaving.push_back(row);
  }
  freeze_rows(now, leaving, &stats.probability);
  for (const AttentionStats::Recall& recall : stats.recalled) promote(now, recall);
}

// A recalled token becomes hot if its timer says so; when room is short, in place of the lowest
// ranked token if that ranks below it.
void Residency::promote(const Moment& now, const AttentionStats::Recall& recall) {
  const auto t = static_cast<std::size_t>(recall.token);
  thaw_stays(params_, recall.probability, now.epsilon, false, hits_[t], timer_[t]);
  score_[t] = entropy_score(recall.probability, spread_);
  if (timer_[t] > 0 && lane_.n_rows() >= now.bound) {
    int lowest = -1;
    float score = score_[t];
    for (int row = 0; row < lane_.n_rows(); ++row) {
      const std::int32_t token = lane_.token(row);
      if (always(now, token) || score_[static_cast<std::size_t>(token)] >= score) continue;
      lowest = row;
      score = score_[static_cast<std::size_t>(token)];
    }
    if (lowest >= 0) {
      timer_[static_cast<std::size_t>(lane_.token(lowest))] = 0;
      freeze(now, lowest, 0);
    }
  }
  if (timer_[t] > 0 && thaw(now, recall.token, KvEvent::kRecall, recall.probability)) return;
  timer_[t] = 0;
  tell(now, KvEvent::kRecall, recall.token, recall.probability);
}

// Timers fall first; who is at zero is awake again and judged after its next attention.
void Residency::settle_asr(const Moment& now, const AttentionStats::Lane& stats) {
  const std::size_t n_rows = static_cast<std::size_t>(lane_.n_rows());
  std::vector<std::int32_t> waking;
  for (Sleeper& s : asleep_)
    if (--s.timer == 0) waking.push_back(s.token);
  std::erase_if(asleep_, [](const Sleeper& s) { return s.timer == 0; });
  std::vector<int> leaving;
  for (std::size_t row = 0; row < n_rows; ++row) {
    const std::int32_t token = lane_.token(static_cast<int>(row));
    const auto t = static_cast<std::size_t>(token);
    score_[t] = stats.relevance[row];
    const int steps = asr_sleep(params_, stats.relevance[row], tau_, always(now, token), hits_[t]);
    if (steps == 0) continue;
    sleep(token, steps);
    leaving.push_back(static_cast<int>(row));
  }
  freeze_rows(now, leaving, &stats.probability);
  for (const std::int32_t token : waking)
    if (!thaw(now, token, KvEvent::kThaw, 0)) sleep(token, 1);
}

bool Residency::cut(const Moment& now, std::int32_t position) {
  lane_.cut(position);
  for (std::size_t t = static_cast<std::size_t>(position); t < hits_.size(); ++t)
    hits_[t] = timer_[t] = 0, score_[t] = 0, stamp_[t] = 0;
  std::erase_if(asleep_, [&](const Sleeper& s) { return s.token >= position; });
  if (position == 0) entropy_ = ghost_mass_ = tau_ = 0;
  make_room(now, 0);
  // What is among the newest now, or has no ghost, must be hot.
  bool all = true;
  for (std::int32_t t = 0; t < position; ++t) {
    if (lane_.is_hot(t) || !(always(now, t) || !now.can_freeze)) continue;
    std::erase_if(asleep_, [&](const Sleeper& s) { return s.token == t; });
    make_room(now, 1);
    all &= thaw(now, t, KvEvent::kThaw, 0);
  }
  return all;
}

void Residency::reset(Rung rung, const Moment& now) {
  if (rung == Rung::kSoft) wake_sleepers(now);
  if (rung == Rung::kWindow) wake_recent(now);
  if (rung >= Rung::kFull) forget_history();
}

// tokens: frozen ones, the newest first.
void Residency::wake(const Moment& now, const std::vector<std::int32_t>& tokens) {
  for (const std::int32_t token : tokens) {
    const auto t = static_cast<std::size_t>(token);
    if (!thaw(now, token, KvEvent::kThaw, 0)) break;
    if (params_.policy == Policy::kThaw)
      timer_[t] = static_cast<std::uint16_t>(std::max(1, stay_steps(params_, hits_[t])));
  }
  std::erase_if(asleep_, [&](const Sleeper& s) { return lane_.is_hot(s.token); });
}

void Residency::wake_sleepers(const Moment& now) {
  std::vector<std::int32_t> tokens;
  for (const Sleeper& s : asleep_)
    if (s.timer > 1) tokens.push_back(s.token);
  std::sort(tokens.rbegin(), tokens.rend());
  wake(now, tokens);
}

void Residency::wake_recent(const Moment& now) {
  std::vector<std::int32_t> tokens;
  for (std::int32_t t = now.kv_len; t-- > 0;)
    if (!lane_.is_hot(t) && froze_recently(stamp_[static_cast<std::size_t>(t)], now.step))
      tokens.push_back(t);
  wake(now, tokens);
}

void Residency::forget_history() {
  std::fill(hits_.begin(), hits_.end(), std::uint16_t{0});
  std::fill(timer_.begin(), timer_.end(), std::uint16_t{0});
  for (Sleeper& s : asleep_) s.timer = 1;
}

Residency::Tally Residency::take_tally() { return std::exchange(tally_, {}); }

std::int64_t Residency::bookkeeping_bytes() const {
  return lane_.bookkeeping_bytes() +
         static_cast<std::int64_t>(hits_.capacity() * 2 + timer_.capacity() * 2 +
                                   score_.capacity() * 4 + stamp_.capacity() * 4 +
                                   asleep_.capacity() * sizeof(Sleeper));
}

void Residency::check(const Moment& now) const {
  lane_.check(now.cold, now.kv_len);
  require(lane_.n_rows() <= now.bound, "KV check: layer ", layer_, ": ", lane_.n_rows(),
          " hot tokens, more than the ", now.bound, " allowed");
  std::vector<bool> asleep(static_cast<std::size_t>(now.kv_len));
  for (const Sleeper& s : asleep_) {
    require(s.token < now.kv_len && !asleep[static_cast<std::size_t>(s.token)], "KV check: layer ",
            layer_, ": token ", s.token, " sleeps twice");
    asleep[static_cast<std::size_t>(s.token)] = true;
    require(
        s.timer >= 1 &&
            s.timer <= std::max(1, sleep_steps(params_, hits_[static_cast<std::size_t>(s.token)])),
        "KV check: layer ", layer_, ": token ", s.token, " sleeps ", s.timer, " more steps");
  }
  for (std::int32_t t = 0; t < now.kv_len; ++t) {
    const bool hot = lane_.is_hot(t);
    const auto at = static_cast<std::size_t>(t);
    require(hot || (now.can_freeze && !always(now, t)), "KV check: layer ", layer_, ": token ", t,
            " of ", now.kv_len, " is frozen and must not be");
    if (params_.policy == Policy::kAsr)
      require(hot != asleep[at], "KV check: layer ", layer_, ": token ", t, " is ",
              hot ? "both hot and asleep" : "neither hot nor asleep");
    if (params_.policy == Policy::kThaw)
      require(timer_[at] <= (hot ? std::max(1, stay_steps(params_, hits_[at])) : 0),
              "KV check: layer ", layer_, ": token ", t, " has ", timer_[at],
              " steps left to stay");
  }
}

}  // namespace thaw
