// One lane, worked on by one block: what happens when decoding begins, when the context is cut, and
// what asr does. As in residency_cuda.cuh, every thread calls and sees what was done.
#pragma once

#include "kvstore/residency_cuda.cuh"

namespace thaw {

// Of which bits of a ballot a lane's is, from 0.
__device__ inline int place_in(unsigned bits) { return __popc(bits & ((1u << lane_index()) - 1u)); }

// lane_of_layer: the lane, as `stats` counts.
__device__ inline void LaneBlock::learn(const DeviceStats& stats, int lane_of_layer, int n_rows) {
  const std::int64_t at = static_cast<std::int64_t>(lane_of_layer) * stats.stride;
  const bool sums = accumulates(p_);
  if (threadIdx.x == 0) {
    s_.state.entropy = stats.entropy[lane_of_layer];
    s_.state.spread = attention_spread(s_.state.entropy);
  }
  __syncthreads();  // the spread is there
  for (int t = static_cast<int>(threadIdx.x); t < now_.kv_len; t += kLaneThreads) {
    float& score = *state_of(t).score;
    const float p = stats.probability[at + t];
    score = sums ? accumulated_score(score, p, n_rows) : entropy_score(p, s_.state.spread);
  }
  if (p_.policy == Policy::kAsr) find_tau(stats.relevance + at);
}

__device__ inline void LaneBlock::find_tau(const float* relevance) {
  const int k = quantile_index(p_.quantile, now_.kv_len) + 1;
  const std::uint64_t found = smallest(
      k, now_.kv_len, [](int) { return true; },
      [&](int t) { return in_order(relevance[t]) << 32 | static_cast<std::uint32_t>(t); });
  if (threadIdx.x == 0) s_.state.tau = relevance[found & 0xffffffffu];
}

// The tokens that should be hot as decoding begins, as a mask.
__device__ inline void LaneBlock::choose() {
  const int n = now_.kv_len;
  const bool all = p_.policy == Policy::kAsr || now_.can_freeze == 0, ranked = seeds_by_rank(p_);
  const float least =
      p_.policy == Policy::kThaw ? entropy_score(now_.epsilon, s_.state.spread) : 0.0f;
  const auto first = [&](int t) { return always(t); };
  const auto other = [&](int t) {
    return !always(t) && (all || (ranked && *state_of(t).score >= least));
  };
  const int n_first = count(n, first), n_others = count(n, other);
  const int surplus = max(0, n_others - (bound_ - n_first));
  const std::uint64_t last =
      surplus > 0 ? smallest(surplus, n, other, [&](int t) { return rank_of(t); }) : 0;
  for (int base = warp_index() * kWarp; base < n; base += kLaneThreads) {
    const int t = base + lane_index();
    const bool is_chosen = t < n && (first(t) || (other(t) && rank_of(t) > last));
    const unsigned bits = __ballot_sync(kAllLanes, is_chosen);
    if (lane_index() == 0) chosen_[base / kWarp] = bits;
  }
  if (threadIdx.x == 0) g_.reports[lane_].n_chosen = n_first + n_others - surplus;
}

__device__ inline void LaneBlock::seed() {
  const auto is_chosen = [&](int t) { return (chosen_[t / kWarp] >> t % kWarp & 1u) != 0; };
  mark([&](int row) { return !is_chosen(tokens_[row]); });
  evict_marked();
  if (p_.policy == Policy::kThaw) {
    for (int t = static_cast<int>(threadIdx.x); t < now_.kv_len; t += kLaneThreads) {
      if (always(t) || !is_chosen(t)) continue;
      const TokenState state = state_of(t);
      if (*state.hits == 0) *state.hits = 1;
      *state.timer = static_cast<std::uint16_t>(stay_steps(p_, *state.hits));
    }
  }
  if (warp_index() != 0) return;
  insert_chosen();
  if (p_.policy == Policy::kAsr) sleep_all_frozen();
}

// One warp: a row for each chosen token that has none, ascending.
__device__ inline void LaneBlock::insert_chosen() {
  const int n_words = (now_.kv_len + kWarp - 1) / kWarp;
  int n_rows = s_.n_rows;
  for (int base = 0; base < n_words; base += kWarp) {
    const int word = base + lane_index();
    unsigned bits = word < n_words ? chosen_[word] & ~mask_[word] : 0u;
    if (bits != 0) mask_[word] |= bits;
    int end = __popc(bits);
    for (int step = 1; step < kWarp; step *= 2) {
      const int other = __shfl_up_sync(kAllLanes, end, step);
      if (lane_index() >= step) end += other;
    }
    for (int row = n_rows + end - __popc(bits); bits != 0; bits &= bits - 1, ++row)
      tokens_[row] = word * kWarp + __ffs(static_cast<int>(bits)) - 1, from_[row] = kInCold;
    n_rows += __shfl_sync(kAllLanes, end, kWarp - 1);
  }
  __syncwarp();  // all lanes have read how many there were, and the mask is complete
  if (lane_index() == 0) s_.n_rows = n_rows;
}

// One warp: every token that is not hot sleeps a step, and nobody else.
__device__ inline void LaneBlock::sleep_all_frozen() {
  int n = 0;
  for (int base = 0; base < now_.kv_len; base += kWarp) {
    const int t = base + lane_index();
    const bool frozen = t < now_.kv_len && !is_hot(t);
    const unsigned bits = __ballot_sync(kAllLanes, frozen);
    if (frozen) asleep()[n + place_in(bits)] = {t, 1}, *state_of(t).timer = 1;
    n += __popc(bits);
  }
  if (lane_index() == 0) s_.state.n_asleep = n;
}

// Copies what is only in the cold tier into its row, and opens a row for the newest token, which
// append() writes.
__device__ inline void LaneBlock::place() {
  DeviceRows hot = g_.hot;
  hot.pages += static_cast<std::int64_t>(lane_) * g_.lane_pages;
  mark([&](int row) { return from_[row] == kInCold; });
  each_marked([&](int row) {
    for (int head = 0; head < g_.lane_heads; ++head)
      copy_row(const_cast<std::byte*>(hot.key(head, row)),
               g_.cold.key(lane_ * g_.lane_heads + head, tokens_[row]), g_.cold.value_offset);
    if (lane_index() == 0) from_[row] = row;
  });
  __syncthreads();  // all have read the number of rows
  if (threadIdx.x == 0) insert(now_.kv_len - 1);
}

// Timers fall first; who is at zero is awake again and judged after its next attention. The first
// warp keeps everything in the order in which Residency::settle_asr() goes.
__device__ inline void LaneBlock::settle_asr(const float* relevance) {
  std::int32_t* waking = g_.waking + static_cast<std::int64_t>(lane_) * g_.room;
  if (warp_index() == 0) {
    int n_waking = 0, n_asleep = 0;
    for (int base = 0; base < s_.state.n_asleep; base += kWarp) {
      const int i = base + lane_index();
      const bool exists = i < s_.state.n_asleep;
      Sleeper sleeper = exists ? asleep()[i] : Sleeper{0, 0};
      --sleeper.timer;
      const unsigned wakes = __ballot_sync(kAllLanes, exists && sleeper.timer == 0);
      const unsigned sleeps = __ballot_sync(kAllLanes, exists && sleeper.timer != 0);
      __syncwarp();  // all lanes have read who sleeps here: it can be written over
      if (exists && sleeper.timer == 0) waking[n_waking + place_in(wakes)] = sleeper.token;
      if (exists && sleeper.timer != 0) asleep()[n_asleep + place_in(sleeps)] = sleeper;
      n_waking += __popc(wakes), n_asleep += __popc(sleeps);
    }
    for (int base = 0; base < s_.n_rows; base += kWarp) {
      const int row = base + lane_index();
      int token = 0, steps = 0;
      if (row < s_.n_rows) {
        token = tokens_[row];
        *state_of(token).score = relevance[row];
        steps = asr_sleep(p_, relevance[row], s_.state.tau, always(token), *state_of(token).hits);
      }
      const unsigned bits = __ballot_sync(kAllLanes, steps > 0);
      if (lane_index() == 0) marks_[base / kWarp] = bits;
      if (steps > 0) asleep()[n_asleep + place_in(bits)] = {token, steps};
      if (steps > 0) *state_of(token).timer = static_cast<std::uint16_t>(steps);
      n_asleep += __popc(bits);
    }
    __syncwarp();  // all lanes have read how many sleep
    if (lane_index() == 0) s_.state.n_asleep = n_asleep, s_.n_waking = n_waking;
  }
  remove_marked(true);  // begins with a barrier: marks and sleepers are there
  if (threadIdx.x == 0) {
    for (int i = 0; i < s_.n_waking; ++i) {
      if (insert(waking[i]))
        ++s_.state.tally.thawed;
      else
        fall_asleep(waking[i], 1);
    }
  }
  __syncthreads();  // the woken have rows, where there was room
}

// No row is left of tokens from `position` on.
__device__ inline void LaneBlock::drop(int position) {
  mark([&](int row) { return tokens_[row] >= position; });
  remove_marked(false);
}

__device__ inline void LaneBlock::cut(int position, int length) {
  drop(position);
  for (int t = position + static_cast<int>(threadIdx.x); t < length; t += kLaneThreads) {
    const TokenState state = state_of(t);
    *state.score = 0, *state.stamp = 0, *state.hits = *state.timer = 0;
  }
  if (threadIdx.x == 0) {
    int kept = 0;
    for (int i = 0; i < s_.state.n_asleep; ++i)
      if (asleep()[i].token < position) asleep()[kept++] = asleep()[i];
    s_.state.n_asleep = kept;
    if (position == 0) s_.state.entropy = s_.state.ghost_mass = s_.state.tau = 0;
  }
  make_room(0);  // begins with a barrier: nothing is left of what was cut
  // What is among the newest now, or has no ghost, must be hot.
  bool complete = true;
  const int sinks = min(p_.sinks, position);
  for (int t = 0; t < (now_.can_freeze != 0 ? sinks : position); ++t) thaw_again(t, complete);
  if (now_.can_freeze != 0)
    for (int t = max(first_recent_, sinks); t < position; ++t) thaw_again(t, complete);
  if (threadIdx.x == 0) g_.reports[lane_].complete = complete ? 1 : 0;
}

// complete: of the first thread only.
__device__ inline void LaneBlock::thaw_again(int token, bool& complete) {
  if (is_hot(token)) return;
  if (threadIdx.x == 0) wake(token);
  make_room(1);  // begins with a barrier: all have read the mask
  if (threadIdx.x == 0) {
    const bool fits = insert(token);
    s_.state.tally.thawed += fits ? 1 : 0;
    complete = complete && fits;
  }
  __syncthreads();  // it is hot, if it can be
}

}  // namespace thaw
