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

class Conversation {
 public:
  struct Turn {
    std::string message, answer;
    std::size_t first;  // tokens of the conversation before it
  };

  // system: its message, or "" for none. All else must outlive this; kv is empty. Throws Error when
  // the tokenizer has no chat format.
  Conversation(const Tokenizer& tokenizer, Transformer& transformer, KvStore& kv,
               const SamplerOptions& sampler, std::string system);

  // Tokens of `message` and all around it that do not stand in the store yet. Throws Error when
  // they do not fit what the store has room for; nothing is changed then.
  void add(const Input& message);

  // Writes the answer to the message that was added last; `write` gets its text as it comes, in
  // whole characters, before options.on_token sees its tokens. The turn is taken back where Ctrl-C
  // came before the first token.
  Generation answer(GenerateOptions options, const std::function<void(std::string_view)>& write);

  bool undo();   // takes back the last turn; false when there is none
  void clear();  // takes back all

  // Becomes the conversation of these. Of the tokens, which are those of the turns, keys and values
  // are `rows`, as far as they go; the last kReadAgain are read with the next message all the same,
  // as the policies go by whom they attend. No tokens: the turns' text is encoded. Throws Error,
  // with nothing changed, when there are more tokens than the store has room for.
  static constexpr int kReadAgain = 32;
  void resume(std::string system, std::vector<Turn> turns, std::vector<TokenId> tokens,
              const SavedRows& rows);

  const std::string& system() const { return system_; }
  const std::vector<Turn>& turns() const { return turns_; }
  const std::vector<TokenId>& tokens() const { return tokens_; }  // known; the store has the first
  const KvStore& kv() const { return kv_; }

 private:
  void cut(std::size_t n_tokens);
  std::vector<TokenId> encode(const std::string& message, bool is_first,
                              const std::string& system) const;

  const Tokenizer& tokenizer_;
  const ChatFormat format_;
  Transformer& transformer_;
  KvStore& kv_;
  Sampler sampler_;
  std::string system_;
  std::vector<Turn> turns_;
  std::vector<TokenId> tokens_;
  std::size_t accepted_ = 0;  // of those, what the sampler was told of
};

}  // namespace thaw
