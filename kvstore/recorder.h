// What the store tells those who draw or trace it: each freeze and thaw, and a line a step.
#pragma once

#include <cstdint>
#include <vector>

namespace thaw {

struct KvEvent {
  enum Kind : std::uint8_t {
    kAppend,  // a new token, hot
    kSeed,    // made hot when decoding began after a prefill
    kRecall,  // read in place from the cold tier; then made hot if `timer` is above 0
    kThaw,    // made hot by a timer or by recovery
    kFreeze,  // left the hot tier
    kRewind,  // forgotten: the context was cut back
  };
  Kind kind;
  std::int32_t step;  // decode steps since the store was made
  std::int32_t layer;
  std::int32_t head;   // the KV head; -1: all heads of the layer
  std::int32_t token;  // position in the context
  float probability;   // mean attention probability that led to it; 0 where none did
  std::int32_t hits;   // thaw: times needed; asr: times of low relevance
  std::int32_t timer;  // steps that it will now stay hot (thaw) or asleep (asr)
};

// After every decode step.
struct KvStep {
  struct Layer {
    float entropy;         // of attention, mean over heads, nats
    float ghost_mass;      // mean probability on frozen tokens
    float threshold;       // thaw: epsilon; asr: tau; others 0
    float hot;             // hot tokens, mean over heads
    float budget;          // most hot tokens allowed, 0: no bound
    float recalled;        // tokens, mean over heads
    float thawed, frozen;  // likewise
  };
  std::int32_t step;
  std::int32_t length;  // tokens in the context, the newest included
  std::vector<Layer> layers;
  std::int64_t hot_bytes, ghost_bytes;
  std::int64_t cold_bytes_read;  // in this step
  bool all_hot = false;  // and no event says so: the policy is full, or the context short
};

class KvRecorder {
 public:
  virtual ~KvRecorder() = default;
  virtual bool wants_events() const { return true; }  // false: only step() is called
  virtual void event(const KvEvent& event) = 0;
  virtual void step(const KvStep& step) = 0;
};

}  // namespace thaw
