#include "model/generate.h"

#include <algorithm>
#include <bit>
#include <chrono>

#include "device/error.h"

namespace thaw {
namespace {

class Clock {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

bool interrupted(const GenerateOptions& options) {
  return options.interrupted && options.interrupted->load();
}

// Logits of the last token of the prompt, or nothing when interrupted.
std::span<const float> prefill(Transformer& transformer, KvStore& kv,
                               std::span<const std::int32_t> prompt,
                               const GenerateOptions& options) {
  std::span<const float> logits;
  const std::size_t batched = options.prefill < 0 ? SIZE_MAX : options.prefill;
  for (std::size_t done = 0; done < prompt.size() && !interrupted(options);) {
    const std::size_t n =
        done >= batched ? 1
                        : std::min<std::size_t>(transformer.max_rows(),
                                                std::min(batched, prompt.size()) - done);
    const bool last = done + n == prompt.size();
    logits = transformer.forward(prompt.subspan(done, n), kv, last ? 1 : 0, Phase::kPrefill);
    done += n;
    if (options.on_prefill)
      options.on_prefill(static_cast<int>(done), static_cast<int>(prompt.size()));
  }
  return logits;
}

// Tokens into `result`, starting from the logits of the prompt's last token.
Finish decode(Transformer& transformer, KvStore& kv, Sampler& sampler,
              std::span<const float> logits, const GenerateOptions& options, const Clock& clock,
              Generation& result) {
  const std::size_t limit = options.max_tokens < 0 ? SIZE_MAX : options.max_tokens;
  Fingerprint fingerprint;
  for (;;) {
    if (interrupted(options)) return Finish::kInterrupted;
    if (result.tokens.size() == limit) return Finish::kLength;
    if (!result.tokens.empty()) {
      if (kv.length() == kv.shape().capacity) return Finish::kContext;
      logits = transformer.forward(std::span(result.tokens).last(1), kv, 1, Phase::kDecode);
      ++result.decode_steps;
    }
    if (options.fingerprint) {
      fingerprint.add(logits);
      result.fingerprint = fingerprint.value();
    }
    if (options.on_logits) options.on_logits(logits);
    const std::int32_t token =
        sampler.sample(options.n_vocab > 0 ? logits.first(options.n_vocab) : logits);
    if (result.tokens.empty()) result.first_token_seconds = clock.seconds();
    if (options.is_end && options.is_end(token)) return Finish::kEnd;
    sampler.accept(token);
    result.tokens.push_back(token);
    if (options.on_token && !options.on_token(token)) return Finish::kStopped;
  }
}

}  // namespace

void Fingerprint::add(std::span<const float> values) {
  for (float value : values) hash_ = (hash_ ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3;
}

Generation generate(Transformer& transformer, KvStore& kv, Sampler& sampler,
                    std::span<const std::int32_t> prompt, const GenerateOptions& options) {
  const int room = kv.shape().capacity - kv.length();
  require(!prompt.empty(), "prompt: expected at least 1 token, found 0");
  require(prompt.size() <= static_cast<std::size_t>(room), "prompt: expected at most ", room,
          " tokens, which is what the context has room for, found ", prompt.size());

  Generation result;
  const int start = kv.length();
  const Clock clock;
  for (std::int32_t token : prompt) sampler.accept(token);
  const std::span<const float> logits = prefill(transformer, kv, prompt, options);
  result.prefill_seconds = clock.seconds();
  result.prompt_tokens = kv.length() - start;
  result.finish = decode(transformer, kv, sampler, logits, options, clock, result);
  if (result.decode_steps > 0) result.decode_seconds = clock.seconds() - result.first_token_seconds;
  result.context_tokens = kv.length();
  result.usage = kv.usage();
  result.counters = kv.counters();
  return result;
}

bool teacher_force(Transformer& transformer, KvStore& kv, std::span<const std::int32_t> tokens,
                   ForcedRows rows,
                   const std::function<bool(int, std::span<const float>)>& on_logits) {
  const int n_tokens = static_cast<int>(tokens.size());
  const int prefill = rows.prefill < 0 ? n_tokens : std::min(rows.prefill, n_tokens);
  for (int row = 0, n = 0; row < n_tokens; row += n) {
    n = row < prefill ? std::min(transformer.max_rows(), prefill - row) : 1;
    const int n_logits = std::clamp(row + n - rows.first, 0, n);
    const std::span<const float> logits =
        transformer.forward(tokens.subspan(row, n), kv, n_logits,
                            row < prefill ? Phase::kPrefill : Phase::kDecode);
    if (!on_logits(row + n - n_logits, logits)) return false;
  }
  return true;
}

}  // namespace thaw
