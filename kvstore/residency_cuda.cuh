// One lane, worked on by one block: what the kernels of residency_cuda.cu are made of. Unless it
// says otherwise, every thread of the block calls, and when a function returns every thread sees
// what it did.
#pragma once

#include "device/kernel.cuh"
#include "kvstore/residency_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {

inline constexpr int kLaneThreads = 256;  // a row each: what they wait for is a chain of loads
inline constexpr int kDigits = 256;       // of a byte

struct LaneShared {
  LaneState state;
  int n_rows;
  int timer;          // promote(): of the recalled token
  int n_waking;       // settle_asr()
  int digit, before;  // smallest(): the byte found, and how many keys are below it
  int counts[kDigits];
};

class LaneBlock {
 public:
  // marks: shared, a bit a row of lanes.room.
  __device__ LaneBlock(const DeviceLanes& lanes, int lane, const DeviceMoment& now, int bound,
                       LaneShared& shared, std::uint32_t* marks)
      : g_(lanes),
        p_(lanes.params),
        lane_(lane),
        now_(now),
        bound_(bound),
        first_recent_(first_recent(lanes.params, now.kv_len, bound)),
        s_(shared),
        marks_(marks),
        tokens_(lanes.tokens + static_cast<std::int64_t>(lane) * lanes.room),
        from_(lanes.from + static_cast<std::int64_t>(lane) * lanes.room),
        mask_(lanes.mask + static_cast<std::int64_t>(lane) * lanes.mask_words),
        chosen_(lanes.chosen + static_cast<std::int64_t>(lane) * lanes.mask_words) {
    if (threadIdx.x == 0) s_.state = g_.states[lane], s_.n_rows = g_.n_rows[lane];
    __syncthreads();  // the state is there
  }

  __device__ void learn(const DeviceStats& stats, int lane_of_layer, int n_rows);
  __device__ void choose();
  __device__ void seed();
  __device__ void make_room(int incoming);
  __device__ void place();
  __device__ void settle();
  __device__ void drop(int position);
  __device__ void cut(int position, int length);
  __device__ void choose_woken(Rung rung);
  __device__ void wake_chosen();
  __device__ void forget();
  // Moves rows to where they belong, and stores the state; store() where no row has changed.
  __device__ void finish();
  __device__ void store();

 private:
  struct TokenState {
    float* score;
    std::int32_t* stamp;
    std::uint16_t *hits, *timer;
  };
  // A page has, lane by lane, the scores of its tokens, then their stamps, hits and timers.
  __device__ TokenState state_of(int token) const {
    auto* page = const_cast<std::byte*>(g_.token_pages[token / kTierTokens]) +
                 static_cast<std::size_t>(lane_) * kTierTokens * kTokenStateBytes;
    auto* scores = reinterpret_cast<float*>(page);
    auto* stamps = reinterpret_cast<std::int32_t*>(scores + kTierTokens);
    auto* hits = reinterpret_cast<std::uint16_t*>(stamps + kTierTokens);
    const int i = token % kTierTokens;
    return {scores + i, stamps + i, hits + i, hits + kTierTokens + i};
  }
  __device__ bool always(int token) const { return token < p_.sinks || token >= first_recent_; }
  __device__ bool is_hot(int token) const { return (mask_[token / 32] >> token % 32 & 1u) != 0; }
  __device__ std::uint64_t rank_of(int token) const {
    return in_order(*state_of(token).score) << 32 | static_cast<std::uint32_t>(token);
  }
  __device__ Sleeper* asleep() const {
    return g_.asleep + static_cast<std::int64_t>(lane_) * g_.room;
  }

  // How many of i in [0, n) hold.
  template <class Holds>
  __device__ int count(int n, const Holds& holds) const {
    int total = 0;
    for (int base = 0; base < n; base += kLaneThreads) {
      const int i = base + static_cast<int>(threadIdx.x);
      total += __syncthreads_count(i < n && holds(i));  // every thread adds the same
    }
    return total;
  }

  // Marks the rows that hold; asks once a row.
  template <class Holds>
  __device__ void mark(const Holds& holds) {
    const int n = s_.n_rows;
    for (int base = 0; base < n; base += kLaneThreads) {
      const int row = base + static_cast<int>(threadIdx.x);
      const unsigned bits = __ballot_sync(kAllLanes, row < n && holds(row));
      if (lane_index() == 0 && row < n) marks_[row / kWarp] = bits;
    }
    __syncthreads();  // all marks are there
  }

