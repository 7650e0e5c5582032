// Byte-level BPE: text to token ids and back.
//
// A tokenizer is built from one of three sources (GGUF metadata, a Hugging Face tokenizer.json, a
// tiktoken tokenizer.model), all reduced to the same TokenizerSpec. Encoding: cut out special tokens
// (only where asked), split the rest by the pre-tokenizer's regex (PCRE2), then merge the bytes of
// each piece by rank with a priority queue, O(n log n).
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace thaw {

using TokenId = std::int32_t;

struct TokenizerSpec {
  std::string source;                // file it came from, for messages
  std::vector<std::string> tokens;   // raw bytes of token i (not the GPT-2 byte alphabet)
  std::vector<bool> special;         // control tokens: matched only when parse_special, hidden on output
  // Ranked merges, best first, as pairs of token ids; empty for tiktoken files, where the rank of a
  // token is its id and any two neighbours whose concatenation is a token may merge.
  std::vector<std::pair<TokenId, TokenId>> merges;
  bool whole_pieces_first = false;   // "ignore_merges": a piece that is a token is that token
  std::vector<std::string> patterns; // pre-tokenizer regexes, applied one after the other
  TokenId bos = -1;                  // begin of text, or -1
  bool add_bos = false;              // whether encode() with add_special prepends bos
  std::vector<TokenId> eog;          // every token that ends a generation
  std::string chat_template;         // Jinja source as stored, or empty
};

// The regexes of a named pre-tokenizer: "llama-bpe" (LLaMA 3), "smollm", "qwen2", "gpt-2".
// Throws Error(SOURCE: ... found NAME) for any other.
std::vector<std::string> pretokenizer_patterns(std::string_view name, const std::string& source);

// From a Hugging Face tokenizer.json (with tokenizer_config.json, special_tokens_map.json and
// generation_config.json beside it where present), or from a tiktoken tokenizer.model with the LLaMA-3
// special tokens. Throw Error naming file, field, expected and found.
TokenizerSpec read_tokenizer_json(const std::filesystem::path& path);
TokenizerSpec read_tiktoken(const std::filesystem::path& path);

class Tokenizer {
 public:
  explicit Tokenizer(TokenizerSpec spec);  // throws Error when the spec contradicts itself
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  struct EncodeOptions {
    bool add_special = false;    // prepend bos where the model wants it
    bool parse_special = false;  // read "<|im_start|>" in the text as the control token
  };
  // Any bytes, valid UTF-8 or not; decode(encode(x)) == x.
  std::vector<TokenId> encode(std::string_view text, EncodeOptions options) const;
  std::vector<TokenId> encode(std::string_view text) const { return encode(text, {}); }

  // The bytes of a token; special tokens give "" unless show_special. Throws Error on an id outside.
  std::string_view decode(TokenId id, bool show_special = false) const;
  std::string decode(const std::vector<TokenId>& ids, bool show_special = false) const;

  int vocab_size() const;
  TokenId bos() const;
  bool is_special(TokenId id) const;
  bool is_eog(TokenId id) const;                   // ends a generation
  TokenId find(std::string_view token_text) const; // id of the token with these bytes, or -1
  const TokenizerSpec& spec() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace thaw
