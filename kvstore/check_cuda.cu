#include <algorithm>
#include <cstring>

#include "device/error.h"
#include "kvstore/check_cuda.h"

namespace thaw {
namespace {

// Rows, mask and tokens fit each other, and every row is the bit-exact copy of its token.
void check_rows(const LaneSnapshot& lane, const LaneFacts& f) {
  int marked = 0;
  for (const std::uint32_t word : lane.mask) marked += __builtin_popcount(word);
  const int n = static_cast<int>(lane.tokens.size());
  require(marked == n, "KV check: layer ", f.layer, ": ", n, " hot rows, but ", marked,
          " tokens are marked hot");
  require(n <= f.bound, "KV check: layer ", f.layer, ": ", n, " hot tokens, more than the ",
          f.bound, " allowed");
  for (int row = 0; row < n; ++row) {
    const std::int32_t t = lane.tokens[row], from = lane.from[row];
    require(t >= 0 && t < f.kv_len && (lane.mask[t / 32] >> t % 32 & 1) != 0, "KV check: layer ",
            f.layer, ": hot row ", row, " holds token ", t, " of ", f.kv_len,
            ", which is not marked hot");
    require(from == row || from == kInCold, "KV check: layer ", f.layer, ": hot row ", row,
            " stands in row ", from);
    for (int head = 0; from == row && head < f.n_heads; ++head) {
      const std::byte* is =
          &lane.rows[(static_cast<std::size_t>(head) * lane.tokens.size() + row) * 2 * f.kv_row];
      require(std::memcmp(is, f.cold.key(f.first_head + head, t), f.kv_row) == 0 &&
                  std::memcmp(is + f.kv_row, f.cold.value(f.first_head + head, t), f.kv_row) == 0,
              "KV check: layer ", f.layer, ", head ", f.first_head + head,
              ": the hot copy of token ", t, " differs from the cold one");
    }
  }
}

// Who sleeps, and for how long. Returns it by token.
std::vector<bool> check_sleepers(const LaneSnapshot& lane, const LaneFacts& f) {
  std::vector<bool> asleep(static_cast<std::size_t>(f.kv_len));
  for (const Sleeper& s : lane.asleep) {
    require(s.token >= 0 && s.token < f.kv_len && !asleep[static_cast<std::size_t>(s.token)],
            "KV check: layer ", f.layer, ": token ", s.token, " sleeps twice");
    asleep[static_cast<std::size_t>(s.token)] = true;
    require(s.timer >= 1 && s.timer <= std::max(1, sleep_steps(f.params, lane.hits[s.token])),
            "KV check: layer ", f.layer, ": token ", s.token, " sleeps ", s.timer, " more steps");
  }
  return asleep;
}

}  // namespace

void check_lane(const LaneSnapshot& lane, const LaneFacts& f) {
  check_rows(lane, f);
  const std::vector<bool> asleep = check_sleepers(lane, f);
  const int recent = first_recent(f.params, f.kv_len, f.bound);
  for (std::int32_t t = 0; t < f.kv_len; ++t) {
    const bool hot = (lane.mask[t / 32] >> t % 32 & 1) != 0;
    const bool always = t < f.params.sinks || t >= recent;
    require(hot || (f.can_freeze && !always), "KV check: layer ", f.layer, ": token ", t, " of ",
            f.kv_len, " is frozen and must not be");
    if (f.params.policy == Policy::kAsr)
      require(hot != asleep[static_cast<std::size_t>(t)], "KV check: layer ", f.layer, ": token ",
              t, " is ", hot ? "both hot and asleep" : "neither hot nor asleep");
    if (f.params.policy == Policy::kThaw)
      require(lane.timer[t] <= (hot ? std::max(1, stay_steps(f.params, lane.hits[t])) : 0),
              "KV check: layer ", f.layer, ": token ", t, " has ", lane.timer[t],
              " steps left to stay");
  }
}

GhostCheck::GhostCheck(const KvShape& shape, const GhostFormat& format, int centre_tokens)
    : memory_(make_memory_pages()), host_(*memory_, shape, format, centre_tokens) {}

// The host's tier takes the device's bytes for its own, which fixes who is asked, not the answer.
void GhostCheck::check(int layer, const KvRows& cold, const DeviceGhosts& ghosts, int first,
                       int last, const Stream& stream) const {
  if (!ghosts.format.present() || last < host_.centre_tokens() || last == 0) return;
  host_.reserve(last);
  host_.write(layer, cold, last - 1, 1);  // fixes the centre, where there is none yet
  const GhostView view = host_.view(layer);
  const int n_heads = static_cast<int>(view.centres.size());
  std::vector<const std::byte*> pages(static_cast<std::size_t>(tier_pages(last)));
  copy_to_host(pages.data(), ghosts.pages, pages.size(), stream);
  for (std::size_t page = static_cast<std::size_t>(first / kTierTokens); page < pages.size();
       ++page)
    copy_to_host(
        const_cast<std::byte*>(view.pages[page]) + view.offset, pages[page] + ghosts.offset,
        view.format.group_bytes() * static_cast<std::size_t>(view.page_groups * n_heads), stream);
  host_.check(layer, cold, first, last);
}

}  // namespace thaw