  // body(row) for every marked row, by warps in turns.
  template <class Body>
  __device__ void each_marked(const Body& body) const {
    int turn = 0;
    for (int word = 0; word * kWarp < s_.n_rows; ++word)
      for (unsigned bits = marks_[word]; bits != 0; bits &= bits - 1, ++turn)
        if (turn % (kLaneThreads / kWarp) == warp_index())
          body(word * kWarp + __ffs(static_cast<int>(bits)) - 1);
  }

  template <class Has, class Key>
  __device__ std::uint64_t smallest(int k, int n, const Has& has, const Key& key);

  // One thread calls these.
  __device__ void remove(int row);
  __device__ void freeze(int row);
  __device__ bool insert(int token);
  __device__ void fall_asleep(int token, int steps);
  __device__ void wake(int token);

  __device__ void remove_marked(bool frozen);
  __device__ void evict_marked();
  __device__ void promote(int token, float probability);
  __device__ void settle_thaw(const float* probability);
  __device__ void settle_asr(const float* relevance);
  __device__ void insert_chosen();
  __device__ void sleep_all_frozen();
  __device__ void find_tau(const float* relevance);
  __device__ void thaw_again(int token, bool& complete);
  __device__ void copy_row(std::byte* key, const std::byte* from_key, std::size_t value_offset);

  const DeviceLanes& g_;
  const PolicyParams& p_;
  const int lane_;
  const DeviceMoment now_;
  const int bound_, first_recent_;
  LaneShared& s_;
  std::uint32_t* marks_;
  std::int32_t *tokens_, *from_;
  std::uint32_t *mask_, *chosen_;
};

// The k-th smallest (from 1) of the keys of those i in [0, n) that have one; keys differ, and there
// are at least k. Byte by byte, the highest first: how many keys with the bytes found so far have
// which next byte.
template <class Has, class Key>
__device__ std::uint64_t LaneBlock::smallest(int k, int n, const Has& has, const Key& key) {
  std::uint64_t found = 0;
  for (int shift = 56; shift >= 0; shift -= 8) {
    for (int i = static_cast<int>(threadIdx.x); i < kDigits; i += kLaneThreads) s_.counts[i] = 0;
    __syncthreads();  // counts are 0
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kLaneThreads) {
      if (!has(i)) continue;
      const std::uint64_t x = key(i);
      if (shift == 56 || x >> (shift + 8) == found >> (shift + 8))
        atomicAdd(&s_.counts[x >> shift & 0xff], 1);
    }
    __syncthreads();  // all are counted
    if (warp_index() == 0) {
      constexpr int kEach = kDigits / kWarp;
      const int first = lane_index() * kEach;
      int sum = 0;
      for (int i = 0; i < kEach; ++i) sum += s_.counts[first + i];
      int end = sum;  // of this lane's digits: keys up to them
      for (int step = 1; step < kWarp; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, end, step);
        if (lane_index() >= step) end += other;
      }
      int before = end - sum;
      if (before < k && k <= end) {
        int digit = first;
        while (before + s_.counts[digit] < k) before += s_.counts[digit++];
        s_.digit = digit, s_.before = before;
      }
    }
    __syncthreads();  // the byte is found
    found |= static_cast<std::uint64_t>(s_.digit) << shift;
    k -= s_.before;
  }
  return found;
}

// The last row moves into the gap, as in Lane::freeze().
__device__ inline void LaneBlock::remove(int row) {
  const int last = --s_.n_rows, token = tokens_[row];
  mask_[token / 32] &= ~(1u << token % 32);
  tokens_[row] = tokens_[last], from_[row] = from_[last];
}

__device__ inline void LaneBlock::freeze(int row) {
  *state_of(tokens_[row]).stamp = now_.step + 1;
  ++s_.state.tally.frozen;
  remove(row);
}

__device__ inline bool LaneBlock::insert(int token) {
  if (s_.n_rows >= min(bound_, g_.room)) return false;
  tokens_[s_.n_rows] = token, from_[s_.n_rows] = kInCold;
  mask_[token / 32] |= 1u << token % 32;
  ++s_.n_rows;
  return true;
}

