// A conversation with a model: what was said, as text and as tokens, and the store that holds it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "cli/input.h"
#include "kvstore/saved_rows.h"
#include "model/forward.h"
#include "model/generate.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

// What was said.
struct Said {
  struct Turn {
    std::string message, answer;
    std::size_t first, reply;  // tokens of the conversation before it, and before its answer
  };
  std::string system;  // its message, or "" for none
  std::vector<Turn> turns;
  std::vector<TokenId> tokens;  // of all that, and what stands between
};

class Conversation {
 public:
  // All must outlive this; kv is empty. Throws Error when the tokenizer has no chat format.
  Conversation(const Tokenizer& tokenizer, Transformer& transformer, KvStore& kv,
               const SamplerOptions& sampler);

  // Adds a turn, of which the store has nothing yet. Throws Error when its tokens do not fit what
  // the store has room for; nothing is changed then.
  void add(const Input& message);

  // Writes the answer to the message that was added last; `write` gets its text as it comes, in
  // whole characters, before options.on_token sees its tokens. Throws what generate() does; then
  // there is no answer, and all that may follow is to save what was said.
  Generation answer(GenerateOptions options, const std::function<void(std::string_view)>& write);

  bool undo();                     // takes back the last turn; false when there is none
  bool unanswer();                 // takes back the last turn's answer; likewise
  void begin(std::string system);  // takes back all

  // Becomes the conversation of `said`, whose keys and values are `rows`, as far as they go; the
  // last kReadAgain tokens are read with the next message all the same, as the policies go by whom
  // they attend. fits() must be true: all of it fits the store.
  static constexpr int kReadAgain = 32;
  void resume(Said said, const SavedRows* rows);
  bool fits(const Said& said) const;
  // The same turns in the tokens of this tokenizer.
  Said encoded(Said said) const;

  const Said& said() const { return said_; }  // of the tokens, the store has the first
  const KvStore& kv() const { return kv_; }

 private:
  void cut(std::size_t n_tokens);
  std::vector<TokenId> encode(const std::string& message, const Said& before) const;

  const Tokenizer& tokenizer_;
  const ChatFormat format_;
  Transformer& transformer_;
  KvStore& kv_;
  Sampler sampler_;
  Said said_;
  std::size_t accepted_ = 0;  // of the tokens, what the sampler was told of
};

}  // namespace thaw
