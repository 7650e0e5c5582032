// Any bytes as text, under each pre-tokenizer and with SentencePiece: they come back, but for its
// space marks, and no control token appears unasked.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <vector>

#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

namespace {

// All bytes, every pair of lower-case letters and of spaces as a merge, and a control token.
thaw::Tokenizer make_tokenizer(const char* name) {
  const thaw::NamedPretokenizer named = thaw::named_pretokenizer(name, "fuzz");
  thaw::TokenizerSpec spec;
  spec.source = "fuzz";
  spec.patterns = named.patterns;
  spec.whole_pieces_first = named.whole_pieces_first;
  for (int byte = 0; byte < 256; ++byte) spec.tokens.emplace_back(1, static_cast<char>(byte));
  for (const char* letters : {"abcdefghijklmnopqrstuvwxyz", " \n\t'.", "0123456789"}) {
    for (const char a : std::string_view(letters)) {
      for (const char b : std::string_view(letters)) {
        spec.merges.emplace_back(a, b);
        spec.tokens.push_back({a, b});
      }
    }
  }
  spec.kinds.assign(spec.tokens.size(), thaw::TokenKind::kText);
  spec.tokens.emplace_back("<|end|>");
  spec.kinds.push_back(thaw::TokenKind::kControl);
  return thaw::Tokenizer(std::move(spec));
}

// Byte tokens, and merges by rank of characters.
thaw::Tokenizer make_sentencepiece() {
  thaw::TokenizerSpec spec;
  spec.source = "fuzz";
  spec.characters = true;
  spec.prefix = thaw::SpacePrefix::kEach;
  for (int byte = 0; byte < 256; ++byte) spec.tokens.emplace_back(1, static_cast<char>(byte));
  spec.kinds.assign(256, thaw::TokenKind::kByte);
  for (const char* text : {" ", "a", "b", "\n", "\xc3\xa9", " a", "ab", " ab", "  ", "    ",
                           "\xc3\xa9"
                           "a"})
    spec.tokens.emplace_back(text);
  spec.kinds.resize(spec.tokens.size(), thaw::TokenKind::kText);
  for (std::size_t id = 0; id < spec.tokens.size(); ++id)
    spec.ranks.push_back(static_cast<std::int32_t>(id / 2));
  return thaw::Tokenizer(std::move(spec));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::vector<thaw::Tokenizer> tokenizers = [] {
    std::vector<thaw::Tokenizer> all;
    for (const char* name : {"smollm", "llama-bpe", "qwen2", "gpt-2"}) {
      all.push_back(make_tokenizer(name));
    }
    return all;
  }();
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  for (const thaw::Tokenizer& tokenizer : tokenizers) {
    const auto ids = tokenizer.encode(text);
    if (tokenizer.decode(ids) != text) std::abort();
    const auto parsed = tokenizer.encode(text, {.parse_special = true});
    if (tokenizer.decode(parsed, true) != text) std::abort();
  }
  static const thaw::Tokenizer sentencepiece = make_sentencepiece();
  if (sentencepiece.decode(sentencepiece.encode(text)) != thaw::from_space_marks(text))
    std::abort();
  return 0;
}
