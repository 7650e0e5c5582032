// Who is hot in each lane, decided on the device: Residency (kvstore/residency.h) as kernels, one
// block a lane, with the same functions of kvstore/policy.h on the same numbers in the same order.
// So the hot tokens, their rows, hits and timers are those of the CPU, bit for bit.
//
// What a step decides about memory is only who has which row: rows move within a lane at once, and
// tokens that become hot are copied from the cold tier by place_rows, when the host has given the
// lane its pages. So nothing that a kernel decides depends on memory, and the host is asked for
// some only between steps.
#pragma once

#include "device/cuda.h"
#include "kvstore/device_view.h"
#include "kvstore/policy.h"
#include "kvstore/step_cuda.h"

namespace thaw {

// Residency::Tally, of all that ever happened: the host takes differences, which may wrap around.
struct LaneTally {
  std::uint32_t promoted, thawed, frozen;
};

// What a lane tells the host, in pinned memory.
struct LaneReport {
  std::int32_t n_rows;                  // hot now
  std::int32_t n_attended, n_recalled;  // of the last settle: hot rows that were read, recalled
  LaneTally tally;
  std::int32_t n_chosen;  // rows that there will be: choose_rows, choose_woken
  std::int32_t complete;  // cut_lanes: every token that must be hot is
  float entropy, ghost_mass, tau;
};

// Of one lane, what is not by token or row.
struct LaneState {
  float entropy, spread, ghost_mass, tau;
  LaneTally tally;
  std::int32_t n_asleep;
};

struct Sleeper {  // asr
  std::int32_t token, timer;
};

// A row's key and value stand in this hot row, or, when it is kInCold, only in the cold tier.
inline constexpr std::int32_t kInCold = -1;

// Every lane of every layer; layer l has lanes l * lanes_per_layer and on.
struct DeviceLanes {
  PolicyParams params;
  int lanes_per_layer, lane_heads;
  int room;                             // rows from a lane to the next; a multiple of 32
  int mask_words;                       // words from a lane to the next
  std::size_t kv_row;                   // bytes of a key of one head
  DeviceRows hot;                       // of lane 0
  int lane_pages;                       // entries of hot.pages from a lane to the next
  DeviceRows cold;                      // of layer 0
  std::int32_t* n_rows;                 // a lane
  std::int32_t *tokens, *from;          // lane x room: the token of a row, and where its copy is
  std::uint32_t *mask, *chosen;         // lane x mask_words, by token: hot; chosen to be
  const std::byte* const* token_pages;  // kTierTokens tokens each: see LaneBlock::state_of()
  Sleeper* asleep;                      // asr: lane x room, in the order in which they fell asleep
  std::int32_t* waking;                 // asr: lane x room
  LaneState* states;                    // a lane
  LaneReport* reports;                  // a lane
  DeviceStats stats;                    // of decode, from lane 0 of layer 0 on
};

// Bytes of one token's score, stamp (froze_recently()), hits and timer.
inline constexpr std::size_t kTokenStateBytes = 12;

// The kernels, each queued for all lanes. bounds: most hot tokens of a lane, a layer.
struct LaneWork {
  const DeviceLanes& lanes;
  int n_lanes;
  const DeviceMoment* now;
  const std::int32_t* bounds;
  const Stream& stream;

  // Residency::learn() for the lanes of one layer, of statistics of every token over n_rows rows.
  void learn(int layer, const DeviceStats& stats, int n_rows) const;
  // Residency::choose(), and seed() of what was chosen, for which there must be room.
  void choose() const;
  void seed() const;
  void make_room() const;  // Residency::make_room() of one token more
  // Copies what is only in the cold tier into its hot row, and opens a row for the newest token.
  void place() const;
  void settle() const;                       // Residency::settle() of lanes.stats
  void drop(int position) const;             // rows of a step that was given up
  void cut(int position, int length) const;  // Residency::cut(); length: tokens so far
  // Residency::reset(): whom kSoft or kWindow wakes, and waking those, for which there must be
  // room; kFull.
  void choose_woken(Rung rung) const;
  void wake() const;
  void forget() const;
};

}  // namespace thaw
