#include <doctest/doctest.h>

#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "device/error.h"
#include "tests/weights.h"
#include "tokenizer/bpe.h"
#include "tokenizer/long_text.h"
#include "tokenizer/pretokenizer.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

using Ids = std::vector<TokenId>;

// The 256 bytes as tokens 0 to 255, then `more`, of which each text token is made by the merge of
// its first byte (or the first part given) with the rest.
TokenizerSpec byte_spec() {
  TokenizerSpec spec;
  spec.source = "test";
  for (int byte = 0; byte < 256; ++byte) spec.tokens.emplace_back(1, static_cast<char>(byte));
  spec.kinds.assign(256, TokenKind::kText);
  spec.patterns = named_pretokenizer("gpt-2", "test").patterns;
  return spec;
}

TokenId add_token(TokenizerSpec& spec, std::string text, TokenKind kind = TokenKind::kText) {
  spec.tokens.push_back(std::move(text));
  spec.kinds.push_back(kind);
  return static_cast<TokenId>(spec.tokens.size()) - 1;
}

TokenId add_merge(TokenizerSpec& spec, TokenId left, TokenId right) {
  spec.merges.emplace_back(left, right);
  return add_token(spec, spec.tokens[static_cast<std::size_t>(left)] +
                             spec.tokens[static_cast<std::size_t>(right)]);
}

std::vector<std::string> pieces(const char* name, std::string_view text) {
  std::vector<std::string> out;
  Pretokenizer(named_pretokenizer(name, "test").patterns, "test")
      .split(text, [&](std::string_view piece) { out.emplace_back(piece); });
  return out;
}

