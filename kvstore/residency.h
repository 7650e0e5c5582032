// Who is hot in one lane: a policy applied to what attention reported, token by token.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kvstore/lane.h"
#include "kvstore/policy.h"
#include "kvstore/recorder.h"

namespace thaw {

// What a decision needs to know of the moment.
struct Moment {
  int kv_len = 0;
  int step = 0;
  int bound = 0;           // most hot tokens of the lane; at most kv_len
  float epsilon = 0;       // thaw: PolicyParams::epsilon, or less during recovery
  bool can_freeze = true;  // false while frozen tokens would have no ghosts yet
  KvRows cold;
  KvRecorder* recorder = nullptr;
};

class Residency {
 public:
  Residency(HotArena& arena, const KvShape& shape, const PolicyParams& params, int layer,
            int first_head, int n_heads);

  const Lane& lane() const { return lane_; }
  int n_heads() const { return n_heads_; }
  float entropy() const { return entropy_; }
  float ghost_mass() const { return ghost_mass_; }
  float tau() const { return tau_; }
  // By token: times needed (asr: of low relevance), steps left, and rank.
  const std::vector<std::uint16_t>& hits() const { return hits_; }
  const std::vector<std::uint16_t>& timers() const { return timer_; }
  const std::vector<float>& scores() const { return score_; }

  void grow(int kv_len);  // room for that many tokens' state
  // Exact attention over every token, `n_rows` queries: what the next seed() goes by.
  void learn(const AttentionStats::Lane& stats, int n_rows, int kv_len);
  // Chooses the hot tokens anew, as decoding begins. First all lanes freeze who is not chosen, so
  // that their pages are free, and return how many more they need; then all fill them.
  std::int64_t clear_for_seed(const Moment& now);
  void seed(const Moment& now);
  // Freezes the lowest ranked until `incoming` more tokens fit the bound.
  void make_room(const Moment& now, int incoming);
  void append(const Moment& now, std::int32_t token);
  // One decode step's attention: freezes and thaws.
  void settle(const Moment& now, const AttentionStats::Lane& stats);
  // False when a token that must be hot now could not be made so: seed() has to.
  bool cut(const Moment& now, std::int32_t position);
  // Recovery: kSoft wakes sleepers with more than one step to go, kWindow what froze recently;
  // either, the newest first, as long as there is room. kFull and above set counters and timers to
  // zero.
  void reset(Rung rung, const Moment& now);
  // What learn() leads to, of every token, where another did it.
  void take_over(std::span<const float> scores, float entropy, float tau);

  struct Tally {
    int promoted = 0;  // made hot after a recall
    int thawed = 0;    // made hot by a timer or by recovery
    int frozen = 0;
  };
  Tally take_tally();  // since last asked, in tokens
  std::int64_t bookkeeping_bytes() const;
  void check(const Moment& now) const;

 private:
  struct Sleeper {
    std::int32_t token, timer;
  };

  bool always(const Moment& now, std::int32_t token) const;
  int first_recent(const Moment& now) const;
  std::vector<std::int32_t> choose(const Moment& now) const;
  bool thaw(const Moment& now, std::int32_t token, KvEvent::Kind why, float probability);
  void freeze(const Moment& now, int row, float probability);
  void freeze_rows(const Moment& now, const std::vector<int>& rows,
                   const std::vector<float>* probability);
  void evict(const Moment& now, const std::vector<int>& rows);
  void sleep(std::int32_t token, int steps);
  void settle_thaw(const Moment& now, const AttentionStats::Lane& stats);
  void settle_asr(const Moment& now, const AttentionStats::Lane& stats);
  void promote(const Moment& now, const AttentionStats::Recall& recall);
  void wake(const Moment& now, const std::vector<std::int32_t>& tokens);
  void wake_sleepers(const Moment& now);
  void wake_recent(const Moment& now);
  void forget_history();
  void tell(const Moment& now, KvEvent::Kind kind, std::int32_t token, float probability) const;

  const PolicyParams& params_;
  int layer_, first_head_, n_heads_;
  Lane lane_;
  std::vector<std::uint16_t> hits_;   // per token: thaw: hits; asr: low scores
  std::vector<std::uint16_t> timer_;  // per token: thaw: steps left hot; asr: its last sleep
  std::vector<float> score_;          // per token: rank when room is short
  std::vector<std::int32_t> stamp_;   // per token: when it froze last (froze_recently())
  std::vector<Sleeper> asleep_;       // asr: who sleeps, and for how many steps more
  float entropy_ = 0, spread_ = 1;    // H of the last attention, and e^H
  float ghost_mass_ = 0, tau_ = 0;
  Tally tally_;
};

}  // namespace thaw
