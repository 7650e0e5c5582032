#include "model/generate.h"

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "device/error.h"

namespace thaw {
namespace {

constexpr float kUsualLead = 2;  // nats: the mean over prose and code
constexpr float kLeads = 16;     // a new one moves the mean by one part in so many

class Clock {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

// Asks the alarm after a decode step, and thaws what it demands. entropy(): of the output, nats.
template <class Entropy>
Rung recover(Recovery* recovery, KvStore& kv, const Entropy& entropy, bool can_rewalk) {
  if (!recovery || !recovery->on()) return Rung::kNone;
  const Rung rung = recovery->observe(kv.length(), entropy(), kv.ghost_mass(), can_rewalk);
  const int again = rung == Rung::kRewalk ? recovery->params().rewalk_tokens + 1 : 0;
  if (rung != Rung::kNone) kv.reset(std::min(rung, Rung::kFull), std::max(kAlarmSteps, again));
  return rung;
}

// One call of generate(). What is known of the text is the prompt and `tokens`; what stands in kv
// may end before that, at the newest token or, after a rewalk, some tokens earlier.
class Run {
 public:
  Run(Transformer& transformer, KvStore& kv, Sampler& sampler, std::span<const std::int32_t> prompt,
      const GenerateOptions& options)
      : transformer_(transformer),
        kv_(kv),
        sampler_(sampler),
        prompt_(prompt),
        options_(options),
        start_(kv.length()),
        limit_(options.max_tokens < 0 ? SIZE_MAX : options.max_tokens),
        hold_(options.recovery && options.recovery->params().highest == Rung::kRewalk
                  ? options.recovery->params().rewalk_tokens
                  : 0) {}

  Generation run() {
    for (std::int32_t token : prompt_) sampler_.accept(token);
    read_prompt();
    result_.prefill_seconds = clock_.seconds();
    result_.finish = write();
    if (verifies()) keep(n_verified());  // of a run that was interrupted
    if (!pass_on(0)) result_.finish = Finish::kStopped;
    result_.decode_steps = static_cast<int>(std::max(in_store(), prompt_.size()) - prompt_.size());
    if (result_.decode_steps > 0)
      result_.decode_seconds = clock_.seconds() - result_.first_token_seconds;
    result_.prompt_tokens = static_cast<int>(std::min(in_store(), prompt_.size()));
    result_.context_tokens = kv_.length();
    result_.usage = kv_.usage();
    result_.counters = kv_.counters();
    return std::move(result_);
  }

 private:
  std::size_t in_store() const { return static_cast<std::size_t>(kv_.length() - start_); }
  std::size_t known() const { return prompt_.size() + result_.tokens.size(); }
  std::int32_t known_token(std::size_t i) const {
    return i < prompt_.size() ? prompt_[i] : result_.tokens[i - prompt_.size()];
  }
  bool interrupted() const { return options_.interrupted && options_.interrupted->load(); }

  // All of the prompt, or, where its end is decoded, all but the last token.
  void read_prompt() {
    const bool decoded = options_.prefill >= 0 && options_.prefill < std::ssize(prompt_);
    const int n_tokens = static_cast<int>(prompt_.size()) - decoded;
    if (interrupted()) return;
    teacher_force(
        transformer_, kv_, prompt_.first(n_tokens),
        {options_.prefill, n_tokens - 1, verifies() ? options_.verify : 0},
        [&](int, std::span<const float> logits) {
          logits_ = logits, prediction_.reset();
          if (options_.on_prefill) {
            options_.on_prefill(static_cast<int>(in_store()), static_cast<int>(prompt_.size()));
          }
          return !interrupted();
        },
        options_.recovery);
  }

  Finish write() {
    exact_ = in_store();
    if (verifies()) verified_ = sampler_;
    for (;;) {
      while (in_store() < known()) {
        if (interrupted()) return Finish::kInterrupted;
        if (kv_.length() == kv_.shape().capacity && verified()) return Finish::kContext;
        if (in_store() < known()) step();
      }
      if (interrupted()) return Finish::kInterrupted;
      if (limit_ == 0) return Finish::kLength;
      const std::int32_t token = corrected_ ? *std::exchange(corrected_, {}) : draw();
      if (options_.is_end && options_.is_end(token)) {
        if (verifies() && exact_ < in_store()) {
          check();
          continue;
        }
        return Finish::kEnd;
      }
      sampler_.accept(token);
      result_.tokens.push_back(token);
      if (verifies() && exact_ == in_store()) verified_ = sampler_;
      if (!pass_on(verifies() ? result_.tokens.size() - n_verified() : hold_))
        return Finish::kStopped;
      if (result_.tokens.size() == limit_ && verified()) return Finish::kLength;
    }
  }

