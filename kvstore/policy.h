// Who stays hot: pure functions of numbers, the same on host and device, each with its formula and
// its source. The store calls them; they know of no memory.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "device/host_device.h"

namespace thaw {

enum class Policy : std::uint8_t { kFull, kWindow, kH2o, kBudget, kAsr, kThaw };
inline constexpr const char* kPolicyNames[] = {"full", "window", "h2o", "budget", "asr", "thaw"};

// Every parameter of every policy; which one reads what is said at the functions below.
struct PolicyParams {
  Policy policy = Policy::kFull;
  int window = 16;           // newest tokens, always hot
  int sinks = 4;             // oldest tokens, always hot (StreamingLLM, 2309.17453)
  float epsilon = 2.8e-3f;   // thaw: a frozen token of at least this probability is recalled
  float caution = 3.0f;      // thaw: z, by how many deviations a ghost's score may be too low
  float stay = 1.5f;         // thaw: kappa, steps hot after a hit over sqrt(hits)
  float softness = 2.0f;     // asr: k
  float quantile = 0.5f;     // asr: share of a layer's tokens under tau when decoding begins
  int ghost_key_bits = 3;    // thaw: 0 (no ghosts: frozen tokens are mute) .. 4
  int ghost_value_bits = 2;  // thaw: 0 (ghosts speak only through their keys), 1, 2, 4
  bool per_head = true;      // thaw: each KV head decides for itself, not the layer as a whole
};

// Rungs of recovery, mildest first (ASR-KF-EGR, 2512.11221, names them and leaves them as future
// work).
enum class Rung : std::uint8_t { kNone, kSoft, kWindow, kFull, kRewalk };
inline constexpr const char* kRungNames[] = {"off", "soft", "window", "full", "rewalk"};

inline constexpr int kAlarmSteps = 16;         // decode steps that a rung's help lasts, or more
inline constexpr float kAlarmEpsilon = 0.25f;  // soft, under thaw: what epsilon is multiplied by
inline constexpr int kWakeSteps = 64;          // window: how far back it wakes

// thaw: the share of epsilon below which no ghost is recalled, however much its score may err.
inline constexpr float kLeastRecall = 0.0625f;

// Whether a frozen token froze in the last kWakeSteps steps. stamp: the step in which it froze
// last, plus 1; 0: it never did.
THAW_HOST_DEVICE inline bool froze_recently(int stamp, int step) {
  return stamp > 0 && stamp > step - kWakeSteps;
}

// Tokens from here on are always hot, as sinks are; bound: most hot tokens of the lane. h2o keeps
// half of its room for the newest (2306.14048), window all of it.
THAW_HOST_DEVICE inline int first_recent(const PolicyParams& p, int kv_len, int bound) {
  int recent = p.window;
  if (p.policy == Policy::kWindow) recent = bound - p.sinks;
  if (p.policy == Policy::kH2o) {
    const int half = bound / 2 < bound - p.sinks ? bound / 2 : bound - p.sinks;
    recent = half > recent ? half : recent;
  }
  return kv_len - recent;
}

// thaw: how much likelier a token may be than its ghost says. Scores of ghosts err by a standard
// deviation sigma that grows with the query (GhostQuery::noise), in sharp heads by more than a nat:
// there a token that all attention belongs to can look like one of thousands.
struct Caution {
  static constexpr float kUsualNoise = 0.4f;  // sigma_0, which epsilon has been chosen with

  float z = 0;      // 0: ghosts are believed
  float least = 0;  // no ghost that is less probable is recalled

