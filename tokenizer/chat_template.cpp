#include "tokenizer/chat_template.h"

#include <algorithm>

#include "device/error.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

constexpr std::string_view kLlama3Mark = "<|start_header_id|>";
constexpr std::string_view kChatMLMark = "<|im_start|>";

TokenId control_token(const Tokenizer& tokenizer, std::string_view text) {
  const TokenId id = tokenizer.find(text);
  require(tokenizer.is_special(id), tokenizer.spec().source,
          ": chat template: expected a control token ", text, " in the vocabulary, found none");
  return id;
}

void append(std::vector<TokenId>& ids, const std::vector<TokenId>& more) {
  ids.insert(ids.end(), more.begin(), more.end());
}

// `text` without the white space at its two ends, as Jinja's filter `trim`.
std::string_view trim(std::string_view text) {
  std::size_t begin = text.size(), end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    const std::size_t next = at + (c.bytes > 0 ? c.bytes : 1);
    if (c.bytes == 0 || !is_space(c.value)) {
      begin = std::min(begin, at);
      end = next;
    }
    at = next;
  }
  return begin < end ? text.substr(begin, end - begin) : std::string_view();
}

// The string literal of a Jinja template up to its closing quote, with its escapes read.
std::string unescape(std::string_view literal) {
  std::string text;
  for (std::size_t i = 0; i < literal.size(); ++i) {
    if (literal[i] == '\\' && i + 1 < literal.size()) {
      const char next = literal[++i];
      text += next == 'n' ? '\n' : next == 't' ? '\t' : next;
    } else {
      text += literal[i];
    }
  }
  return text;
}

// The string literals of a Jinja template: what stands in quotes inside {{ }} or {% %}.
std::vector<std::string> string_literals(std::string_view jinja) {
  std::vector<std::string> literals;
  for (std::size_t at = 0; (at = jinja.find('{', at)) != std::string_view::npos;) {
    const std::string_view begins = jinja.substr(at, 2);
    at += 1;
    if (begins != "{{" && begins != "{%") continue;
    for (at += 1; at < jinja.size();) {
      const std::string_view two = jinja.substr(at, 2);
      if (two == "}}" || two == "%}") break;
      const char quote = jinja[at++];
      if (quote != '\'' && quote != '"') continue;
      const std::size_t begin = at;
      while (at < jinja.size() && jinja[at] != quote) at += jinja[at] == '\\' ? 2 : 1;
      at = std::min(at, jinja.size());
      literals.push_back(unescape(jinja.substr(begin, at - begin)));
      ++at;
    }
  }
  return literals;
}

// The turns of a conversation as tokens.
class Turns {
 public:
  Turns(const Tokenizer& tokenizer, ChatFormat format)
      : tokenizer_(tokenizer), llama3_(format == ChatFormat::kLlama3) {
    require(format != ChatFormat::kNone, tokenizer.spec().source,
            ": chat template: expected LLaMA-3 or ChatML, found neither");
    open_ = control_token(tokenizer, llama3_ ? kLlama3Mark : kChatMLMark);
    close_ = control_token(tokenizer, llama3_ ? "<|eot_id|>" : "<|im_end|>");
  }

  void open(std::vector<TokenId>& ids, const std::string& role, std::string_view content) const {
    ids.push_back(open_);
    if (llama3_) {
      append(ids, tokenizer_.encode(role));
      ids.push_back(control_token(tokenizer_, "<|end_header_id|>"));
      append(ids, tokenizer_.encode(join("\n\n", trim(content))));
    } else {
      append(ids, tokenizer_.encode(join(role, "\n", content)));
    }
  }

  void close(std::vector<TokenId>& ids) const {
    ids.push_back(close_);
    if (!llama3_) append(ids, tokenizer_.encode("\n"));
  }

  void add(std::vector<TokenId>& ids, const ChatMessage& message) const {
    open(ids, message.role, message.content);
    close(ids);
  }

 private:
  const Tokenizer& tokenizer_;
  bool llama3_;
  TokenId open_, close_;
};

}  // namespace

ChatFormat recognise_chat_format(const Tokenizer& tokenizer) {
  const std::string& jinja = tokenizer.spec().chat_template;
  if (jinja.find(kLlama3Mark) != std::string::npos) return ChatFormat::kLlama3;
  if (jinja.find(kChatMLMark) != std::string::npos) return ChatFormat::kChatML;
  if (!jinja.empty()) return ChatFormat::kNone;
  if (tokenizer.is_special(tokenizer.find(kLlama3Mark))) return ChatFormat::kLlama3;
  if (tokenizer.is_special(tokenizer.find(kChatMLMark))) return ChatFormat::kChatML;
  return ChatFormat::kNone;
}

std::string default_system_message(const Tokenizer& tokenizer) {
  constexpr std::string_view kOpen = "<|im_start|>system\n", kClose = "<|im_end|>";
  for (const std::string& literal : string_literals(tokenizer.spec().chat_template)) {
    const std::size_t open = literal.find(kOpen);
    if (open == std::string::npos) continue;
    const std::size_t begin = open + kOpen.size();
    const std::size_t end = literal.find(kClose, begin);
    if (end != std::string::npos) return literal.substr(begin, end - begin);
  }
  return "";
}

std::vector<TokenId> encode_chat(const Tokenizer& tokenizer, ChatFormat format,
                                 const std::vector<ChatMessage>& messages) {
  const Turns turns(tokenizer, format);
  std::vector<TokenId> ids = tokenizer.encode("", {.add_special = true});
  for (const ChatMessage& message : messages) turns.add(ids, message);
  turns.open(ids, "assistant", "");
  return ids;
}

std::vector<TokenId> encode_reply(const Tokenizer& tokenizer, ChatFormat format,
                                  const ChatMessage& message) {
  const Turns turns(tokenizer, format);
  std::vector<TokenId> ids;
  turns.close(ids);
  turns.add(ids, message);
  turns.open(ids, "assistant", "");
  return ids;
}

}  // namespace thaw
