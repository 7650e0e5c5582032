// One lane, worked on by one block: recovery. As in residency_cuda.cuh, every thread calls and sees
// what was done.
#pragma once

#include "kvstore/residency_cuda.cuh"

namespace thaw {

// Frozen tokens that the rung would wake, as a mask, and how many rows there are when those that
// fit are awake.
__device__ inline void LaneBlock::choose_woken(Rung rung) {
  const int n = now_.kv_len, n_asleep = s_.state.n_asleep;
  const auto may_wake = [&](int i) { return asleep()[i].timer > 1; };
  const auto is_recent = [&](int t) {
    return rung == Rung::kWindow && !is_hot(t) && froze_recently(*state_of(t).stamp, now_.step);
  };
  for (int base = warp_index() * kWarp; base < n; base += kLaneThreads) {
    const int t = base + lane_index();
    const unsigned bits = __ballot_sync(kAllLanes, t < n && is_recent(t));
    if (lane_index() == 0) chosen_[base / kWarp] = bits;
  }
  __syncthreads();  // marks are those of recent tokens, and sleepers can be added
  if (rung == Rung::kSoft)
    for (int i = static_cast<int>(threadIdx.x); i < n_asleep; i += kLaneThreads)
      if (may_wake(i))
        atomicOr(&chosen_[asleep()[i].token / kWarp], 1u << asleep()[i].token % kWarp);
  const int n_chosen = rung == Rung::kSoft ? count(n_asleep, may_wake) : count(n, is_recent);
  if (threadIdx.x == 0)
    g_.reports[lane_].n_chosen = s_.n_rows + max(0, min(n_chosen, bound_ - s_.n_rows));
}

// The newest first, as long as there is room. Ends without a barrier: finish() begins with one.
__device__ inline void LaneBlock::wake_chosen() {
  if (threadIdx.x == 0) {
    int room = bound_ - s_.n_rows;
    for (int word = (now_.kv_len + kWarp - 1) / kWarp; room > 0 && word-- > 0;) {
      for (unsigned bits = chosen_[word]; room > 0 && bits != 0; --room) {
        const int bit = kWarp - 1 - __clz(static_cast<int>(bits)), token = word * kWarp + bit;
        bits &= ~(1u << bit);
        insert(token);
        ++s_.state.tally.thawed;
        const TokenState state = state_of(token);
        if (p_.policy == Policy::kThaw)
          *state.timer = static_cast<std::uint16_t>(max(1, stay_steps(p_, *state.hits)));
      }
    }
    int kept = 0;
    for (int i = 0; i < s_.state.n_asleep; ++i)
      if (!is_hot(asleep()[i].token)) asleep()[kept++] = asleep()[i];
    s_.state.n_asleep = kept;
  }
}

__device__ inline void LaneBlock::forget() {
  for (int t = static_cast<int>(threadIdx.x); t < now_.kv_len; t += kLaneThreads) {
    const TokenState state = state_of(t);
    *state.hits = *state.timer = 0;
  }
  for (int i = static_cast<int>(threadIdx.x); i < s_.state.n_asleep; i += kLaneThreads)
    asleep()[i].timer = 1;
}

}  // namespace thaw
