// What a store in device memory shows to attention, and where attention answers: the part of a
// KvView that only kernels read. Whatever changes from step to step is read from device memory when
// the kernels run, so that a recorded graph serves every step. Pointers and strides change only in
// KvStore::begin(), and rarely; a graph is for views that are == to the one it was recorded with.
#pragma once

#include <cstdint>

#include "kvstore/device_rows.h"
#include "kvstore/ghost.h"
#include "kvstore/policy.h"

namespace thaw {

// The hot rows of a layer's lanes. A lane is `lane_heads` k/v heads that freeze and thaw together:
// lane i has the heads from i * lane_heads on. Rows have no order. The newest token is among them:
// append() has written its row.
struct DeviceHot {
  int n_lanes = 0;       // of the layer; 0: every token is attended exactly, no more is here
  int lane_heads = 0;    // 1, or n_kv_heads
  int room = 0;          // entries from a lane to the next in `tokens`; at least n_rows
  int mask_words = 0;    // words from a lane to the next in `mask`
  DeviceRows rows = {};  // of lane 0; heads counted from the lane's first
  int lane_pages = 0;    // entries of rows.pages from a lane to the next
  const std::int32_t* n_rows = nullptr;  // a lane: hot rows now, 1 .. room
  const std::int32_t* tokens = nullptr;  // lane x room: the token in each row
  const std::uint32_t* mask = nullptr;   // lane x mask_words: bit t % 32 of word t / 32: t is hot

  __device__ DeviceRows rows_of(int lane) const {
    DeviceRows of = rows;
    of.pages += static_cast<std::ptrdiff_t>(lane) * lane_pages;
    return of;
  }
  bool operator==(const DeviceHot&) const = default;
};

// How the ghosts' centres turn: the tables of GhostRope, of head_dim / 2 pairs, those that turn
// fast first. Angles are from the middle of a span of GhostRope::kSpan tokens.
struct DeviceRope {
  struct Pair {
    std::int32_t first, second;  // elements of a head
  };
  int n_fast = 0;
  const Pair* pairs = nullptr;
  const float* middle = nullptr;  // span x {cos, sin} x pair: the angle of the middle of each span
  const float* within = nullptr;  // place in a span x {cos, sin} x pair: from the middle to there
  const float* cubic = nullptr;   // {1, theta, theta^2 / 2, theta^3 / 6} x pair; 0 for fast ones
  const std::uint16_t* rows = nullptr;  // SplitRope: what turned queries are multiplied by

  bool operator==(const DeviceRope&) const = default;
};

// The ghosts of a layer, laid out as on the CPU: kvstore/ghost.h says how a group of 32 tokens of a
// head stands, kvstore/ghost_code.h where in it a code does. Every token has a ghost, hot ones too.
struct DeviceGhosts {
  GhostFormat format;  // present() is false: frozen tokens are mute, and there is no more here
  // The centre is the mean of the first centre_tokens keys, so ghosts exist while
  // kv_len >= centre_tokens. Before that every token is hot.
  int centre_tokens = 0;
  const std::byte* const* pages = nullptr;  // table in device memory, of pages in device memory
  std::size_t offset = 0;                   // bytes from a page's start to the layer's head 0
  const float* means = nullptr;             // k/v head x {key (as of position 0), value} x head_dim
  const float* units = nullptr;             // k/v head x {of key scales, of value scales}
  DeviceRope rope;

  static constexpr int kPageGroups = kTierTokens / kGhostGroup;  // groups of a head in a page

  __device__ const std::byte* group(int head, int index) const {
    return group_in(pages[index / kPageGroups], head, index);
  }
  // The same, of a page that is there already: entry index / kPageGroups of `pages`.
  __device__ const std::byte* group_in(const std::byte* page, int head, int index) const {
    const auto place = static_cast<std::uint32_t>(head * kPageGroups + index % kPageGroups);
    return page + offset + place * static_cast<std::uint32_t>(format.group_bytes());
  }
  bool operator==(const DeviceGhosts&) const = default;
};

// Where attention writes what the policy learns from it: AttentionStats (kvstore/kvstore.h) in
// device memory, with the same meanings. The kernels that settle() queues read it.
//
// Decode under a policy that freezes: an entry of `probability` a hot row. `entropy`, `ghost_mass`,
// and where format.present() `n_recalled`, are written in every step, also while kv_len is below
// centre_tokens.
// Exact attention of which statistics are asked: an entry a token, 0 .. kv_len, in the mean over
// the asked rows (a row that does not see the token adds 0); no ghost_mass and nothing recalled.
struct DeviceStats {
  int stride = 0;                // entries from a lane to the next in the next two
  float* probability = nullptr;  // lane x stride; null: nobody asks for it
  float* relevance = nullptr;    // lane x stride; null unless --policy asr
  float* entropy = nullptr;      // a lane
  float* ghost_mass = nullptr;   // a lane; null in exact attention
  // Ascending by token, so that what is decided does not depend on timing. There is room for every
  // token that can be recalled: probabilities of at least Caution::least add up to at most 1.
  int recalled_room = 0;                  // entries from a lane to the next in the next two
  std::int32_t* n_recalled = nullptr;     // a lane
  std::int32_t* recalled = nullptr;       // lane x recalled_room: tokens
  float* recalled_probability = nullptr;  // lane x recalled_room: exact, mean over the lane

  bool operator==(const DeviceStats&) const = default;
};

// What attention reads of a layer, and where it reports.
struct DeviceView {
  DeviceRows rows;  // every token, oldest first; in decode under a policy that freezes in
                    // pinned memory, which kernels read over the bus
  const std::int32_t* kv_len;     // in device memory, the running step's tokens included
  DeviceHot hot = {};             // decode under a policy that freezes
  DeviceGhosts ghosts = {};       // likewise
  const float* recall = nullptr;  // KvView::recall, in device memory: recovery lowers it
  Caution caution = {};           // KvView::caution
  DeviceStats stats = {};

  bool operator==(const DeviceView&) const = default;
};

}  // namespace thaw