__device__ inline void LaneBlock::fall_asleep(int token, int steps) {
  asleep()[s_.state.n_asleep++] = {token, steps};
  *state_of(token).timer = static_cast<std::uint16_t>(steps);
}

// Is no longer asleep; the others keep their order.
__device__ inline void LaneBlock::wake(int token) {
  if (p_.policy != Policy::kAsr) return;
  int kept = 0;
  for (int i = 0; i < s_.state.n_asleep; ++i)
    if (asleep()[i].token != token) asleep()[kept++] = asleep()[i];
  s_.state.n_asleep = kept;
}

// From the last on, which leaves the rows before it in place. frozen: not forgotten.
__device__ inline void LaneBlock::remove_marked(bool frozen) {
  const int n_words = (s_.n_rows + kWarp - 1) / kWarp;
  __syncthreads();  // all have read n_rows
  if (threadIdx.x == 0) {
    for (int word = n_words; word-- > 0;) {
      for (unsigned bits = marks_[word]; bits != 0;) {
        const int bit = kWarp - 1 - __clz(static_cast<int>(bits));
        bits &= ~(1u << bit);
        if (frozen)
          freeze(word * kWarp + bit);
        else
          remove(word * kWarp + bit);
      }
    }
  }
  __syncthreads();  // they are gone
}

// For want of room: a sleeper of asr is judged again as soon as there is some.
__device__ inline void LaneBlock::evict_marked() {
  const int n = s_.n_rows;
  for (int row = static_cast<int>(threadIdx.x); row < n; row += kLaneThreads)
    if ((marks_[row / kWarp] >> row % kWarp & 1u) != 0) *state_of(tokens_[row]).timer = 0;
  __syncthreads();  // timers are 0
  if (p_.policy == Policy::kAsr && threadIdx.x == 0)
    for (int row = 0; row < n; ++row)
      if ((marks_[row / kWarp] >> row % kWarp & 1u) != 0) fall_asleep(tokens_[row], 1);
  remove_marked(true);
}

__device__ inline void LaneBlock::make_room(int incoming) {
  const int n = s_.n_rows, excess = n + incoming - bound_;
  __syncthreads();  // all have read the number of rows
  if (excess <= 0) return;
  const auto may_go = [&](int row) { return !always(tokens_[row]); };
  const auto rank = [&](int row) { return rank_of(tokens_[row]); };
  const int leaving = min(count(n, may_go), excess);
  if (leaving == 0) return;
  const std::uint64_t last = smallest(leaving, n, may_go, rank);
  mark([&](int row) { return may_go(row) && rank(row) <= last; });
  evict_marked();
}

__device__ inline void LaneBlock::settle() {
  const int n = s_.n_rows, n_recalled = g_.stats.n_recalled ? g_.stats.n_recalled[lane_] : 0;
  const std::int64_t at = static_cast<std::int64_t>(lane_) * g_.stats.stride;
  if (threadIdx.x == 0) {
    s_.state.entropy = g_.stats.entropy[lane_];
    s_.state.spread = attention_spread(s_.state.entropy);
    s_.state.ghost_mass = g_.stats.ghost_mass[lane_];
  }
  __syncthreads();  // the spread is there
  if (p_.policy == Policy::kThaw) {
    settle_thaw(g_.stats.probability + at);
  } else if (p_.policy == Policy::kAsr) {
    settle_asr(g_.stats.relevance + at);
  } else {
    for (int row = static_cast<int>(threadIdx.x); row < n; row += kLaneThreads)
      *state_of(tokens_[row]).score += g_.stats.probability[at + row];
  }
  make_room(0);  // begins with a barrier: scores are accumulated
  if (threadIdx.x != 0) return;
  LaneReport& report = g_.reports[lane_];
  report.n_attended = n, report.n_recalled = n_recalled;
}

__device__ inline void LaneBlock::settle_thaw(const float* probability) {
  mark([&](int row) {
    const TokenState state = state_of(tokens_[row]);
    *state.score = entropy_score(probability[row], s_.state.spread);
    const bool stays = thaw_stays(p_, probability[row], now_.epsilon, always(tokens_[row]),
                                  *state.hits, *state.timer);
    return !stays && now_.can_freeze != 0;
  });
  remove_marked(true);
  if (g_.stats.n_recalled == nullptr) return;
  const std::int64_t first = static_cast<std::int64_t>(lane_) * g_.stats.recalled_room;
  const int n = min(g_.stats.n_recalled[lane_], g_.stats.recalled_room);
  for (int i = 0; i < n; ++i)
    promote(g_.stats.recalled[first + i], g_.stats.recalled_probability[first + i]);
}

