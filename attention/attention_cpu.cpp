// Attention on the CPU, one algorithm for prefill and decode: a tile of query rows walks its tokens
// in blocks, keeping a SoftmaxState and an unnormalised output a row (FlashAttention, 2205.14135).
// In decode the tokens are also split into ranges, so that all threads have work, and the partial
// states are merged in order; ranges depend on the shape alone, so the bits do not depend on
// threads.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "attention/attention.h"
#include "attention/softmax_state.h"
#include "device/error.h"
#include "device/fast_math.h"
#include "device/half.h"
#include "device/tile_cpu.h"

namespace thaw {
namespace {

constexpr int kQueryTokens = 16;  // tokens of a query tile; its rows are these times the GQA group
constexpr int kBlock = 128;       // tokens whose keys and values are unpacked at a time
constexpr int kRange = 256;       // tokens of a split in decode
constexpr int kSplitBelow = 16;   // rows below which tokens are split between threads

int round_up(int n, int to) { return (n + to - 1) / to * to; }

// One call of attend().
struct Problem {
  float* o;
  const float* q;
  int n_rows;
  int n_heads;
  KvView kv;
  float* scores;  // n_stats_rows x n_heads x kv_len, or null
  int stats_rows;

  int group() const { return n_heads / kv.n_kv_heads; }
  int width() const { return n_heads * kv.head_dim; }
  int visible(int row) const { return kv.kv_len - n_rows + row + 1; }  // tokens that a row sees
};

// A query tile of one k/v head against a range of tokens: rows are token-major, then head of the
// group.
struct Work {
  int kv_head;
  int first_row, n_tokens;
  int begin, end;  // tokens of the cache

  int rows(int group) const { return n_tokens * group; }
};

// What a thread needs for one Work; kept between calls.
struct Scratch {
  std::vector<float> q, keys, keys_t, values, scores;

  void reserve(int rows, int padded_dim) {
    q.resize(std::max(q.size(), static_cast<std::size_t>(rows * padded_dim)));
    keys.resize(kBlock * padded_dim);
    keys_t.resize(kBlock * padded_dim);
    values.resize(kBlock * padded_dim);
    scores.resize(std::max(scores.size(), static_cast<std::size_t>(rows * kBlock)));
  }
};

void widen(float* out, const std::byte* in, KvType type, int n) {
  switch (type) {
    case KvType::kF16:
      return widen_f16(out, reinterpret_cast<const std::uint16_t*>(in), n);
    case KvType::kBF16:
      return widen_bf16(out, reinterpret_cast<const std::uint16_t*>(in), n);
    case KvType::kF32:
      std::memcpy(out, in, static_cast<std::size_t>(n) * sizeof(float));
  }
}

// keys_t: n_padded / 16 tiles of [dim][16 tokens]; values: [token][dim]. Both padded with zeros.
void unpack_block(Scratch& s, const KvView& kv, int head, int first, int n, int dim) {
  const int n_padded = round_up(n, kTileCols);
  for (int t = 0; t < n_padded; ++t) {
    float* key = s.keys.data() + t * dim;
    float* value = s.values.data() + t * dim;
    const int used = t < n ? kv.head_dim : 0;
    if (t < n) {
      widen(key, kv.key(head, first + t), kv.type, kv.head_dim);
      widen(value, kv.value(head, first + t), kv.type, kv.head_dim);
    }
    std::fill(key + used, key + dim, 0.0f);
    std::fill(value + used, value + dim, 0.0f);
  }
  for (int t = 0; t < n_padded; t += 8) {
    float* tile = s.keys_t.data() + t / kTileCols * kTileCols * dim + t % kTileCols;
    for (int i = 0; i < dim; i += 8)
      transpose_8x8(tile + i * kTileCols, kTileCols, s.keys.data() + t * dim + i, dim);
  }
}

// Adds n scores to a state: scores become e^(s - m), o (dim) is rescaled to the new maximum.
void absorb_scores(SoftmaxState& state, float* o, float* scores, int n, int dim) {
  float m = state.m;
#pragma omp simd reduction(max : m)
  for (int j = 0; j < n; ++j) m = scores[j] > m ? scores[j] : m;
  float l = 0, ps = 0;
#pragma omp simd reduction(+ : l, ps)
  for (int j = 0; j < n; ++j) {
    const float s = scores[j], e = exp_fast(s - m);
    l += e;
    ps += e * s;
    scores[j] = e;
  }
  const float scale = exp_fast(state.m - m);
  state = {m, state.l * scale + l, state.ps * scale + ps};
  if (scale != 1.0f)
    for (int i = 0; i < dim; ++i) o[i] *= scale;
}

// states, o (rows x dim, zeroed): the result of `work`, not yet divided by l.
void attend_range(SoftmaxState* states, float* o, const Problem& p, const Work& work, Scratch& s,
                  int dim) {
  const int group = p.group(), rows = work.rows(group), head_dim = p.kv.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(head_dim));
  for (int r = 0; r < rows; ++r) {
    const float* from = p.q + std::int64_t{work.first_row + r / group} * p.width() +
                        (work.kv_head * group + r % group) * head_dim;
    for (int i = 0; i < dim; ++i) s.q[r * dim + i] = i < head_dim ? from[i] * scale : 0.0f;
  }
  for (int first = work.begin; first < work.end; first += kBlock) {
    const int n = std::min(kBlock, work.end - first), n_padded = round_up(n, kTileCols);
    unpack_block(s, p.kv, work.kv_head, first, n, dim);
    std::fill_n(s.scores.data(), rows * kBlock, 0.0f);
    for (int t = 0; t < n_padded; t += kTileCols)
      tile_multiply(s.scores.data() + t, kBlock, s.q.data(), dim, rows, s.keys_t.data() + t * dim,
                    kTileCols, dim);
    for (int r = 0; r < rows; ++r) {
      float* scores = s.scores.data() + r * kBlock;
      const int row = work.first_row + r / group, seen = std::clamp(p.visible(row) - first, 0, n);
      const int stats_row = row - (p.n_rows - p.stats_rows);
      if (p.scores && stats_row >= 0)
        std::copy_n(scores, seen,
                    p.scores +
                        (std::int64_t{stats_row} * p.n_heads + work.kv_head * group + r % group) *
                            p.kv.kv_len +
                        first);
      if (seen > 0) absorb_scores(states[r], o + r * dim, scores, seen, dim);
      std::fill(scores + seen, scores + n_padded, 0.0f);
    }
    for (int i = 0; i < dim; i += kTileCols)
      tile_multiply(o + i, dim, s.scores.data(), kBlock, rows, s.values.data() + i, dim, n);
  }
}

class CpuAttention final : public Attention {
 public:
  explicit CpuAttention(ThreadPool& pool) : pool_(pool), scratch_(pool.size()) {}

