#include "cli/conversation.h"

#include <algorithm>
#include <span>
#include <utility>

#include "cli/text_stream.h"
#include "device/error.h"

namespace thaw {

Conversation::Conversation(const Tokenizer& tokenizer, Transformer& transformer, KvStore& kv,
                           const SamplerOptions& sampler, std::string system)
    : tokenizer_(tokenizer),
      format_(recognise_chat_format(tokenizer)),
      transformer_(transformer),
      kv_(kv),
      sampler_(sampler),
      system_(std::move(system)) {
  require(format_ != ChatFormat::kNone, tokenizer.spec().source,
          ": chat template: expected LLaMA-3 or ChatML, found neither; this model cannot chat");
}

// The message, and what stands before it and behind it.
std::vector<TokenId> Conversation::encode(const std::string& message, bool is_first,
                                          const std::string& system) const {
  const ChatMessage user = {"user", message};
  if (!is_first) return encode_reply(tokenizer_, format_, user);
  if (system.empty()) return encode_chat(tokenizer_, format_, {user});
  return encode_chat(tokenizer_, format_, {{"system", system}, user});
}

void Conversation::add(const Input& message) {
  const std::size_t pending = tokens_.size() - static_cast<std::size_t>(kv_.length());
  const int room = kv_.shape().capacity - kv_.length() - static_cast<int>(pending);
  require_room(tokenizer_, message, std::max(room, 0));
  const std::vector<TokenId> ids = encode(message.text, turns_.empty(), system_);
  require(std::ssize(ids) <= room, message.source, ": expected at most ", std::max(room, 0),
          " tokens, which is what the context has room for, found ", ids.size());
  warn_of_missing(tokenizer_, message);
  turns_.push_back({message.text, "", tokens_.size()});
  tokens_.insert(tokens_.end(), ids.begin(), ids.end());
}

Generation Conversation::answer(GenerateOptions options,
                                const std::function<void(std::string_view)>& write) {
  std::string& answer = turns_.back().answer;
  TextStream text({}, [&](std::string_view piece) { answer += piece, write(piece); });
  options.on_token = [&, inner = options.on_token](TokenId id) {
    text.feed(tokenizer_.decode(id));
    return !inner || inner(id);
  };
  const auto in_store = static_cast<std::size_t>(kv_.length());
  if (accepted_ > in_store) sampler_.forget(accepted_ - in_store);  // it is told of them again
  const std::vector<TokenId> prompt(tokens_.begin() + kv_.length(), tokens_.end());
  Generation result = generate(transformer_, kv_, sampler_, prompt, options);
  text.finish();
  tokens_.insert(tokens_.end(), result.tokens.begin(), result.tokens.end());
  accepted_ = tokens_.size();
  if (result.finish == Finish::kInterrupted && result.tokens.empty()) undo();
  return result;
}

bool Conversation::undo() {
  if (turns_.empty()) return false;
  cut(turns_.back().first);
  turns_.pop_back();
  return true;
}

void Conversation::clear() {
  cut(0);
  turns_.clear();
  kv_.clear();
}

void Conversation::resume(std::string system, std::vector<Turn> turns, std::vector<TokenId> tokens,
                          const SavedRows& rows) {
  int n_known = rows.n_tokens();
  if (tokens.empty()) {
    n_known = 0;
    for (Turn& turn : turns) {
      const auto message = encode(turn.message, tokens.empty(), system);
      const auto answer = tokenizer_.encode(turn.answer);
      turn.first = tokens.size();
      tokens.insert(tokens.end(), message.begin(), message.end());
      tokens.insert(tokens.end(), answer.begin(), answer.end());
    }
  }
  const int n_tokens = static_cast<int>(tokens.size()), capacity = kv_.shape().capacity;
  require(n_tokens <= capacity, "expected at most ", capacity, " tokens (the context), found ",
          n_tokens);
  clear();
  system_ = std::move(system), turns_ = std::move(turns), tokens_ = std::move(tokens);
  for (int end = std::min(n_known, n_tokens - kReadAgain); kv_.length() < end;) {
    const int first = kv_.length();
    const int n = std::min(transformer_.max_rows(), end - first);
    transformer_.restore(
        std::span(tokens_).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)),
        kv_,
        [&](int layer, std::span<float> k, std::span<float> v) { rows.load(layer, first, k, v); });
  }
  accepted_ = static_cast<std::size_t>(kv_.length());
  for (const TokenId id : std::span(tokens_).first(accepted_)) sampler_.accept(id);
}

void Conversation::cut(std::size_t n_tokens) {
  tokens_.resize(n_tokens);
  if (accepted_ > n_tokens) sampler_.forget(accepted_ - n_tokens), accepted_ = n_tokens;
  const int kept = static_cast<int>(n_tokens);
  if (kv_.length() > kept) kv_.rewind(kept);
}

}  // namespace thaw