  // What probabilities are multiplied by before they are compared with `recall`:
  // e^(z (sigma - sigma_0)), at least 1 and at most recall / least.
  THAW_HOST_DEVICE float factor(float sigma, float recall) const {
    const float doubt = z * (sigma - kUsualNoise);
    if (!(doubt > 0)) return 1;
    const float factor = std::exp(doubt < 20 ? doubt : 20.0f), most = recall / least;
    return factor < most ? factor : most > 1 ? most : 1.0f;
  }
  bool operator==(const Caution&) const = default;
};

// There is room for as many as can have this least share of epsilon.
THAW_HOST_DEVICE inline Caution caution_of(const PolicyParams& p) {
  return {p.caution, p.epsilon * kLeastRecall};
}

// thaw: steps that a token stays hot after its c-th hit, floor(kappa sqrt(c)).
THAW_HOST_DEVICE inline int stay_steps(const PolicyParams& p, int hits) {
  const float steps = p.stay * std::sqrt(static_cast<float>(hits));
  return steps < 65535.0f ? static_cast<int>(steps) : 65535;
}

// thaw: frozen tokens of at most this probability are faint: a tenth of a recall's, of no more than
// the default epsilon's (from about 3e-4 on KL grows: docs/kvstore.md), and below an even share. A
// group of ghosts that are all faint to the queries of a k/v head, kJudges of them at a time,
// speaks through the mean value alone.
inline constexpr int kJudges = 8;
THAW_HOST_DEVICE inline float faintest(float recall, int kv_len) {
  const float even = 0.3f / static_cast<float>(kv_len);
  const float low = recall < 2.8e-3f ? 0.1f * recall : 2.8e-4f;
  return low < even ? low : even;
}

// Whether a token that is not always hot can be chosen when decoding begins.
THAW_HOST_DEVICE inline bool seeds_by_rank(const PolicyParams& p) {
  return p.policy == Policy::kThaw ? stay_steps(p, 1) > 0 : p.policy != Policy::kWindow;
}

// asr: steps that a token sleeps after its c-th low score, floor(sqrt(c) / k) (2512.11221, the
// sublinear freeze schedule).
THAW_HOST_DEVICE inline int sleep_steps(const PolicyParams& p, int low_scores) {
  return static_cast<int>(std::sqrt(static_cast<float>(low_scores)) / p.softness);
}

// thaw: a hot token after a step in which its mean probability was `probability`. A hit restarts
// its timer; without one the timer falls. True: it stays hot.
THAW_HOST_DEVICE inline bool thaw_stays(const PolicyParams& p, float probability, float epsilon,
                                        bool always, std::uint16_t& hits, std::uint16_t& timer) {
  if (probability >= epsilon) {
    if (hits < 0xffff) ++hits;
    timer = static_cast<std::uint16_t>(stay_steps(p, hits));
    return always || timer > 0;
  }
  if (timer > 0) --timer;
  return always || timer > 0;
}

// asr: a token that was attended with relevance s = mean |q.k| (2512.11221): s < tau counts, and
// sends it to sleep for as many steps as this returns; 0: it stays awake.
THAW_HOST_DEVICE inline int asr_sleep(const PolicyParams& p, float relevance, float tau,
                                      bool always, std::uint16_t& low_scores) {
  if (always || relevance >= tau) return 0;
  if (low_scores < 0xffff) ++low_scores;
  return sleep_steps(p, low_scores);
}

// e^H: how many tokens an attention of entropy H (nats) is spread over. The same bits wherever it
// is computed, so that ranks are: e^r is a polynomial on |r| <= ln(2) / 2 (Cephes, expf).
THAW_HOST_DEVICE inline float attention_spread(float entropy) {
  const float bounded = entropy < 80.0f ? entropy : 80.0f, n = rintf(bounded * 1.44269504f);
  const float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, bounded));
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return (fmaf(p, r * r, r) + 1.0f) * power;
}

// Whether a token's rank is all the attention that it ever had.
THAW_HOST_DEVICE inline bool accumulates(const PolicyParams& p) {
  return p.policy == Policy::kH2o || p.policy == Policy::kBudget;
}

// Of how many of a step's last rows a policy learns. exact: they attend every token.
inline int rows_to_learn(const PolicyParams& p, int n_tokens, bool exact) {
  if (p.policy == Policy::kFull) return 0;
  if (p.policy == Policy::kWindow) return exact ? 0 : 1;
  const int recent = p.window > 1 ? p.window : 1;
  return accumulates(p) || n_tokens < recent ? n_tokens : recent;
}

// h2o, budget: the attention that a token had so far, after n_rows more queries of that mean.
THAW_HOST_DEVICE inline float accumulated_score(float score, float probability, int n_rows) {
  return fmaf(probability, static_cast<float>(n_rows), score);
}

// asr: which of n ascending relevances tau is, from 0.
THAW_HOST_DEVICE inline int quantile_index(float quantile, int n) {
  const int at = static_cast<int>(quantile * static_cast<float>(n));
  return at < n - 1 ? at : n - 1;
}

// thaw: rank when room is short: p e^H, how large a share of the effectively attended tokens a
// token is; spread = attention_spread(H).
THAW_HOST_DEVICE inline float entropy_score(float probability, float spread) {
  return probability * spread;
}

// budget: a layer's share of all hot tokens, proportional to its mean head entropy (Entropy-Guided
// KV Caching, Mathematics 13(15) 2366: more entropy, more budget), with the total kept.
THAW_HOST_DEVICE inline float layer_share(float entropy, float sum_of_entropies) {
  return entropy / sum_of_entropies;
}

}  // namespace thaw
