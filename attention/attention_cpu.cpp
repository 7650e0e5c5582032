// Attention over every token on the CPU, one algorithm for prefill and decode: a tile of query rows
// walks its tokens in blocks, keeping a SoftmaxState and an unnormalised output a row
// (FlashAttention, 2205.14135). In decode the tokens are also split into ranges, so that all
// threads have work, and the partial states are merged in order; ranges depend on the shape alone,
// so the bits do not depend on threads.
#include <algorithm>
#include <cmath>

#include "attention/attention.h"
#include "attention/exact_cpu.h"
#include "attention/tiered_cpu.h"
#include "device/error.h"
#include "device/fast_math.h"

namespace thaw {
namespace {

constexpr int kQueryTokens = 32;  // tokens of a query tile; its rows are these times the GQA group
constexpr int kRange = 256;       // tokens of a split in decode
constexpr int kSplitBelow = 16;   // rows below which tokens are split between threads
constexpr int kStatsRows = 64;    // rows whose scores are kept at a time

// One call of attend().
struct Problem {
  float* o;
  const float* q;
  int n_rows;
  int n_heads;
  const KvView& kv;
  int kv_len;     // tokens that the last row sees
  float* scores;  // n_stats_rows x n_heads x kv_len, or null
  int stats_rows;

  int group() const { return n_heads / kv.n_kv_heads; }
  int width() const { return n_heads * kv.head_dim; }
  int visible(int row) const { return kv_len - n_rows + row + 1; }  // tokens that a row sees
};

// A query tile of one k/v head against a range of tokens.
struct Work {
  int kv_head;
  int first_row, n_tokens;
  int begin, end;
};

class CpuAttention final : public Attention {
 public:
  explicit CpuAttention(ThreadPool& pool) : pool_(pool), tiered_(pool), scratch_(pool.size()) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats& stats, int stats_rows) override;

 private:
  void attend_rows(const Problem& p);
  void plan(const Problem& p);
  ExactWork exact_work(const Problem& p, const Work& work) const;
  void finish(const Problem& p, int dim);
  void add_stats(AttentionStats& stats, const Problem& p, float share) const;

