// The loops around the forward pass, in token ids, without I/O: generation (prompt, then token
// after token until something ends it), and teacher forcing (the logits of tokens that are known).
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <limits>
#include <span>
#include <vector>

#include "kvstore/kvstore.h"
#include "kvstore/recovery.h"
#include "model/forward.h"
#include "model/sampler.h"

namespace thaw {

// FNV-1a (Fowler, Noll, Vo) over 32-bit words instead of bytes: h = (h xor word) * prime, starting
// from the offset basis. The words are the bits of the logits.
class Fingerprint {
 public:
  void add(std::span<const float> values);
  std::uint64_t value() const { return hash_; }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325;
};

enum class Finish {
  kEnd,          // the model ended the text
  kLength,       // max_tokens are made
  kContext,      // the KV store is full
  kStopped,      // on_token said so
  kInterrupted,  // the flag was set
};

struct GenerateOptions {
  int max_tokens = -1;  // -1: until the KV store is full
  int prefill = -1;     // tokens of the prompt run in batches; the rest is
                        // run one by one like what is generated; -1: all
  int n_vocab = 0;      // sample only from the first n ids; 0: from all
  // Under a policy that freezes, tokens can run again as a prompt does, in one pass that attends
  // every token exactly; their keys and values are then exact, too. (Drafts from a sparse or
  // quantised cache that the whole cache verifies: MagicDec, 2408.11049; QuantSpec, 2502.10424.)
  // Nats; thaw: they do when the sampler's lead() is less; 0: never. Where leads are more than 2
  // nats in the mean, so much more: ghosts shift them by 2 to 5 % of that.
  float second_look = 0;
  int verify = 0;  // they do when there are so many, and their draws are repeated; the first
                   // that differs is taken back with all behind it, so that the text is that
                   // of full. on_token sees a token once it is verified. 0: never
  bool fingerprint = false;                    // take it of all logits that on_logits sees
  std::function<bool(std::int32_t)> is_end;    // tokens that end the text; empty: none does
  std::function<bool(std::int32_t)> on_token;  // every token when it is made; false stops
  std::function<void(std::span<const float>)> on_logits;  // before each token is drawn from them,
                                                          // drafts as well; not repeated draws
  // The same, but not where the backend samples itself and found them all finite.
  std::function<void(std::span<const float>)> check_logits;
  std::function<void(int, int)> on_prefill;        // tokens of the prompt done, of how many
  std::function<void(bool)> on_check;              // before tokens run again: false; after: true
  const std::atomic<bool>* interrupted = nullptr;  // asked between forward passes
  // Watches every decode step and resets kv when it raises the alarm; null: nobody does. Where it
  // may rewalk, on_token sees a token only once rewalk_tokens more are made, or at the end. Not
  // together with verify.
  Recovery* recovery = nullptr;
};

struct Generation {
  std::vector<std::int32_t> tokens;  // without the one that ended the text
  Finish finish = Finish::kLength;
  int prompt_tokens = 0;           // fewer than in the prompt when that was interrupted
  double prefill_seconds = 0;      // the prompt through the model
  double first_token_seconds = 0;  // from the call to the first token; 0 when there is none
  int decode_steps = 0;            // forward passes of one token, after the prompt, without
                                   // those of tokens that were taken back
  int checks = 0;                  // passes in which tokens ran again
  int corrected = 0;               // checks that found a token that full would not have drawn
  float least_lead = std::numeric_limits<float>::infinity();  // of the sampler's lead() over draws
  double decode_seconds = 0;  // all of them, also taken back, sampling, and on_token
  int context_tokens = 0;     // in the KV store at the end
  KvUsage usage;              // at the end
  KvCounters counters;        // of the store, since it was made or cleared
  std::uint64_t fingerprint = 0;
};

// Appends `prompt` (1 token or more) to kv and generates. The sampler is told of the prompt's
// tokens and of each new one. Throws Error when the prompt does not fit what is left of kv.
Generation generate(Transformer& transformer, KvStore& kv, Sampler& sampler,
                    std::span<const std::int32_t> prompt, const GenerateOptions& options);

struct ForcedRows {
  int prefill = -1;  // tokens run in calls of transformer.max_rows(); the rest one a call; -1: all
  int first = 0;     // the first row whose logits are wanted
  int verify = 0;  // as in GenerateOptions: so many of the rest, and the last ones, run again after
                   // on_logits
};

// Appends `tokens` to kv; on_logits(row, logits) gets the logits of rows `row` ... in order, each
// the model's prediction after tokens[0 .. row], valid during the call. It returns false to stop,
// and then so does this.
// `recovery`, where given, watches the rows after the prefill; its rewalk is a full reset here.
bool teacher_force(Transformer& transformer, KvStore& kv, std::span<const std::int32_t> tokens,
                   ForcedRows rows,
                   const std::function<bool(int, std::span<const float>)>& on_logits,
                   Recovery* recovery = nullptr);

}  // namespace thaw
