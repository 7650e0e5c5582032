// BPE of bytes (LLaMA 3, SmolLM2) or of characters (SentencePiece: LLaMA 2, TinyLlama, Mistral):
// text to token ids and back.
//
// A tokenizer is built from one of three sources (GGUF metadata, a Hugging Face tokenizer.json, a
// tiktoken tokenizer.model), all reduced to the same TokenizerSpec. Encoding: cut out added tokens
// (control tokens only where asked), split the rest by the pre-tokenizer's regexes
// (pretokenizer.h), then merge the symbols of each piece by rank (bpe.h).
//
// SentencePiece has no regexes. It puts a space before a text, so that a word is the same token at
// the beginning and within; a character that no token spells becomes byte tokens. In its files a
// space is written as U+2581, here as itself.
//
// Invalid UTF-8 is no error: a maximal run of bytes that are not UTF-8 is a piece of its own. A
// vocabulary may lack single bytes (SmolLM2 lacks 21, among them 0xFF); as in Hugging Face's
// tokenizers such a byte becomes `unk`, or no token at all when there is no unk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace thaw {

using TokenId = std::int32_t;

enum class TokenKind : std::uint8_t {
  kText,     // made by merges
  kByte,     // SentencePiece: a byte of a character that is no token; merges never make one
  kLiteral,  // found whole in every text before it is split ("added token", not special)
  kControl,  // found whole only with parse_special; hidden on output; merges never make one
};

// Before which parts of a text, between added tokens, encode() puts a space.
enum class SpacePrefix : std::uint8_t { kNone, kFirst, kEach };

struct TokenizerSpec {
  std::string source;               // file it came from, for messages
  std::vector<std::string> tokens;  // raw bytes of token i (not in the file's alphabet)
  std::vector<TokenKind> kinds;     // of token i
  bool characters = false;          // symbols are characters, and bytes only where those lack
  SpacePrefix prefix = SpacePrefix::kNone;
  bool prefix_if_missing = false;  // only where the part does not begin with a space
  // Ranked merges, best first, as pairs of token ids; or else (tiktoken, SentencePiece) the rank of
  // token i: two neighbours merge when their concatenation is a token, lowest rank first.
  std::vector<std::pair<TokenId, TokenId>> merges;
  std::vector<std::int32_t> ranks;
  bool whole_pieces_first = false;    // "ignore_merges": a piece that is a token is that token
  std::vector<std::string> patterns;  // pre-tokenizer regexes, applied one after the other
  // Meta's reader of tiktoken files encodes long texts part by part: at most max_part code points,
  // and at most max_run of them in a row that are all white space or all not. 0: no limit.
  std::size_t max_part = 0;
  std::size_t max_run = 0;
  TokenId unk = -1;           // stands for a byte that no token spells, or -1
  TokenId bos = -1;           // begin of text, or -1
  bool add_bos = false;       // whether encode() with add_special prepends bos
  std::vector<TokenId> eog;   // every token that ends a generation
  std::string chat_template;  // Jinja source as stored, or empty
};

// What the name of a pre-tokenizer in a GGUF file stands for.
struct NamedPretokenizer {
  std::vector<std::string> patterns;
  bool whole_pieces_first = false;
  bool add_bos = false;  // unless the file says otherwise
};

// "llama-bpe" (LLaMA 3), "smollm", "qwen2", "gpt-2", and names that llama.cpp reads as one of them.
// Throws Error(SOURCE: ... found NAME) for any other.
NamedPretokenizer named_pretokenizer(std::string_view name, const std::string& source);

// Adds to spec.eog the control tokens that end a generation by a text known from published models,
// such as "<|eot_id|>" and "<|im_end|>".
void add_known_eog(TokenizerSpec& spec);

// From a Hugging Face tokenizer.json, with tokenizer_config.json, generation_config.json and
// chat_template.jinja beside it where present. Throws Error naming file, field, expected and found.
TokenizerSpec read_tokenizer_json(const std::filesystem::path& path);

// From a tiktoken tokenizer.model as LLaMA 3 has it, with that model's 256 special tokens. Throws
// Error naming file, line, expected and found.
TokenizerSpec read_tiktoken(const std::filesystem::path& path);

class Tokenizer {
 public:
  class Reader;
  explicit Tokenizer(TokenizerSpec spec);  // throws Error when the spec contradicts itself
  ~Tokenizer();
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;

  struct EncodeOptions {
    bool add_special = false;    // prepend bos where the model wants it
    bool parse_special = false;  // read "<|im_start|>" in the text as the control token
    bool continues = false;      // the text goes on from another: no space is put before it
  };
  // Any bytes, valid UTF-8 or not. decode(encode(x)) == x where count_missing(x) is 0; but
  // SentencePiece (as in Hugging Face's tokenizers) loses a space that x begins with where
  // prefix_if_missing, and gains one behind each added token where parts each get a prefix.
  // Takes O(n log n) and at most about 50 bytes of memory for each byte of text. Texts are below
  // 2 GiB.
  std::vector<TokenId> encode(std::string_view text, EncodeOptions options) const;
  std::vector<TokenId> encode(std::string_view text) const { return encode(text, {}); }

  // The bytes of a token; control tokens give "" unless show_special. Throws Error on an id
  // outside.
  std::string_view decode(TokenId id, bool show_special = false) const;
  // Of a text from its beginning on: without the space that encode() puts there.
  std::string decode(const std::vector<TokenId>& ids, bool show_special = false) const;

  int vocab_size() const;
  TokenId bos() const;
  bool is_special(TokenId id) const;                // a control token
  bool is_eog(TokenId id) const;                    // ends a generation
  TokenId find(std::string_view token_text) const;  // id of the token with these bytes, or -1
  // Bytes that no token spells; of a space mark of SentencePiece, the two that a space lacks.
  std::size_t count_missing(std::string_view text) const;
  const TokenizerSpec& spec() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The text of tokens, one after another.
class Tokenizer::Reader {
 public:
  // begins: whether a text begins with them, which then lacks the space that encode() put there.
  Reader(const Tokenizer& tokenizer, bool begins, bool show_special = false)
      : tokenizer_(tokenizer), begins_(begins), show_special_(show_special) {}
  std::string_view read(TokenId id);

 private:
  const Tokenizer& tokenizer_;
  bool begins_, show_special_;
};

}  // namespace thaw
