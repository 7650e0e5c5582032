// RoPE turns keys by their position, and so the mean of a head's keys, too: in SmolLM2 the keys of
// a head lie around a centre that is one vector before RoPE, and turns with the token after it.
// Ghosts are relative to the turned centre, which leaves a third of the energy that a fixed centre
// leaves, and so a third of the error (docs/kvstore.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "device/host_device.h"

namespace thaw {

struct GhostQuery;

// How keys were turned before they were appended (RoFormer, 2104.09864, eq. 34).
struct KvRope {
  std::vector<float> inverse_frequencies;  // of each pair, head_dim / 2; empty: keys do not turn
  bool interleaved = false;  // pair i: elements 2i and 2i + 1; otherwise i and i + head_dim / 2
};

// Tables for the angles of a span of tokens, shared by all heads and layers. Pairs that turn little
// within a span (most do) are a cubic of the place in it, all of them together.
class GhostRope {
 public:
  static constexpr int kSpan = 128;  // tokens; four groups of ghosts

  GhostRope(const KvRope& rope, int head_dim);

  void grow(int n_tokens);  // the other calls take tokens below n_tokens
  // out (head_dim) = x turned from position 0 to that of `token`, and back.
  void turn(float* out, const float* x, int token) const;
  void turn_back(float* out, const float* x, int token) const;

  // Sets what score_centre() takes of a query (head_dim) and of its head's centre at position 0.
  void prepare(GhostQuery& query, const float* q, const float* centre) const;
  // scores[h * stride + j] = q_h . turn(centre, kSpan first_span + j) for h < n_queries and
  // j < kSpan n_spans; off by at most 6e-4 of the part of |q_h| |centre| in pairs that turn little.
  void score_centre(float* scores, std::size_t stride, const GhostQuery* queries, int n_queries,
                    int first_span, int n_spans) const;
  std::int64_t bytes() const;

  struct Pair {
    int first, second;  // elements of a head
    double frequency;
  };
  // What all this is computed from, for those that compute it elsewhere; see the members below.
  struct Tables {
    int n_fast;
    std::span<const Pair> pairs;
    std::span<const float> middle, within, cubic, rows;
  };
  Tables tables() const { return {n_fast_, pairs_, middle_, within_, cubic_, rows_}; }

 private:
  void turn_query(float* row, const GhostQuery& query, int span) const;
  void add_angles(std::vector<float>& out, double tokens) const;
  void turn_by(float* out, const float* x, int token, float direction) const;
  int n_pairs() const { return static_cast<int>(pairs_.size()); }
  int n_rows() const { return 2 * n_fast_ + 4; }

  std::vector<Pair> pairs_;  // fast ones first
  int n_fast_ = 0;
  std::vector<float> cubic_;   // {1, theta, theta^2 / 2, theta^3 / 6} x pair; 0 for fast ones
  std::vector<float> within_;  // angles from the middle of a span to each of its places
  // What score_centre() multiplies, n_rows x kSpan: cosines of fast pairs, powers 0 and 2 of the
  // place from the middle; sines, powers 1 and 3.
  std::vector<float> rows_;
  std::vector<float> middle_;  // angles at the middle of each span
  int n_spans_ = 0;
};

// GhostRope::Tables::rows as kernels multiply it on tensor cores: f16 numbers, n_rows() x kStride,
// and behind them what is left of each, also as f16. Row 2 i is the cosine of fast pair i, 2 i + 1
// its sine; then come the powers 0 to 3 of the place, divided by power_scale() so that none is
// above 1, and rows of zeros. Of 16 places those at even ones come first.
struct SplitRope {
  // From a row to the next: eight rows meet no bank of shared memory twice.
  static constexpr int kStride = GhostRope::kSpan + 8;

  THAW_HOST_DEVICE static int n_rows(int n_fast) {  // as whole steps of a product
    return (2 * n_fast + 4 + 15) / 16 * 16;
  }
  THAW_HOST_DEVICE static float power_scale(int power) {
    return static_cast<float>(1 << 6 * power);
  }
  static std::vector<std::uint16_t> of(const GhostRope::Tables& tables);
};

}  // namespace thaw