// What byte-pair encoding is: merge the leftmost pair of lowest rank until there is none.
Ids merge_by_definition(const MergeTable& table, Ids symbols) {
  while (true) {
    std::size_t best = symbols.size();
    MergeTable::Merge merge;
    for (std::size_t i = 0; i + 1 < symbols.size(); ++i) {
      const MergeTable::Merge found = table.find(symbols[i], symbols[i + 1]);
      if (found.rank >= 0 && (best == symbols.size() || found.rank < merge.rank)) {
        best = i;
        merge = found;
      }
    }
    if (best == symbols.size()) return symbols;
    symbols[best] = merge.product;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST_CASE("merging is what byte-pair encoding defines, for random merges and lengths") {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const auto letters = static_cast<TokenId>(1 + random() % 3);
    const int merges = static_cast<int>(random() % 30);
    MergeTable table(static_cast<std::size_t>(merges));
    for (int rank = 0; rank < merges; ++rank) {
      const auto known = static_cast<unsigned>(letters + rank);
      table.add(static_cast<TokenId>(random() % known), static_cast<TokenId>(random() % known),
                {rank, letters + rank});
    }
    Ids symbols(random() % 120);
    for (TokenId& symbol : symbols) symbol = static_cast<TokenId>(random()) & 0x7fffffff;
    for (TokenId& symbol : symbols) symbol %= letters;
    Ids merged = {-7};
    merged.insert(merged.end(), symbols.begin(), symbols.end());
    Merger(table).merge(merged, 1);
    Ids expected = merge_by_definition(table, symbols);
    expected.insert(expected.begin(), -7);
    REQUIRE(merged == expected);
  }
}

TEST_CASE("lower ranks merge first, leftmost first among equals") {
  TokenizerSpec spec = byte_spec();
  const TokenId bc = add_merge(spec, 'b', 'c');
  const TokenId ab = add_merge(spec, 'a', 'b');
  const TokenId aa = add_merge(spec, 'a', 'a');
  const Tokenizer tokenizer(spec);
  CHECK(tokenizer.encode("abc") == Ids{'a', bc});
  CHECK(tokenizer.encode("ab") == Ids{ab});
  CHECK(tokenizer.encode("aaa") == Ids{aa, 'a'});
}

TEST_CASE("a piece that is a token skips the merges only with whole_pieces_first") {
  TokenizerSpec spec = byte_spec();
  add_merge(spec, 'a', 'b');
  const TokenId abc = add_token(spec, "abc");
  CHECK(Tokenizer(spec).encode("abc") == Ids{256, 'c'});
  spec.whole_pieces_first = true;
  CHECK(Tokenizer(spec).encode("abc") == Ids{abc});
}

TEST_CASE("with ranks of tokens any two neighbours that spell a token merge") {
  TokenizerSpec spec = byte_spec();
  const TokenId bc = add_token(spec, "bc");
  const TokenId ab = add_token(spec, "ab");
  const TokenId abc = add_token(spec, "abc");
  spec.ranks.assign(259, 0);
  CHECK(Tokenizer(spec).encode("abc") == Ids{abc});  // of equal ranks the leftmost
  std::iota(spec.ranks.begin(), spec.ranks.end(), 0);
  const Tokenizer tokenizer(spec);
  CHECK(tokenizer.encode("abc") == Ids{abc});
  CHECK(tokenizer.encode("abcab") == Ids{abc, ab});
  CHECK(tokenizer.encode("bcbc") == Ids{bc, bc});
}

TEST_CASE("control tokens are read only where asked, literal ones always, the longest first") {
  TokenizerSpec spec = byte_spec();
  const TokenId end = add_token(spec, "<end>", TokenKind::kControl);
  const TokenId ends = add_token(spec, "<end>s", TokenKind::kControl);
  const TokenId mark = add_token(spec, "##", TokenKind::kLiteral);
  spec.eog = {end};
  const Tokenizer tokenizer(spec);
  CHECK(tokenizer.encode("<end>") == Ids{'<', 'e', 'n', 'd', '>'});
  const Tokenizer::EncodeOptions parse = {.parse_special = true};
  CHECK(tokenizer.encode("a<end>b", parse) == Ids{'a', end, 'b'});
  CHECK(tokenizer.encode("<end>s<end<end>", parse) == Ids{ends, '<', 'e', 'n', 'd', end});
  CHECK(tokenizer.encode("a###") == Ids{'a', mark, '#'});
  CHECK(tokenizer.decode(Ids{'a', end, mark}) == "a##");
  CHECK(tokenizer.decode(Ids{'a', end, mark}, true) == "a<end>##");
  CHECK(tokenizer.is_eog(end));
  CHECK_FALSE(tokenizer.is_eog(ends));
  CHECK_FALSE(tokenizer.is_special(mark));
  CHECK(tokenizer.find("<end>s") == ends);
  CHECK(tokenizer.find("none") == -1);
}

TEST_CASE("begin of text comes first only with add_special, where the model wants it") {
  TokenizerSpec spec = byte_spec();
  spec.bos = add_token(spec, "<bos>", TokenKind::kControl);
  CHECK(Tokenizer(spec).encode("a", {.add_special = true}) == Ids{'a'});
  spec.add_bos = true;
  CHECK(Tokenizer(spec).encode("a", {.add_special = true}) == Ids{spec.bos, 'a'});
  CHECK(Tokenizer(spec).encode("a") == Ids{'a'});
}

TEST_CASE("every byte string survives the round trip, UTF-8 or not") {
  TokenizerSpec spec = byte_spec();
  add_merge(spec, 0xc3, 0xa9);
  const Tokenizer tokenizer(spec);
  std::mt19937 random(2);
  for (int round = 0; round < 2000; ++round) {
    std::string text(random() % 60, ' ');
    for (char& c : text) c = static_cast<char>(random() % 2 ? random() : 0xc0 + random() % 64);
    REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("bytes that are not UTF-8 are pieces of their own") {
  CHECK(pieces("gpt-2", "ab\xff\xfe c\xc3") ==
        std::vector<std::string>{"ab", "\xff\xfe", " c", "\xc3"});
  CHECK(invalid_utf8_prefix("\xed\xa0\x80") == 3);  // a surrogate
  CHECK(invalid_utf8_prefix("\xc0\xaf/") == 2);     // overlong
  CHECK(invalid_utf8_prefix("\xf4\x90\x80\x80") == 4);
  CHECK(valid_utf8_prefix("\xf4\x8f\xbf\xbf\xe2\x82") == 4);
}

TEST_CASE("a byte that the vocabulary lacks becomes unk, or nothing without one") {
  TokenizerSpec spec = byte_spec();
  spec.tokens[0xff] = "<unk>";
  spec.kinds[0xff] = TokenKind::kControl;
  CHECK(Tokenizer(spec).encode("a\xff") == Ids{'a'});
  CHECK(Tokenizer(spec).count_missing("a\xff\xff") == 2);
  spec.unk = 0xff;
  CHECK(Tokenizer(spec).encode("a\xff") == Ids{'a', 0xff});
}

TEST_CASE("pre-tokenizers keep what tells them apart") {
  using Pieces = std::vector<std::string>;
  CHECK(pieces("gpt-2", "I'll 1234") == Pieces{"I", "'ll", " 1234"});
  CHECK(pieces("smollm", "I'll 1234") == Pieces{"I", "'ll", " ", "1", "2", "3", "4"});
  CHECK(pieces("qwen2", "I'LL 12") == Pieces{"I", "'LL", " ", "1", "2"});
  CHECK(pieces("llama-bpe", "I'LL 1234\n") == Pieces{"I", "'LL", " ", "123", "4", "\n"});
  CHECK(pieces("llama3", "'\u017f x") == Pieces{"'\u017f", " x"});
  CHECK(pieces("gpt-2", "a \u180e") ==
        Pieces{"a", " \u180e"});  // not white space since Unicode 6.3
  CHECK(pieces("gpt-2", "\u1c89\U00031350") == Pieces{"\u1c89\U00031350"});  // letters since 15, 16
}

TEST_CASE("an unknown pre-tokenizer is named in the error") {
  CHECK_THROWS_WITH_AS(
      named_pretokenizer("tekken", "m.gguf"),
      "m.gguf: tokenizer.ggml.pre: expected llama-bpe, smollm, qwen2 or gpt-2, found "
      "\"tekken\"",
      Error);
}

TEST_CASE("regexes that PCRE2 would read otherwise are refused") {
  for (const char* pattern : {"[a&&b]", "[[:alpha:]]", "\\w+", "a{2}+", "(?<=a)b", "^a", "\\p{Han}",
                              "[^a", "(*UCP)a", "\\", "[\\S]", "a{,3}", "\\b", "(?R)"}) {
    CAPTURE(pattern);
    CHECK_THROWS_AS(to_pcre2(pattern, "test"), Error);
  }
  CHECK_THROWS_AS(Pretokenizer({"a*"}, "test"), Error);
  CHECK_THROWS_AS(Pretokenizer({"(a"}, "test"), Error);
  CHECK_THROWS_AS(Pretokenizer({std::string(5000, '(') + "a" + std::string(5000, ')')}, "test"),
                  Error);
}

TEST_CASE("a regex that never ends is stopped by an error") {
  const Pretokenizer slow({"(?:(?:a+)+)+b"}, "test");
  CHECK_THROWS_AS(slow.split(std::string(5000, 'a') + "cb", [](std::string_view) {}), Error);
}

TEST_CASE("a spec that contradicts itself is refused") {
  const auto refused = [](auto change) {
    TokenizerSpec spec = byte_spec();
    change(spec);
    CHECK_THROWS_AS(Tokenizer(std::move(spec)), Error);
  };
  refused([](TokenizerSpec& s) { s.tokens.clear(), s.kinds.clear(); });
  refused([](TokenizerSpec& s) { s.kinds.pop_back(); });
  refused([](TokenizerSpec& s) { s.bos = 256; });
  refused([](TokenizerSpec& s) { s.add_bos = true; });
  refused([](TokenizerSpec& s) { s.unk = -2; });
  refused([](TokenizerSpec& s) { s.eog = {-1}; });
  refused([](TokenizerSpec& s) { s.merges = {{0, 256}}; });
  refused([](TokenizerSpec& s) { s.merges = {{-1, 0}}; });
  refused([](TokenizerSpec& s) { s.merges = {{'a', 'b'}}; });  // makes no token
  refused([](TokenizerSpec& s) { s.tokens[1] = s.tokens[0]; });
  refused([](TokenizerSpec& s) { add_merge(s, 'a', 'b'), s.merges.push_back(s.merges[0]); });
  refused([](TokenizerSpec& s) {
    add_token(s, "ab", TokenKind::kControl), s.merges = {{'a', 'b'}};
  });
  refused([](TokenizerSpec& s) { add_token(s, std::string(2000, 'x'), TokenKind::kControl); });
}

TEST_CASE("an id outside the vocabulary cannot be decoded") {
  const Tokenizer tokenizer(byte_spec());
  CHECK_THROWS_WITH_AS(tokenizer.decode(256), "test: token id: expected 0 to 255, found 256",
                       Error);
  CHECK_THROWS_AS(tokenizer.decode(-1), Error);
}

TEST_CASE("long texts are cut as Meta's reader cuts them") {
  const auto parts = [](std::string_view text) {
    std::vector<std::string> out;
    split_long_text(text, 10, 3, [&](std::string_view part) { out.emplace_back(part); });
    return out;
  };
  using Parts = std::vector<std::string>;
  CHECK(parts("ab  cd  ef") == Parts{"ab  cd  ef"});
  CHECK(parts("ab  cd  efgh") == Parts{"ab  cd  ef", "gh"});
  CHECK(parts("abcdefg hi") == Parts{"abc", "def", "g hi"});
  CHECK(parts("a    \u3000b") == Parts{"a   ", " \u3000b"});
  CHECK(parts("\xff\xff\xff\xff") == Parts{"\xff\xff\xff", "\xff"});
}

// A quadratic step anywhere would take minutes to hours here.
TEST_CASE("a million of one byte, of letters, or of noise is no obstacle") {
  const auto path = weights_file(kLlama3TokenizerFile);
  if (!path) return;
  TokenizerSpec spec = read_tiktoken(*path);
  spec.max_part = spec.max_run = 0;
  const Tokenizer tokenizer(std::move(spec));
  std::mt19937 random(3);
  std::string noise(1'000'000, ' ');
  for (char& c : noise) c = static_cast<char>(random());
  std::string letters = noise;
  for (char& c : letters) c = static_cast<char>('a' + (c & 15));
  for (const std::string& text : {std::string(1'000'000, 'a'), std::string(1'000'000, ' ') + "a",
                                  std::string(1'000'000, '\n'), std::string(1'000'000, '7'),
                                  std::string(1'000'000, '\x80'), letters, noise}) {
    REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

}  // namespace
}  // namespace thaw
