#include "tokenizer/chat_template.h"

#include <algorithm>

#include "device/error.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

constexpr std::string_view kLlama3Mark = "<|start_header_id|>";
constexpr std::string_view kChatMLMark = "<|im_start|>";
constexpr std::string_view kInstruction = "[INST]", kInstructionEnd = "[/INST]";

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

// The turns of a conversation as tokens. A system message of LLaMA 2 or Mistral stands within the
// user's first.
class Turns {
 public:
  Turns(const Tokenizer& tokenizer, ChatFormat format) : tokenizer_(tokenizer), format_(format) {
    require(format != ChatFormat::kNone, tokenizer.spec().source, ": chat template: expected ",
            kChatFormats, ", found another");
    close_ = control_token(tokenizer, format == ChatFormat::kLlama3   ? "<|eot_id|>"
                                      : format == ChatFormat::kChatML ? "<|im_end|>"
                                                                      : "</s>");
  }

  void begin(std::vector<TokenId>& ids) const {
    if (format_ != ChatFormat::kLlama2) append(ids, tokenizer_.encode("", {.add_special = true}));
  }

  void add(std::vector<TokenId>& ids, const ChatMessage& message) {
    if (has_roles(format_)) {
      open(ids, message.role, message.content);
      close(ids);
    } else if (message.role == "system") {
      system_ = message.content;
    } else if (message.role == "user") {
      instruct(ids, message.content);
    } else {
      append(ids, answer(message.content));
      close(ids);
    }
  }

  // What an answer follows.
  void open_answer(std::vector<TokenId>& ids) const {
    if (has_roles(format_)) open(ids, "assistant", "");
  }
  // Behind a message, or an answer's own tokens.
  void close(std::vector<TokenId>& ids) const {
    if (format_ == ChatFormat::kLlama2) append(ids, go_on(" "));
    ids.push_back(close_);
    if (format_ == ChatFormat::kChatML) append(ids, encode(ids, "\n"));
  }
  // An answer's own tokens.
  std::vector<TokenId> answer(std::string_view text) const {
    if (format_ == ChatFormat::kLlama2) return go_on(join(" ", trim(text)));
    if (has_marks_as_tokens()) return go_on(join(gap(), trim(text)));
    return go_on(text);
  }

 private:
  // As Mistral's vocabularies do since 0.3.
  bool has_marks_as_tokens() const {
    return format_ == ChatFormat::kMistral &&
           tokenizer_.is_special(tokenizer_.find(kInstruction)) &&
           tokenizer_.is_special(tokenizer_.find(kInstructionEnd));
  }

  // Behind a mark that is a token: a space, but in vocabularies of bytes (Mistral NeMo).
  const char* gap() const { return tokenizer_.spec().characters ? " " : ""; }

  // A part of the conversation, behind ids.
  std::vector<TokenId> encode(const std::vector<TokenId>& ids, std::string_view text) const {
    const bool once = tokenizer_.spec().prefix == SpacePrefix::kFirst;
    return tokenizer_.encode(text, {.continues = once && !ids.empty()});
  }
  // More of a part that has begun.
  std::vector<TokenId> go_on(std::string_view text) const {
    return tokenizer_.encode(text, {.continues = true});
  }

  void open(std::vector<TokenId>& ids, const std::string& role, std::string_view content) const {
    if (format_ == ChatFormat::kZephyr) {
      const bool first = ids.empty() || (ids.size() == 1 && ids[0] == tokenizer_.bos());
      return append(ids, encode(ids, join(first ? "" : "\n", "<|", role, "|>\n", content)));
    }
    ids.push_back(
        control_token(tokenizer_, format_ == ChatFormat::kLlama3 ? kLlama3Mark : kChatMLMark));
    if (format_ == ChatFormat::kChatML) return append(ids, encode(ids, join(role, "\n", content)));
    append(ids, encode(ids, role));
    ids.push_back(control_token(tokenizer_, "<|end_header_id|>"));
    append(ids, encode(ids, join("\n\n", trim(content))));
  }

  void instruct(std::vector<TokenId>& ids, std::string_view content) {
    std::string text(content);
    if (format_ == ChatFormat::kLlama2) {
      if (tokenizer_.bos() >= 0) ids.push_back(tokenizer_.bos());
      if (!system_.empty()) text = join("<<SYS>>\n", system_, "\n<</SYS>>\n\n", content);
      text = trim(text);
    } else if (!system_.empty()) {
      text = join(system_, "\n\n", content);
    }
    system_.clear();
    if (!has_marks_as_tokens())
      return append(ids, encode(ids, join(kInstruction, " ", text, " ", kInstructionEnd)));
    ids.push_back(tokenizer_.find(kInstruction));
    append(ids, go_on(join(gap(), text)));
    ids.push_back(tokenizer_.find(kInstructionEnd));
  }

  const Tokenizer& tokenizer_;
  ChatFormat format_;
  TokenId close_;
  std::string system_;  // that the next user's message begins with
};

}  // namespace

bool has_roles(ChatFormat format) {
  return format != ChatFormat::kLlama2 && format != ChatFormat::kMistral &&
         format != ChatFormat::kNone;
}

ChatFormat recognise_chat_format(const Tokenizer& tokenizer) {
  const std::string& jinja = tokenizer.spec().chat_template;
  const auto has = [&](std::string_view part) { return jinja.find(part) != std::string::npos; };
  if (has(kLlama3Mark)) return ChatFormat::kLlama3;
  if (has(kChatMLMark)) return ChatFormat::kChatML;
  if (has(kInstruction) && !has("[SYSTEM_PROMPT]"))
    return has("<<SYS>>") ? ChatFormat::kLlama2 : ChatFormat::kMistral;
  const bool text_roles = has("<|user|>") && !tokenizer.is_special(tokenizer.find("<|user|>"));
  if (text_roles && has("eos_token")) return ChatFormat::kZephyr;
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
  Turns turns(tokenizer, format);
  std::vector<TokenId> ids;
  turns.begin(ids);
  for (const ChatMessage& message : messages) turns.add(ids, message);
  turns.open_answer(ids);
  return ids;
}

std::vector<TokenId> encode_reply(const Tokenizer& tokenizer, ChatFormat format,
                                  const ChatMessage& message) {
  Turns turns(tokenizer, format);
  std::vector<TokenId> ids;
  turns.close(ids);
  turns.add(ids, message);
  turns.open_answer(ids);
  return ids;
}

std::vector<TokenId> encode_answer(const Tokenizer& tokenizer, ChatFormat format,
                                   std::string_view text) {
  return Turns(tokenizer, format).answer(text);
}

}  // namespace thaw