  ThreadPool& pool_;
  TieredDecode tiered_;
  std::vector<ExactScratch> scratch_;  // one a thread
  std::vector<Work> work_;             // ranges of one query tile are neighbours, in order
  int max_rows_ = 0;                   // most rows of one Work
  std::vector<SoftmaxState> states_;   // work x max_rows
  std::vector<float> outputs_;         // work x max_rows x padded dim
  std::vector<SoftmaxState> final_;    // n_rows x n_heads
  std::vector<float> stats_scores_;
};

void CpuAttention::plan(const Problem& p) {
  work_.clear();
  const int range = p.n_rows < kSplitBelow ? kRange : p.kv_len;
  for (int head = 0; head < p.kv.n_kv_heads; ++head) {
    for (int row = 0; row < p.n_rows; row += kQueryTokens) {
      const int n_tokens = std::min(kQueryTokens, p.n_rows - row);
      const int end = p.visible(row + n_tokens - 1);
      for (int begin = 0; begin < end; begin += range)
        work_.push_back({head, row, n_tokens, begin, std::min(begin + range, end)});
    }
  }
  max_rows_ = std::min(kQueryTokens, p.n_rows) * p.group();
}

ExactWork CpuAttention::exact_work(const Problem& p, const Work& work) const {
  ExactWork w;
  w.q = p.q + std::int64_t{work.first_row} * p.width() +
        std::int64_t{work.kv_head} * p.group() * p.kv.head_dim;
  w.q_stride = p.width();
  w.n_tokens = work.n_tokens;
  w.group = p.group();
  w.rows = &p.kv.cold;
  w.head = work.kv_head;
  w.begin = work.begin;
  w.end = work.end;
  w.first_visible = p.visible(work.first_row);
  const int first_stats = p.n_rows - p.stats_rows;
  if (p.scores && work.first_row + work.n_tokens > first_stats) {
    w.first_scored = std::max(0, first_stats - work.first_row);
    const int stats_row = work.first_row + w.first_scored - first_stats;
    w.score_token_stride = std::int64_t{p.n_heads} * p.kv_len;
    w.score_head_stride = p.kv_len;
    w.scores = p.scores + stats_row * w.score_token_stride +
               std::int64_t{work.kv_head} * p.group() * p.kv_len;
  }
  return w;
}

// Merges the ranges of each query tile, divides by l, and writes o.
void CpuAttention::finish(const Problem& p, int dim) {
  const int group = p.group(), head_dim = p.kv.head_dim;
  final_.resize(static_cast<std::size_t>(p.n_rows) * p.n_heads);
  for (std::size_t i = 0; i < work_.size();) {
    const Work& work = work_[i];
    std::size_t next = i + 1;
    while (next < work_.size() && work_[next].begin > work.begin) ++next;
    for (int r = 0; r < work.n_tokens * group; ++r) {
      SoftmaxState& state = states_[i * max_rows_ + r];
      float* sum = outputs_.data() + (i * max_rows_ + r) * dim;
      for (std::size_t other = i + 1; other < next; ++other)
        merge(state, sum, states_[other * max_rows_ + r],
              outputs_.data() + (other * max_rows_ + r) * dim, dim);
      const std::int64_t row = work.first_row + r / group;
      const int head = work.kv_head * group + r % group;
      const float inverse = 1.0f / state.l;
      for (int d = 0; d < head_dim; ++d)
        p.o[row * p.width() + head * head_dim + d] = sum[d] * inverse;
      final_[row * p.n_heads + head] = state;
    }
    i = next;
  }
}

// Adds the asked rows' part of the means, each row counting `share`.
void CpuAttention::add_stats(AttentionStats& stats, const Problem& p, float share) const {
  const int lane_queries = p.kv.lane_heads * p.group();
  share /= static_cast<float>(lane_queries);
  for (int i = 0; i < p.stats_rows; ++i) {
    const int row = p.n_rows - p.stats_rows + i;
    for (int head = 0; head < p.n_heads; ++head) {
      AttentionStats::Lane& lane = stats.lanes[static_cast<std::size_t>(head / lane_queries)];
      const SoftmaxState& state = final_[static_cast<std::size_t>(row) * p.n_heads + head];
      const float* scores = p.scores + (std::int64_t{i} * p.n_heads + head) * p.kv_len;
      float *probability = lane.probability.data(), *relevance = lane.relevance.data();
      const float weight = share / state.l;
#pragma omp simd
      for (int j = 0; j < p.visible(row); ++j) {
        probability[j] += weight * exp_fast(scores[j] - state.m);
        relevance[j] += share * std::fabs(scores[j]);
      }
      lane.entropy += share * state.entropy();
    }
  }
}

void CpuAttention::attend_rows(const Problem& p) {
  plan(p);
  const int dim = padded_dim(p.kv.head_dim);
  states_.assign(work_.size() * max_rows_, {});
  outputs_.assign(work_.size() * max_rows_ * dim, 0.0f);
  for (ExactScratch& s : scratch_) s.reserve(max_rows_, p.kv.head_dim);
  pool_.run_streams(static_cast<std::int64_t>(work_.size()), [&](std::int64_t i, int thread) {
    attend_exactly(&states_[i * max_rows_], &outputs_[i * max_rows_ * dim], exact_work(p, work_[i]),
                   p.kv.type, p.kv.head_dim, scratch_[thread]);
  });
  finish(p, dim);
}

void CpuAttention::attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
                          AttentionStats& stats, int stats_rows) {
  require(n_rows >= 1 && n_rows <= kv.kv_len, "attend: rows: expected 1 to kv_len = ", kv.kv_len,
          ", found ", n_rows);
  require(kv.n_kv_heads > 0 && n_heads % kv.n_kv_heads == 0,
          "attend: n_heads: expected a multiple of ", kv.n_kv_heads, ", found ", n_heads);
  require(stats_rows >= 0 && stats_rows <= n_rows, "attend: stats_rows: expected 0 to ", n_rows,
          ", found ", stats_rows);
  stats.n_rows = stats_rows;
  if (!kv.lanes.empty()) {
    require(n_rows == 1, "attend: expected 1 row under a policy, found ", n_rows);
    stats.n_rows = 1;
    return tiered_.attend(o, q, n_heads, kv, stats);
  }
  stats.lanes.clear();
  if (stats_rows > 0) {
    stats.lanes.resize(static_cast<std::size_t>(kv.n_kv_heads / kv.lane_heads));
    for (AttentionStats::Lane& lane : stats.lanes) {
      lane.probability.assign(static_cast<std::size_t>(kv.kv_len), 0.0f);
      lane.relevance.assign(static_cast<std::size_t>(kv.kv_len), 0.0f);
    }
    stats_scores_.resize(static_cast<std::size_t>(std::min(stats_rows, kStatsRows)) * n_heads *
                         kv.kv_len);
  }
  // Rows without statistics at once, those with them a few at a time: their scores are kept.
  for (int row = 0; row < n_rows;) {
    const int plain = n_rows - stats_rows - row;
    const int n =
        stats_rows > kStatsRows ? (plain > 0 ? plain : std::min(kStatsRows, n_rows - row)) : n_rows;
    Problem p{o + std::int64_t{row} * n_heads * kv.head_dim,
              q + std::int64_t{row} * n_heads * kv.head_dim,
              n,
              n_heads,
              kv,
              kv.kv_len - n_rows + row + n,
              nullptr,
              std::min(stats_rows, n)};
    if (stats_rows > 0 && (plain <= 0 || n == n_rows)) p.scores = stats_scores_.data();
    attend_rows(p);
    if (p.scores) add_stats(stats, p, 1.0f / static_cast<float>(stats_rows));
    row += n;
  }
}

}  // namespace

std::unique_ptr<Attention> make_cpu_attention(ThreadPool& pool) {
  return std::make_unique<CpuAttention>(pool);
}

}  // namespace thaw
