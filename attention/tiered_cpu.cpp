#include "attention/tiered_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "device/error.h"
#include "device/fast_math.h"
#include "device/prefetch_cpu.h"

namespace thaw {
namespace {

constexpr int kRangeTokens = 512;  // ghosts of one task
constexpr int kAhead = 3;  // groups from what is scored to what is fetched: they are too far
                           // apart for the CPU to see what is next

// Of n weights, whole groups: chains of additions side by side.
float sum_of_groups(const float* weights, int n) {
  float sums[kGhostGroup] = {};
  for (int i = 0; i < n; i += kGhostGroup)
    for (int j = 0; j < kGhostGroup; ++j) sums[j] += weights[i + j];
  return std::accumulate(sums, sums + kGhostGroup, 0.0f);
}

void add_state(SoftmaxState& a, const SoftmaxState& b) { merge(a, nullptr, b, nullptr, 0); }

}  // namespace

void TieredDecode::prepare(const float* q, const KvView& kv, int n_heads) {
  q_ = q;
  group_ = n_heads / kv.n_kv_heads;
  dim_ = padded_dim(kv.head_dim);
  n_ranges_ = kv.ghosts.present() ? (kv.kv_len + kRangeTokens - 1) / kRangeTokens : 0;
  ghost_stride_ = static_cast<std::size_t>(n_ranges_) * kRangeTokens;
  hot_stride_ = 0;
  for (const LaneView& lane : kv.lanes) hot_stride_ = std::max(hot_stride_, lane.tokens.size());
  const auto heads = static_cast<std::size_t>(n_heads), parts = heads * n_ranges_;
  queries_.resize(heads), doubt_.resize(heads);
  hot_scores_.resize(heads * hot_stride_);
  hot_.assign(heads, {});
  hot_o_.resize(heads * dim_);
  ghost_.resize(heads * ghost_stride_);
  ghost_state_.assign(parts, {});
  ghost_o_.resize(parts * dim_);
  recalled_state_.assign(parts, {});
  recalled_o_.resize(parts * dim_);
  total_.resize(heads), ghost_mass_.resize(heads);
  ranges_.resize(kv.lanes.size() * n_ranges_);
  if (scorers_.size() < ranges_.size()) scorers_ = std::vector<std::atomic<int>>(ranges_.size());
  for (ExactScratch& s : scratch_) s.reserve(group_, kv.head_dim);
  if (waits_.size() != static_cast<std::size_t>(kv.n_kv_heads))
    waits_ = std::vector<Waits>(static_cast<std::size_t>(kv.n_kv_heads));
  for (Waits& w : waits_) {
    w.prepared.clear(), w.normalised.clear();
    w.scored.start(kv.lane_heads * (1 + n_ranges_));
    w.answered.start(std::max(n_ranges_, 1));
  }
}

void TieredDecode::prepare_head(const KvView& kv, int head) {
  float scaled[GhostQuery::kMaxDim];
  const float scale = 1.0f / std::sqrt(static_cast<float>(kv.head_dim));
  for (int i = 0; i < kv.head_dim; ++i) scaled[i] = q_[head * kv.head_dim + i] * scale;
  const GhostCentre& centre = kv.ghosts.centres[head / group_];
  prepare_query(queries_[head], scaled, centre.key_mean, *kv.ghosts.rope, kv.ghosts.format);
  doubt_[head] = kv.caution.factor(queries_[head].noise * centre.key_unit, kv.recall);
}

void TieredDecode::attend_hot(const KvView& kv, int kv_head, ExactScratch& scratch) {
  const LaneView& lane = kv.lanes[static_cast<std::size_t>(kv_head / kv.lane_heads)];
  const int first = kv_head * group_;
  ExactWork w;
  w.q = q_ + std::int64_t{first} * kv.head_dim;
  w.group = group_;
  w.rows = &lane.hot;
  w.head = kv_head % kv.lane_heads;
  w.end = w.first_visible = lane.hot.n_rows;
  w.scores = hot_scores_.data() + first * hot_stride_;
  w.score_head_stride = static_cast<std::int64_t>(hot_stride_);
  std::vector<float> o(static_cast<std::size_t>(group_) * dim_);
  attend_exactly(&hot_[first], o.data(), w, kv.type, kv.head_dim, scratch);
  std::copy(o.begin(), o.end(), &hot_o_[static_cast<std::size_t>(first) * dim_]);
}

// Hot tokens have ghosts, too, which keep silent.
void TieredDecode::score_range(const KvView& kv, int kv_head, int range) {
  const LaneView& lane = kv.lanes[static_cast<std::size_t>(kv_head / kv.lane_heads)];
  const int head = kv_head * group_, begin = range * kRangeTokens;
  const int end = std::min(begin + kRangeTokens, kv.kv_len);
  const int n = round_up(end - begin, kGhostGroup);
  const GhostFormat& format = kv.ghosts.format;
  const int last = (kv.kv_len - 1) / kGhostGroup;
  kv.ghosts.rope->score_centre(ghost_row(head) + begin, ghost_stride_, &queries_[head], group_,
                               begin / GhostRope::kSpan,
                               (n + GhostRope::kSpan - 1) / GhostRope::kSpan);
  for (int t = begin; t < end; t += kGhostGroup) {
    const std::byte* ghosts = kv.ghosts.group(kv_head, t / kGhostGroup);
    prefetch(kv.ghosts.group(kv_head, std::min(t / kGhostGroup + kAhead, last)),
             format.group_bytes());
    score_ghosts(ghost_row(head) + t, ghost_stride_, &queries_[head], group_, ghosts, format,
                 kv.ghosts.centres[kv_head].key_unit);
    const auto word = static_cast<std::size_t>(t / kGhostGroup);
    std::uint32_t silent = word < lane.hot_mask.size() ? lane.hot_mask[word] : 0;
    if (kv.kv_len - t < kGhostGroup) silent |= ~0u << (kv.kv_len - t);
    for (; silent != 0; silent &= silent - 1) {
      for (int h = head; h < head + group_; ++h)
        ghost_row(h)[t + __builtin_ctz(silent)] = -std::numeric_limits<float>::infinity();
    }
  }
  for (int h = head; h < head + group_; ++h)
    absorb_scores(ghost_state_[at(h, range)], nullptr, ghost_row(h) + begin, n, 0);
}

// The normaliser that recalls are decided by: hot tokens and ghosts' estimates.
void TieredDecode::normalise(const KvView& kv, int lane) {
  const int queries = queries_per_lane(kv);
  for (int head = lane * queries; head < (lane + 1) * queries; ++head) {
    total_[head] = hot_[head];
    for (int range = 0; range < n_ranges_; ++range)
      add_state(total_[head], ghost_state_[at(head, range)]);
  }
}

// Tokens of the range whose estimated probability, mean over the lane's queries, may be enough.
void TieredDecode::find_recalled(const KvView& kv, int lane, int range) {
  const int queries = queries_per_lane(kv), first = lane * queries;
  const int begin = range * kRangeTokens, end = std::min(begin + kRangeTokens, kv.kv_len);
  std::vector<std::int32_t>& recalled = ranges_[at(lane, range)].recalled;
  recalled.clear();
  float most = 0;  // no token's sum is more, but for rounding: e is at most 1
  for (int h = first; h < first + queries; ++h)
    most += doubt_[h] * exp_fast(ghost_state_[at(h, range)].m - total_[h].m) / total_[h].l;
  if (most < kv.recall * static_cast<float>(queries) * 0.999f) return;
  const int n = round_up(end - begin, kGhostGroup);
  float mean[kRangeTokens] = {};
  for (int h = first; h < first + queries; ++h) {
    const SoftmaxState& state = ghost_state_[at(h, range)];
    if (state.l == 0) continue;
    const float factor =
        doubt_[h] * exp_fast(state.m - total_[h].m) / (total_[h].l * static_cast<float>(queries));
    const float* e = ghost_row(h) + begin;
#pragma omp simd
    for (int j = 0; j < n; ++j) mean[j] += factor * e[j];
  }
  for (int t = begin; t < end; t += kGhostGroup) {
    if (largest(mean + t - begin, kGhostGroup) < kv.recall) continue;
    for (int i = t; i < std::min(t + kGhostGroup, end); ++i)
      if (mean[i - begin] >= kv.recall && mean[i - begin] > 0) recalled.push_back(i);
  }
}

// The recalled tokens' ghosts say nothing more. Their rows are fetched: they are far from here.
void TieredDecode::silence(const KvView& kv, int lane, int range) {
  const std::vector<std::int32_t>& recalled = ranges_[at(lane, range)].recalled;
  if (recalled.empty()) return;
  const std::size_t bytes = kv_row_bytes(kv.type, kv.head_dim);
  for (int kv_head = lane * kv.lane_heads; kv_head < (lane + 1) * kv.lane_heads; ++kv_head)
    for (const std::int32_t t : recalled)
      prefetch(kv.cold.key(kv_head, t), bytes), prefetch(kv.cold.value(kv_head, t), bytes);
  const int begin = range * kRangeTokens, end = std::min(begin + kRangeTokens, kv.kv_len);
  const int queries = queries_per_lane(kv);
  for (int head = lane * queries; head < (lane + 1) * queries; ++head) {
    SoftmaxState& ghost = ghost_state_[at(head, range)];
    float* e = ghost_row(head);
    for (const std::int32_t t : recalled) {
      if (e[t] > 0) ghost.ps -= e[t] * (std::log(e[t]) + ghost.m);
      e[t] = 0;
    }
    ghost.l = sum_of_groups(e + begin, round_up(end - begin, kGhostGroup));
  }
}

void TieredDecode::recall(const KvView& kv, int lane, int range, ExactScratch& scratch) {
  Range& r = ranges_[at(lane, range)];
  const int n = static_cast<int>(r.recalled.size()), queries = queries_per_lane(kv);
  r.scores.resize(static_cast<std::size_t>(queries) * n);
  if (n == 0) return;
  for (int kv_head = lane * kv.lane_heads; kv_head < (lane + 1) * kv.lane_heads; ++kv_head) {
    const int first = kv_head * group_;
    std::vector<SoftmaxState> states(static_cast<std::size_t>(group_));
    std::vector<float> o(static_cast<std::size_t>(group_) * dim_);
    ExactWork w;
    w.q = q_ + std::int64_t{first} * kv.head_dim;
    w.group = group_;
    w.rows = &kv.cold;
    w.list = r.recalled.data();
    w.head = kv_head;
    w.end = w.first_visible = n;
    w.scores = r.scores.data() + (first - lane * queries) * n;
    w.score_head_stride = n;
    attend_exactly(states.data(), o.data(), w, kv.type, kv.head_dim, scratch);
    for (int g = 0; g < group_; ++g) {
      const std::size_t part = at(first + g, range);
      recalled_state_[part] = states[g];
      std::copy_n(o.data() + g * dim_, dim_, recalled_o_.data() + part * dim_);
    }
  }
}

void TieredDecode::sum_values(const KvView& kv, int lane, int range) {
  const int end = (lane + 1) * queries_per_lane(kv);
  for (int head = lane * queries_per_lane(kv); head < end;) {
    const int n = std::min(kJudges, group_ - head % group_);
    sum_values(kv, head, n, range);
    head += n;
  }
}

// Of n query heads of one k/v head.
void TieredDecode::sum_values(const KvView& kv, int head, int n, int range) {
  const int begin = range * kRangeTokens, end = std::min(begin + kRangeTokens, kv.kv_len);
  const int kv_head = head / group_;
  float sums[kJudges * GhostQuery::kMaxDim];
  std::fill_n(sums, n * dim_, 0.0f);
  float faint[kJudges];  // as a weight, which is relative to the range's largest
  for (int i = 0; i < n; ++i) {
    const float above = total_[head + i].m - ghost_state_[at(head + i, range)].m;
    faint[i] =
        faintest(kv.recall, kv.kv_len) * total_[head + i].l * exp_fast(std::min(above, 80.0f));
  }
  for (int t = begin; t < end; t += kGhostGroup) {
    bool speaks = false;
    for (int i = 0; i < n; ++i) speaks |= largest(ghost_row(head + i) + t, kGhostGroup) > faint[i];
    if (speaks)
      sum_ghosts(sums, static_cast<std::size_t>(dim_), ghost_row(head) + t, ghost_stride_, n,
                 kv.ghosts.group(kv_head, t / kGhostGroup), kv.ghosts.format,
                 kv.ghosts.centres[kv_head].value_unit);
  }
  for (int i = 0; i < n; ++i)
    std::copy_n(sums + i * dim_, dim_, ghost_o_.data() + at(head + i, range) * dim_);
}

// A range of the lane that nobody answers for yet, if possible one that this thread has scored. Of
// n ranges, n calls find one each: a range that is claimed stays so.
int TieredDecode::claim_range(int lane, int thread) {
  std::atomic<int>* scorers = scorers_.data() + static_cast<std::size_t>(lane) * n_ranges_;
  for (const bool own : {true, false}) {
    for (int range = 0; range < n_ranges_; ++range) {
      int scorer = scorers[range].load(std::memory_order_relaxed);
      if (scorer == kClaimed || (own && scorer != thread)) continue;
      if (scorers[range].compare_exchange_strong(scorer, kClaimed)) return range;
    }
  }
  fail("attend: lane ", lane, ": expected a range that is not claimed, found none");
}

void TieredDecode::answer_range(const KvView& kv, int lane, int range, ExactScratch& scratch) {
  find_recalled(kv, lane, range);
  silence(kv, lane, range);
  sum_values(kv, lane, range);
  recall(kv, lane, range, scratch);
}

// o = (exact sums + R^T (rotated sums) + value mean * ghosts' weight) / l.
void TieredDecode::finish_head(float* o, const KvView& kv, int head) {
  const int head_dim = kv.head_dim;
  SoftmaxState exact = hot_[head], ghosts, frozen;
  float rotated[GhostQuery::kMaxDim] = {};
  float* sum = &hot_o_[static_cast<std::size_t>(head) * dim_];
  for (int range = 0; range < n_ranges_; ++range) {
    const std::size_t part = at(head, range);
    merge(exact, sum, recalled_state_[part], recalled_o_.data() + part * dim_, dim_);
    merge(ghosts, rotated, ghost_state_[part], ghost_o_.data() + part * dim_, dim_);
    add_state(frozen, recalled_state_[part]);
  }
  add_state(frozen, ghosts);
  if (ghosts.l > 0) {
    rotate_back(rotated, head_dim);
    const float* mean = kv.ghosts.centres[head / group_].value_mean;
    for (int i = 0; i < head_dim; ++i) rotated[i] += ghosts.l * mean[i];
  }
  merge(exact, sum, ghosts, rotated, head_dim);
  total_[head] = exact;
  ghost_mass_[head] = frozen.l * exp_fast(frozen.m - exact.m) / exact.l;
  const float inverse = 1.0f / exact.l;
  for (int i = 0; i < head_dim; ++i) o[i] = sum[i] * inverse;
}

void TieredDecode::fill_recalled(AttentionStats::Lane& out, const KvView& kv, int lane) const {
  const int queries = queries_per_lane(kv);
  for (int range = 0; range < n_ranges_; ++range) {
    const Range& r = ranges_[at(lane, range)];
    for (std::size_t i = 0; i < r.recalled.size(); ++i) {
      float p = 0;
      for (int h = 0; h < queries; ++h) {
        const SoftmaxState& total = total_[lane * queries + h];
        p += exp_fast(r.scores[h * r.recalled.size() + i] - total.m) / total.l;
      }
      out.recalled.push_back({r.recalled[i], p / static_cast<float>(queries)});
    }
  }
}

void TieredDecode::fill_stats(AttentionStats::Lane& out, const KvView& kv, int lane) const {
  const int queries = queries_per_lane(kv);
  const float share = 1.0f / static_cast<float>(queries);
  const std::size_t n = kv.lanes[static_cast<std::size_t>(lane)].tokens.size();
  out.entropy = out.ghost_mass = 0;
  out.recalled.clear();
  out.probability.assign(n, 0.0f);
  out.relevance.assign(n, 0.0f);
  for (int h = lane * queries; h < (lane + 1) * queries; ++h) {
    const SoftmaxState& total = total_[h];
    const float* scores = hot_scores_.data() + h * hot_stride_;
    float *probability = out.probability.data(), *relevance = out.relevance.data();
    const float weight = share / total.l;
#pragma omp simd
    for (std::size_t j = 0; j < n; ++j) {
      probability[j] += weight * exp_fast(scores[j] - total.m);
      relevance[j] += share * std::fabs(scores[j]);
    }
    out.entropy += share * total.entropy();
    out.ghost_mass += share * ghost_mass_[h];
  }
  fill_recalled(out, kv, lane);
}

// A task of pass 1 or 2 of a lane is done.
void TieredDecode::count_scored(const KvView& kv, int lane) {
  Waits& w = waits_[static_cast<std::size_t>(lane)];
  if (!w.scored.arrive()) return;
  normalise(kv, lane);
  w.normalised.set();
}

void TieredDecode::finish_lane(float* o, AttentionStats& stats, const KvView& kv, int lane) {
  const int queries = queries_per_lane(kv);
  for (const auto& [sums, n] : {std::pair(&hot_o_, 1), std::pair(&ghost_o_, n_ranges_)})
    for (int i = lane * queries * n * dim_; i < (lane + 1) * queries * n * dim_; i += 16)
      prefetch((*sums)[static_cast<std::size_t>(i)]);  // other cores may have them
  for (int head = lane * queries; head < (lane + 1) * queries; ++head)
    finish_head(o + std::int64_t{head} * kv.head_dim, kv, head);
  fill_stats(stats.lanes[static_cast<std::size_t>(lane)], kv, lane);
}

void TieredDecode::attend(float* o, const float* q, int n_heads, const KvView& kv,
                          AttentionStats& stats) {
  prepare(q, kv, n_heads);
  stats.lanes.resize(kv.lanes.size());
  const int n_kv = kv.n_kv_heads, n_scores = n_kv * n_ranges_, n_answers = std::max(n_ranges_, 1);
  const int n_lanes = static_cast<int>(kv.lanes.size());
  heads_.start(n_kv), scores_.start(n_scores);
  pool_.run(n_kv + n_scores + n_lanes * n_answers, [&](std::int64_t task, int thread) {
    if (task < n_kv) {
      const int head = heads_.claim(thread);
      for (int g = 0; g < (n_ranges_ > 0 ? group_ : 0); ++g) prepare_head(kv, head * group_ + g);
      waits_[static_cast<std::size_t>(head)].prepared.set();
      attend_hot(kv, head, scratch_[thread]);
      count_scored(kv, head / kv.lane_heads);
    } else if (task < n_kv + n_scores) {
      const int i = scores_.claim(thread), head = i / n_ranges_, lane = head / kv.lane_heads;
      waits_[static_cast<std::size_t>(head)].prepared.wait();
      score_range(kv, head, i % n_ranges_);
      scorers_[at(lane, i % n_ranges_)].store(thread, std::memory_order_relaxed);
      count_scored(kv, lane);
    } else {
      const int lane = static_cast<int>(task - n_kv - n_scores) / n_answers;
      Waits& w = waits_[static_cast<std::size_t>(lane)];
      w.normalised.wait();
      if (n_ranges_ > 0) answer_range(kv, lane, claim_range(lane, thread), scratch_[thread]);
      if (w.answered.arrive()) finish_lane(o, stats, kv, lane);
    }
  });
}

}  // namespace thaw
