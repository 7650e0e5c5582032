#include "cli/conversation.h"

#include <algorithm>
#include <span>
#include <utility>

#include "cli/text_stream.h"
#include "device/error.h"

namespace thaw {

Conversation::Conversation(const Tokenizer& tokenizer, Transformer& transformer, KvStore& kv,
                           const SamplerOptions& sampler)
    : tokenizer_(tokenizer),
      format_(recognise_chat_format(tokenizer)),
      transformer_(transformer),
      kv_(kv),
      sampler_(sampler) {
  require(format_ != ChatFormat::kNone, tokenizer.spec().source, ": chat template: expected ",
          kChatFormats, ", found another; this model cannot chat");
}

// The message, and what stands between it and what is `before`, and it and its answer.
std::vector<TokenId> Conversation::encode(const std::string& message, const Said& before) const {
  const ChatMessage user = {"user", message};
  if (!before.turns.empty()) return encode_reply(tokenizer_, format_, user);
  if (before.system.empty()) return encode_chat(tokenizer_, format_, {user});
  return encode_chat(tokenizer_, format_, {{"system", before.system}, user});
}

void Conversation::add(const Input& message) {
  const int capacity = kv_.shape().capacity;
  const int room = capacity - static_cast<int>(said_.tokens.size());
  require(room > 0, "the context of ", capacity, " tokens is full");
  const bool is_first = said_.turns.empty() && !said_.system.empty();
  const std::string source = message.source + (is_first ? " and the system message" : "");
  require_room(tokenizer_, {message.text, source}, room);
  const std::vector<TokenId> ids = encode(message.text, said_);
  require(std::ssize(ids) <= room, source, ": expected at most ", room,
          " tokens, which is what the context has room for, found ", ids.size());
  warn_of_missing(tokenizer_, message);
  said_.turns.push_back({message.text, "", said_.tokens.size(), said_.tokens.size() + ids.size()});
  said_.tokens.insert(said_.tokens.end(), ids.begin(), ids.end());
}

Generation Conversation::answer(GenerateOptions options,
                                const std::function<void(std::string_view)>& write) {
  Said::Turn& turn = said_.turns.back();
  TextStream text({}, [&](std::string_view piece) { turn.answer += piece, write(piece); });
  Tokenizer::Reader reader(tokenizer_, true);
  options.on_token = [&, inner = options.on_token](TokenId id) {
    text.feed(reader.read(id));
    return !inner || inner(id);
  };
  const auto in_store = static_cast<std::size_t>(kv_.length());
  if (accepted_ > in_store) sampler_.forget(accepted_ - in_store);  // it is told of them again
  const std::vector<TokenId> prompt(said_.tokens.begin() + kv_.length(), said_.tokens.end());
  Generation result;
  try {
    result = generate(transformer_, kv_, sampler_, prompt, options);
    text.finish();
  } catch (...) {
    turn.answer.clear();
    kv_.rewind(std::min(kv_.length(), static_cast<int>(said_.tokens.size())));
    throw;
  }
  said_.tokens.insert(said_.tokens.end(), result.tokens.begin(), result.tokens.end());
  accepted_ = said_.tokens.size();
  return result;
}

bool Conversation::undo() {
  if (said_.turns.empty()) return false;
  cut(said_.turns.back().first);
  said_.turns.pop_back();
  return true;
}

bool Conversation::unanswer() {
  if (said_.turns.empty()) return false;
  Said::Turn& turn = said_.turns.back();
  const std::vector<TokenId> message(
      said_.tokens.begin() + static_cast<std::ptrdiff_t>(turn.first),
      said_.tokens.begin() + static_cast<std::ptrdiff_t>(turn.reply));
  cut(turn.first);  // the message is read again, as it was before its answer
  said_.tokens.insert(said_.tokens.end(), message.begin(), message.end());
  turn.answer.clear();
  return true;
}

void Conversation::begin(std::string system) {
  cut(0);
  said_ = {std::move(system), {}, {}};
  kv_.clear();
}

Said Conversation::encoded(Said said) const {
  Said again = {std::move(said.system), {}, {}};
  for (Said::Turn& turn : said.turns) {
    turn.first = again.tokens.size();
    const auto message = encode(turn.message, again),
               answer = encode_answer(tokenizer_, format_, turn.answer);
    again.tokens.insert(again.tokens.end(), message.begin(), message.end());
    turn.reply = again.tokens.size();
    again.tokens.insert(again.tokens.end(), answer.begin(), answer.end());
    again.turns.push_back(std::move(turn));
  }
  return again;
}

// The newest token may have had no room, and needed none.
bool Conversation::fits(const Said& said) const {
  return std::ssize(said.tokens) <= std::int64_t{kv_.shape().capacity} + 1;
}

void Conversation::resume(Said said, const SavedRows* rows) {
  begin("");
  said_ = std::move(said);
  const int n_tokens = static_cast<int>(said_.tokens.size());
  const int end = rows ? std::min(rows->n_tokens(), n_tokens - kReadAgain) : 0;
  while (kv_.length() < end) {
    const int first = kv_.length();
    const int n = std::min(transformer_.max_rows(), end - first);
    const auto tokens = std::span(said_.tokens).subspan(static_cast<std::size_t>(first));
    transformer_.restore(
        tokens.first(static_cast<std::size_t>(n)), kv_,
        [&](int layer, std::span<float> k, std::span<float> v) { rows->load(layer, first, k, v); });
  }
  accepted_ = static_cast<std::size_t>(kv_.length());
  for (const TokenId id : std::span(said_.tokens).first(accepted_)) sampler_.accept(id);
}

void Conversation::cut(std::size_t n_tokens) {
  said_.tokens.resize(n_tokens);
  if (accepted_ > n_tokens) sampler_.forget(accepted_ - n_tokens), accepted_ = n_tokens;
  const int kept = static_cast<int>(n_tokens);
  if (kv_.length() > kept) kv_.rewind(kept);
}

}  // namespace thaw
