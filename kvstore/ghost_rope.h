// RoPE turns keys by their position, and so the mean of a head's keys, too: in SmolLM2 the keys of
// a head lie around a centre that is one vector before RoPE, and turns with the token after it.
// Ghosts are relative to the turned centre, which leaves a third of the energy that a fixed centre
// leaves, and so a third of the error (docs/kvstore.md).
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace thaw {

struct GhostQuery;

// How keys were turned before they were appended (RoFormer, 2104.09864, eq. 34).
struct KvRope {
  std::vector<float> inverse_frequencies;  // of each pair, head_dim / 2; empty: keys do not turn
  bool interleaved = false;  // pair i: elements 2i and 2i + 1; otherwise i and i + head_dim / 2
};

// Tables for the angles of a group's 32 tokens, shared by all heads and layers. Pairs that turn
// little within a group (most do) are a cubic of the place in it, all of them together.
class GhostRope {
 public:
  GhostRope(const KvRope& rope, int head_dim);

  void grow(int n_tokens);  // the other calls take tokens below n_tokens
  // out (head_dim) = x turned from position 0 to that of `token`, and back.
  void turn(float* out, const float* x, int token) const;
  void turn_back(float* out, const float* x, int token) const;

  // Sets what score_centre() takes of a query (head_dim) and of its head's centre at position 0.
  void prepare(GhostQuery& query, const float* q, const float* centre) const;
  // scores[h * stride + j] = q_h . turn(centre, 32 group + j) for 32 tokens, h < n_queries.
  void score_centre(float* scores, std::size_t stride, const GhostQuery* queries, int n_queries,
                    int group) const;
  std::int64_t bytes() const;

 private:
  struct Pair {
    int first, second;  // elements of a head
    double frequency;
  };
  void turn_by(float* out, const float* x, int token, float direction) const;
  int n_pairs() const { return static_cast<int>(pairs_.size()); }
  int n_rows() const { return 2 * n_fast_ + 4; }

  std::vector<Pair> pairs_;  // fast ones first
  int n_fast_ = 0;
  std::vector<float> cubic_;   // per pair: theta, theta^2 / 2, theta^3 / 6
  std::vector<float> within_;  // cos and sin of each pair at 32 places in a group: pair x {cos,
                               // sin} x 32
  std::vector<float> rows_;    // what score_centre() multiplies: n_rows x 32
  std::vector<float> middle_;  // cos, then sin, of each pair at the middle of each group
};

}  // namespace thaw