// A recalled token becomes hot if its timer says so; when room is short, in place of the lowest
// ranked token if that ranks below it.
__device__ inline void LaneBlock::promote(int token, float probability) {
  const TokenState state = state_of(token);
  if (threadIdx.x == 0) {
    thaw_stays(p_, probability, now_.epsilon, false, *state.hits, *state.timer);
    *state.score = entropy_score(probability, s_.state.spread);
    s_.timer = *state.timer;
  }
  __syncthreads();  // its timer and its score are there
  const int n = s_.n_rows;
  if (s_.timer > 0 && n >= bound_) {
    const auto below = [&](int row) {
      return !always(tokens_[row]) && *state_of(tokens_[row]).score < *state.score;
    };
    if (count(n, below) > 0) {
      const std::uint64_t lowest = smallest(1, n, below, [&](int row) {
        return in_order(*state_of(tokens_[row]).score) << 32 | static_cast<std::uint32_t>(row);
      });
      if (threadIdx.x == 0) {
        const int row = static_cast<int>(lowest & 0xffffffffu);
        *state_of(tokens_[row]).timer = 0;
        freeze(row);
      }
    }
  }
  __syncthreads();  // there is room, if there can be
  if (threadIdx.x == 0) {
    if (*state.timer > 0 && insert(token))
      ++s_.state.tally.promoted;
    else
      *state.timer = 0;
  }
  __syncthreads();  // the token is hot, or is not
}

// Rows whose copy is in another row are copied from there: sources lie above the rows that are
// left, or were left by another, so no row is read after it is written.
__device__ inline void LaneBlock::finish() {
  DeviceRows hot = g_.hot;
  hot.pages += static_cast<std::int64_t>(lane_) * g_.lane_pages;
  __syncthreads();  // rows and state are decided
  mark([&](int row) { return from_[row] != kInCold && from_[row] != row; });
  each_marked([&](int row) {
    const int from = from_[row];
    __syncwarp();  // all lanes have read where it is, which lane 0 will change
    for (int head = 0; head < g_.lane_heads; ++head)
      copy_row(const_cast<std::byte*>(hot.key(head, row)), hot.key(head, from), g_.kv_row);
    if (lane_index() == 0) from_[row] = row;
  });
  store();
}

// The first thread has decided all that it stores.
__device__ inline void LaneBlock::store() {
  if (threadIdx.x != 0) return;
  g_.states[lane_] = s_.state, g_.n_rows[lane_] = s_.n_rows;
  LaneReport& report = g_.reports[lane_];
  report.n_rows = s_.n_rows, report.tally = s_.state.tally;
  report.entropy = s_.state.entropy, report.ghost_mass = s_.state.ghost_mass;
  report.tau = s_.state.tau;
}

// A warp copies a key, and the value behind it, in pieces as large as both addresses allow.
__device__ inline void LaneBlock::copy_row(std::byte* key, const std::byte* from_key,
                                           std::size_t value_offset) {
  for (int i = 0; i < 2; ++i) {
    std::byte* to = key + static_cast<std::size_t>(i) * g_.kv_row;
    const std::byte* from = from_key + static_cast<std::size_t>(i) * value_offset;
    const std::size_t together =
        reinterpret_cast<std::uintptr_t>(to) | reinterpret_cast<std::uintptr_t>(from) | g_.kv_row;
    const auto lane = static_cast<std::size_t>(lane_index());
    if (together % 16 == 0) {
      for (std::size_t at = 16 * lane; at < g_.kv_row; at += 16 * kWarp)
        store_16(to + at, load_16(from + at));
    } else {  // blocks of q8_0 and q4_0 stand at multiples of 2
      for (std::size_t at = 2 * lane; at < g_.kv_row; at += 2 * kWarp)
        *reinterpret_cast<std::uint16_t*>(to + at) =
            *reinterpret_cast<const std::uint16_t*>(from + at);
    }
  }
}

}  // namespace thaw