  // Runs the next token that is known and not in the store.
  void step() {
    run(known_token(in_store()));
    const std::optional<float> mass = kv_.ghost_mass();
    if (exact_ + 1 == in_store() && thaws() && (!mass || (has_ghosts() && *mass == 0)))
      exact_ = in_store();
    if (in_store() == known() && exact_ < known() && (hesitates() || verifies_now())) check();
    const auto entropy = [this] {
      return prediction_ ? prediction_->entropy : softmax_entropy(logits_);
    };
    if (recover(options_.recovery, kv_, entropy, true) == Rung::kRewalk) rewalk();
  }

  // Leaves a prediction, or logits: where somebody looks at them, or the backend does not sample.
  void run(std::int32_t token) {
    const int n = options_.n_vocab > 0 ? options_.n_vocab : transformer_.config().vocab_size;
    const bool shown = options_.fingerprint || options_.on_logits;
    prediction_.reset(), lead_.reset();
    if (shown)
      logits_ = transformer_.forward({&token, 1}, kv_, 1, Phase::kDecode);
    else if (!(prediction_ = transformer_.predict(token, kv_, sampler_, n)))
      logits_ = transformer_.logits();
  }

  std::span<const float> choices() const {
    return options_.n_vocab > 0 ? logits_.first(options_.n_vocab) : logits_;
  }

  // The sampler's, of the next token.
  float lead() {
    if (!lead_) lead_ = prediction_ ? prediction_->lead : sampler_.lead(choices());
    return *lead_;
  }
  // Whether a greedy choice hangs on less than ghosts may be wrong by.
  bool hesitates() {
    return options_.second_look > 0 && thaws() &&
           lead() < options_.second_look * std::max(1.0f, mean_lead_ / kUsualLead);
  }
  bool thaws() const { return kv_.options().policy.policy == Policy::kThaw; }
  // So that the share of attention on frozen tokens is known.
  bool has_ghosts() const { return thaws() && kv_.options().policy.ghost_key_bits > 0; }
  bool verifies() const {
    return options_.verify > 0 && kv_.options().policy.policy != Policy::kFull;
  }
  bool verifies_now() const {
    const int most = std::min(options_.verify, transformer_.max_rows());
    return verifies() && in_store() - exact_ >= static_cast<std::size_t>(most);
  }
  // Tokens whose draws were from exact logits.
  std::size_t n_verified() const {
    return std::min(exact_ + 1 - prompt_.size(), result_.tokens.size());
  }
  bool verified() { return !verifies() || exact_ == in_store() || check(); }

  // Runs what is not exact again, the newest max_rows() of it, and leaves the logits behind it.
  // Where tokens can still be taken back, draws them again, until one differs: that is corrected_.
  // Returns whether all stand.
  bool check() {
    const std::size_t end = in_store();
    exact_ = std::max(exact_, end - std::min<std::size_t>(end, transformer_.max_rows()));
    const std::size_t first = exact_;
    std::vector<std::int32_t> again;
    for (std::size_t i = first; i < end; ++i) again.push_back(known_token(i));
    if (options_.on_check) options_.on_check(false);
    kv_.rewind(start_ + static_cast<int>(first));
    const int rows = verifies() ? static_cast<int>(again.size()) : 1;
    const std::span<const float> logits = transformer_.forward(again, kv_, rows);
    prediction_.reset(), lead_.reset();
    exact_ = end;
    ++result_.checks;
    if (options_.on_check) options_.on_check(true);
    const std::size_t n_vocab = logits.size() / rows;
    logits_ = logits.last(n_vocab);
    return !verifies() || repeat_draws(logits, n_vocab, first);
  }

  // logits: of the known tokens from `first` on, which predict the known tokens behind each.
  bool repeat_draws(std::span<const float> logits, std::size_t n_vocab, std::size_t first) {
    sampler_ = *verified_;
    for (std::size_t i = first + 1; i < known(); ++i) {
      logits_ = logits.subspan((i - first - 1) * n_vocab, n_vocab);
      if (options_.check_logits) options_.check_logits(logits_);
      const std::int32_t token = sampler_.sample(choices());
      if (token == known_token(i)) {
        sampler_.accept(token);
        continue;
      }
      exact_ = i;
      result_.tokens.resize(i - prompt_.size());
      kv_.rewind(start_ + static_cast<int>(i));
      corrected_ = token;
      ++result_.corrected;
      return false;
    }
    logits_ = logits.last(n_vocab);
    return true;
  }

  std::int32_t draw() {
    if (options_.fingerprint) {
      fingerprint_.add(logits_);
      result_.fingerprint = fingerprint_.value();
    }
    if (options_.on_logits) options_.on_logits(logits_);
    if (!prediction_ && options_.check_logits) options_.check_logits(logits_);
    result_.least_lead = std::min(result_.least_lead, lead());
    if (std::isfinite(lead())) mean_lead_ += (lead() - mean_lead_) / kLeads;
    const std::int32_t token =
        prediction_ ? sampler_.take(*prediction_) : sampler_.sample(choices());
    if (result_.first_token_seconds == 0) result_.first_token_seconds = clock_.seconds();
    return token;
  }

