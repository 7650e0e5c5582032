// What the options promise: how many tokens may be hot, by layer and length of context, in which
// lanes, and with what ghosts.
#pragma once

#include <cstdint>
#include <vector>

#include "kvstore/kvstore.h"

namespace thaw {

class KvBounds {
 public:
  // Throws Error when less is promised than what is always hot. Keeps references.
  KvBounds(const KvShape& shape, const KvOptions& options);

  int least() const { return params().sinks + params().window + 1; }  // that a layer needs
  // All tokens are hot until there are ghosts, so no more can be asked for than the promise holds.
  int centre_tokens() const;
  bool has_ghosts() const;
  // KvOptions::freeze_from, or less: no more tokens than the promise holds. full: never.
  int freeze_from() const;
  bool freezes_at(int kv_len) const { return kv_len >= freeze_from(); }
  GhostFormat ghost_format() const;  // not present() where frozen tokens are mute
  int lane_heads() const;            // k/v heads that freeze and thaw together
  std::int64_t most_pages() const;   // of the hot rows of all lanes
  // Most hot tokens of a layer, mean over layers, for a context of kv_len.
  double promised(int kv_len) const;
  // Most hot tokens of a lane.
  int bound(int layer, int kv_len) const;
  // budget: divides the total by the entropy of each layer's attention in batches, mean over their
  // rows (also of those that were taken back), as learn() was told it between forget() and adopt().
  void learn(int layer, float entropy, int n_rows);
  void adopt();
  void forget();
  void share(int kv_len);

 private:
  const PolicyParams& params() const { return options_.policy; }
  std::int64_t rows_in_bytes() const;
  int promised_at_most(std::int64_t n) const;
  void check() const;

  const KvShape& shape_;
  const KvOptions& options_;
  struct Share {
    double sum = 0, rows = 0;  // of entropies over rows
    float entropy = 1;         // that is adopted
    int bound = 0;             // most hot tokens
  };
  std::vector<Share> shares_;  // budget: of each layer
};

}  // namespace thaw