  void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
              AttentionStats* stats, int stats_rows) override;

 private:
  void plan(const Problem& p);
  void finish(const Problem& p, int dim);
  void fill_stats(AttentionStats& stats, const Problem& p);

  ThreadPool& pool_;
  std::vector<Scratch> scratch_;      // one a thread
  std::vector<Work> work_;            // ranges of one query tile are neighbours, in order
  int max_rows_ = 0;                  // most rows of one Work
  std::vector<SoftmaxState> states_;  // work x max_rows
  std::vector<float> outputs_;        // work x max_rows x padded dim
  std::vector<SoftmaxState> final_;   // n_rows x n_heads
  std::vector<float> stats_scores_;
};

void CpuAttention::plan(const Problem& p) {
  work_.clear();
  const int range = p.n_rows < kSplitBelow ? kRange : p.kv.kv_len;
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

// Merges the ranges of each query tile, divides by l, and writes o.
void CpuAttention::finish(const Problem& p, int dim) {
  const int group = p.group(), head_dim = p.kv.head_dim;
  final_.resize(static_cast<std::size_t>(p.n_rows) * p.n_heads);
  for (std::size_t i = 0; i < work_.size();) {
    const Work& work = work_[i];
    std::size_t next = i + 1;
    while (next < work_.size() && work_[next].begin > work.begin) ++next;
    for (int r = 0; r < work.rows(group); ++r) {
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

void CpuAttention::fill_stats(AttentionStats& stats, const Problem& p) {
  const int kv_len = p.kv.kv_len;
  stats.probability.assign(kv_len, 0.0f);
  stats.entropy.assign(p.stats_rows, 0.0f);
  const float share = 1.0f / static_cast<float>(p.n_heads);
  for (int i = 0; i < p.stats_rows; ++i) {
    const int row = p.n_rows - p.stats_rows + i;
    for (int head = 0; head < p.n_heads; ++head) {
      const SoftmaxState& state = final_[static_cast<std::size_t>(row) * p.n_heads + head];
      const float* scores = p.scores + (std::int64_t{i} * p.n_heads + head) * kv_len;
      const float weight = share / static_cast<float>(p.stats_rows) / state.l;
      float* probability = stats.probability.data();
      for (int j = 0; j < p.visible(row); ++j)
        probability[j] += weight * exp_fast(scores[j] - state.m);
      stats.entropy[i] += share * state.entropy();
    }
  }
}

void CpuAttention::attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
                          AttentionStats* stats, int stats_rows) {
  require(n_rows >= 1 && n_rows <= kv.kv_len, "attend: rows: expected 1 to kv_len = ", kv.kv_len,
          ", found ", n_rows);
  require(kv.n_kv_heads > 0 && n_heads % kv.n_kv_heads == 0,
          "attend: n_heads: expected a multiple of ", kv.n_kv_heads, ", found ", n_heads);
  require(!stats || (stats_rows >= 1 && stats_rows <= n_rows), "attend: stats_rows: expected 1 to ",
          n_rows, ", found ", stats_rows);
  Problem p{o, q, n_rows, n_heads, kv, nullptr, stats_rows};
  if (stats) {
    stats_scores_.resize(static_cast<std::size_t>(stats_rows) * n_heads * kv.kv_len);
    p.scores = stats_scores_.data();
  }
  plan(p);
  const int dim = round_up(kv.head_dim, kTileCols);
  states_.assign(work_.size() * max_rows_, {});
  outputs_.assign(work_.size() * max_rows_ * dim, 0.0f);
  for (Scratch& s : scratch_) s.reserve(max_rows_, dim);
  pool_.run(static_cast<std::int64_t>(work_.size()), [&](std::int64_t i, int thread) {
    attend_range(&states_[i * max_rows_], &outputs_[i * max_rows_ * dim], p, work_[i],
                 scratch_[thread], dim);
  });
  finish(p, dim);
  if (stats) fill_stats(*stats, p);
}

}  // namespace

std::unique_ptr<Attention> make_cpu_attention(ThreadPool& pool) {
  return std::make_unique<CpuAttention>(pool);
}

}  // namespace thaw
