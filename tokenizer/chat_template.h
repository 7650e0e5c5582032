// Chat formats, recognised from the Jinja template that a model carries.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace thaw {

// LLaMA 2 and Mistral open a user's turn by [INST], Zephyr (and TinyLlama) by <|user|>: where these
// are no control tokens but text, a message can write them, too.
enum class ChatFormat { kNone, kLlama3, kChatML, kLlama2, kMistral, kZephyr };
inline constexpr const char* kChatFormats = "that of LLaMA 2 or 3, ChatML, Mistral or Zephyr";

// Whether each message, and an answer, begins with its role.
bool has_roles(ChatFormat format);

struct ChatMessage {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

// From the tokenizer's chat_template text, or else from the control tokens in its vocabulary.
ChatFormat recognise_chat_format(const Tokenizer& tokenizer);

// The system message that the model's own template inserts when the conversation has none, or "".
std::string default_system_message(const Tokenizer& tokenizer);

// Token ids of `messages` followed by the opening of the assistant's turn. Control tokens in the
// template become control tokens; text inside a message is never parsed for them, so that where
// marks are control tokens a message cannot forge a turn. Throws Error for kNone.
std::vector<TokenId> encode_chat(const Tokenizer& tokenizer, ChatFormat format,
                                 const std::vector<ChatMessage>& messages);

// The tokens of an answer, as encode_chat() has them within a conversation.
std::vector<TokenId> encode_answer(const Tokenizer& tokenizer, ChatFormat format,
                                   std::string_view text);

// What follows an answer's own tokens in a conversation: the end of its turn, the next message, and
// the opening of the assistant's next turn.
std::vector<TokenId> encode_reply(const Tokenizer& tokenizer, ChatFormat format,
                                  const ChatMessage& message);

}  // namespace thaw