  // Tells on_token of all tokens but the newest `hold`. False when it wants no more; those that it
  // was not told of were then never made.
  bool pass_on(std::size_t hold) {
    while (result_.tokens.size() - passed_ > hold) {
      const std::int32_t token = result_.tokens[passed_++];
      if (!options_.on_token || options_.on_token(token)) continue;
      keep(passed_);
      return false;
    }
    return true;
  }

  // The first n tokens; the others were never made.
  void keep(std::size_t n) {
    if (n == result_.tokens.size()) return;
    sampler_.forget(result_.tokens.size() - n);
    result_.tokens.resize(n);
    if (in_store() >= known()) kv_.rewind(start_ + static_cast<int>(known()) - 1);
  }

  // Takes back the tokens that on_token was not told of, and has them and what precedes them run
  // again, rewalk_tokens in all.
  void rewalk() {
    const std::size_t held = result_.tokens.size() - passed_;
    const std::size_t back = std::min(std::max(hold_, held + 1), in_store());
    sampler_.forget(held);
    result_.tokens.resize(passed_);
    kv_.rewind(kv_.length() - static_cast<int>(back));
    exact_ = std::min(exact_, in_store());
  }

  Transformer& transformer_;
  KvStore& kv_;
  Sampler& sampler_;
  std::span<const std::int32_t> prompt_;
  const GenerateOptions& options_;
  const int start_;
  const std::size_t limit_;
  const std::size_t hold_;  // tokens that on_token is not told of yet
  const Clock clock_;
  Generation result_;
  std::size_t passed_ = 0;           // tokens that on_token was told of
  std::size_t exact_ = 0;            // known tokens in kv up to which it is as full's would be
  std::optional<Sampler> verified_;  // verify: as it was when the token behind those was drawn
  std::optional<std::int32_t> corrected_;  // drawn in its place
  std::span<const float> logits_;          // of the last pass, unless it left a prediction
  std::optional<Prediction> prediction_;
  std::optional<float> lead_;     // of that pass, once it was asked for
  float mean_lead_ = kUsualLead;  // of the draws before, the newest kLeads the most
  Fingerprint fingerprint_;
};

}  // namespace

void Fingerprint::add(std::span<const float> values) {
  for (float value : values) hash_ = (hash_ ^ std::bit_cast<std::uint32_t>(value)) * 0x100000001b3;
}

Generation generate(Transformer& transformer, KvStore& kv, Sampler& sampler,
                    std::span<const std::int32_t> prompt, const GenerateOptions& options) {
  const int room = kv.shape().capacity - kv.length();
  require(options.verify == 0 || !options.recovery || !options.recovery->on(),
          "verify: expected no recovery beside it");
  require(!prompt.empty(), "prompt: expected at least 1 token, found 0");
  require(prompt.size() <= static_cast<std::size_t>(room), "prompt: expected at most ", room,
          " tokens, which is what the context has room for, found ", prompt.size());

  return Run(transformer, kv, sampler, prompt, options).run();
}

bool teacher_force(Transformer& transformer, KvStore& kv, std::span<const std::int32_t> tokens,
                   ForcedRows rows,
                   const std::function<bool(int, std::span<const float>)>& on_logits,
                   Recovery* recovery) {
  const int n_tokens = static_cast<int>(tokens.size());
  const int prefill = rows.prefill < 0 ? n_tokens : std::min(rows.prefill, n_tokens);
  const int most_drafts = std::min(rows.verify, transformer.max_rows());
  int exact = prefill;
  for (int row = 0, n = 0; row < n_tokens; row += n) {
    n = row < prefill ? std::min(transformer.max_rows(), prefill - row) : 1;
    const int n_logits = std::clamp(row + n - rows.first, 0, n);
    const bool decode = row >= prefill;
    const bool watched = decode && recovery && recovery->on();
    const std::span<const float> logits =
        transformer.forward(tokens.subspan(row, n), kv, watched ? 1 : n_logits,
                            decode ? Phase::kDecode : Phase::kPrefill);
    if (watched)
      recover(
          recovery, kv, [&] { return softmax_entropy(logits); }, false);
    if (!on_logits(row + n - n_logits, n_logits > 0 ? logits : logits.first(0))) return false;
    const int drafts = row + n - exact;
    if (drafts > 0 && most_drafts > 0 && (drafts >= most_drafts || row + n == n_tokens)) {
      kv.rewind(kv.length() - drafts);
      transformer.forward(tokens.subspan(exact, drafts), kv, 0);
      exact += drafts;
    }
  }
  return true;
}

}  // namespace thaw
