// Whether a store in device memory keeps its invariants (docs/kvstore.md lists them), by copies of
// what it has. Everything here throws Error that names the first one broken.
#pragma once

#include "kvstore/lanes_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {

// What a lane should be like.
struct LaneFacts {
  const PolicyParams& params;
  int layer, first_head, n_heads;
  int kv_len, bound;
  bool can_freeze;
  std::size_t kv_row;  // bytes of a key
  KvRows cold;
};

void check_lane(const LaneSnapshot& lane, const LaneFacts& facts);

// Ghosts against what the CPU makes of the same keys and values.
class GhostCheck {
 public:
  GhostCheck(const KvShape& shape, const GhostFormat& format, int centre_tokens);

  void cut(int position) { host_.cut(position); }
  // Tokens [first, last) of a layer whose exact rows are `cold`, on the host.
  void check(int layer, const KvRows& cold, const DeviceGhosts& ghosts, int first, int last,
             const Stream& stream) const;

 private:
  std::unique_ptr<PageSource> memory_;
  mutable GhostTier host_;
};

}  // namespace thaw
