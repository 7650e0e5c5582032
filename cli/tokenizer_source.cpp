#include "cli/tokenizer_source.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <unordered_map>
#include <utility>

#include "device/error.h"
#include "model/file_kind.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/sentencepiece.h"

namespace thaw {
namespace {

constexpr std::string_view kTokens = "tokenizer.ggml.tokens";
constexpr std::string_view kTypes = "tokenizer.ggml.token_type";
constexpr std::string_view kScores = "tokenizer.ggml.scores";
constexpr std::string_view kMerges = "tokenizer.ggml.merges";

// Types of the GGUF specification, "tokenizer.ggml.token_type".
TokenKind kind_of_type(std::int64_t type, const TokenizerSpec& spec, std::size_t id) {
  switch (type) {
    case 1:  // normal
      return TokenKind::kText;
    case 2:  // unknown
    case 3:
      return TokenKind::kControl;  // control
    case 4:
      return TokenKind::kLiteral;  // user defined
    case 5:                        // unused: padding, which no merge of bytes makes
      return spec.characters ? TokenKind::kControl : TokenKind::kText;
    case 6:
      if (spec.characters) return TokenKind::kByte;
      break;
    default:
      break;
  }
  fail(spec.source, ": ", kTypes, ": token ", id, ": expected 1 to ", spec.characters ? 6 : 5,
       ", found ", type);
}

// The bytes that a token of the file stands for.
std::string bytes_of(std::string_view text, TokenKind kind, const TokenizerSpec& spec,
                     std::size_t id) {
  if (!spec.characters)
    return kind == TokenKind::kText ? from_byte_alphabet(text) : std::string(text);
  if (kind == TokenKind::kControl) return std::string(text);
  if (kind != TokenKind::kByte) return from_space_marks(text);
  const auto byte = byte_named(text);
  require(byte.has_value(), spec.source, ": ", kTokens, ": token ", id,
          ": expected a byte such as <0x0A>, found \"", printable(text), "\"");
  return {*byte};
}

using Ids = std::unordered_map<std::string_view, TokenId>;  // by the text that the file has

Ids read_tokens(const Gguf& gguf, TokenizerSpec& spec) {
  const auto& tokens = gguf.strings(kTokens);
  const std::vector<std::int64_t> all_normal(gguf.has(kTypes) ? 0 : tokens.size(), 1);
  const auto& types = gguf.has(kTypes) ? gguf.integers(kTypes) : all_normal;
  require(types.size() == tokens.size(), spec.source, ": ", kTypes, ": expected ", tokens.size(),
          " as there are tokens, found ", types.size());
  Ids ids;
  ids.reserve(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const TokenKind kind = kind_of_type(types[i], spec, i);
    spec.kinds.push_back(kind);
    spec.tokens.push_back(bytes_of(tokens[i], kind, spec, i));
    const auto [it, added] = ids.emplace(tokens[i], static_cast<TokenId>(i));
    require(added, spec.source, ": ", kTokens, ": expected each token once, found \"",
            printable(tokens[i]), "\" as ", it->second, " and ", i);
  }
  return ids;
}

void read_merges(const Gguf& gguf, const Ids& ids, TokenizerSpec& spec) {
  const auto& merges = gguf.strings(kMerges);
  spec.merges.reserve(merges.size());
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const std::string_view merge = merges[i];
    const std::size_t space = merge.find(' ');  // the alphabet has no space
    require(space != std::string_view::npos, spec.source, ": ", kMerges, ": merge ", i,
            ": expected two tokens with a space between, found \"", printable(merge), "\"");
    const auto id = [&](std::string_view token) {
      const auto it = ids.find(token);
      require(it != ids.end(), spec.source, ": ", kMerges, ": merge ", i,
              ": expected tokens of the vocabulary, found \"", printable(token), "\"");
      return it->second;
    };
    spec.merges.emplace_back(id(merge.substr(0, space)), id(merge.substr(space + 1)));
  }
}

// Tokens, and ranks by their scores: the highest merges first, equal ones from the left.
void read_sentencepiece(const Gguf& gguf, TokenizerSpec& spec) {
  read_tokens(gguf, spec);
  const auto& scores = gguf.reals(kScores);
  require(scores.size() == spec.tokens.size(), spec.source, ": ", kScores, ": expected ",
          spec.tokens.size(), " as there are tokens, found ", scores.size());
  for (std::size_t i = 0; i < scores.size(); ++i)
    require(std::isfinite(scores[i]), spec.source, ": ", kScores, ": token ", i,
            ": expected a finite number, found ", scores[i]);
  std::vector<std::size_t> order(scores.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return scores[a] > scores[b]; });
  spec.ranks.resize(scores.size());
  for (std::size_t i = 1; i < order.size(); ++i)
    spec.ranks[order[i]] = spec.ranks[order[i - 1]] + (scores[order[i]] < scores[order[i - 1]]);
  constexpr std::string_view kTrims = "tokenizer.ggml.remove_extra_whitespaces";
  require(!gguf.boolean(kTrims, false), spec.source, ": ", kTrims, ": expected false, found true");
  if (gguf.boolean("tokenizer.ggml.add_space_prefix", true)) spec.prefix = SpacePrefix::kEach;
}

// The token id under "tokenizer.ggml.NAME_token_id", or -1 when the file has none.
TokenId token_id(const Gguf& gguf, const std::string& name, const TokenizerSpec& spec) {
  const std::string key = "tokenizer.ggml." + name + "_token_id";
  if (!gguf.has(key)) return -1;
  const std::int64_t id = gguf.integer(key);
  require(id >= 0 && id < static_cast<std::int64_t>(spec.tokens.size()), spec.source, ": ", key,
          ": expected a token id below ", spec.tokens.size(), ", found ", id);
  return static_cast<TokenId>(id);
}

TokenizerSpec directory_spec(const std::filesystem::path& directory) {
  for (const char* name : {"tokenizer.json", "tokenizer.model"}) {
    const std::filesystem::path path = directory / name;
    if (std::error_code none; !std::filesystem::exists(path, none)) continue;
    return path.extension() == ".json" ? read_tokenizer_json(path) : read_tiktoken(path);
  }
  fail(directory.string(), ": expected tokenizer.json or tokenizer.model in it, found neither");
}

enum class Format { kGguf, kJson, kTiktoken };

// Of the file at `path`, which is mapped no longer than this looks: who reads it maps it again.
Format format_of(const std::filesystem::path& path) {
  const MappedFile file(path);
  const std::string_view mistake = mistaken_for(file.bytes());
  require(mistake.empty(), path.string(), ": expected a tokenizer, found ", mistake);
  const std::string_view bytes(reinterpret_cast<const char*>(file.bytes().data()),
                               file.bytes().size());
  if (bytes.starts_with("GGUF")) return Format::kGguf;
  const std::size_t first = bytes.find_first_not_of(" \t\r\n");
  const bool json = first != std::string_view::npos && bytes[first] == '{';
  return json ? Format::kJson : Format::kTiktoken;
}

TokenizerSpec spec_at(const std::filesystem::path& path) {
  if (std::error_code none; std::filesystem::is_directory(path, none)) {
    return directory_spec(path);
  }
  switch (format_of(path)) {
    case Format::kGguf:
      return tokenizer_spec(Gguf(path));
    case Format::kJson:
      return read_tokenizer_json(path);
    case Format::kTiktoken:
      break;
  }
  return read_tiktoken(path);
}

}  // namespace

TokenizerSpec tokenizer_spec(const Gguf& gguf) {
  TokenizerSpec spec;
  spec.source = gguf.path().string();
  const std::string_view model = gguf.string("tokenizer.ggml.model");
  require(
      model == "gpt2" || model == "llama", spec.source,
      ": tokenizer.ggml.model: expected gpt2 (byte-level BPE) or llama (SentencePiece), found \"",
      printable(model), "\"");
  spec.characters = model == "llama";
  bool adds_bos = spec.characters;
  if (spec.characters) {
    read_sentencepiece(gguf, spec);
  } else {
    const NamedPretokenizer named =
        named_pretokenizer(gguf.string("tokenizer.ggml.pre"), spec.source);
    spec.patterns = named.patterns;
    spec.whole_pieces_first = named.whole_pieces_first;
    adds_bos = named.add_bos;
    read_merges(gguf, read_tokens(gguf, spec), spec);
  }
  spec.bos = token_id(gguf, "bos", spec);
  spec.add_bos = gguf.boolean("tokenizer.ggml.add_bos_token", adds_bos && spec.bos >= 0);
  for (const char* name : {"eos", "eot", "eom"}) {
    const TokenId id = token_id(gguf, name, spec);
    if (id >= 0 && std::find(spec.eog.begin(), spec.eog.end(), id) == spec.eog.end()) {
      spec.eog.push_back(id);
    }
  }
  add_known_eog(spec);
  spec.chat_template = gguf.string("tokenizer.chat_template", "");
  return spec;
}

Tokenizer load_tokenizer(const std::filesystem::path& path) { return Tokenizer(spec_at(path)); }

Tokenizer load_tokenizer(const Model& model) {
  TokenizerSpec spec = model.gguf ? tokenizer_spec(*model.gguf) : directory_spec(model.path);
  const auto rows = static_cast<std::size_t>(model.config.vocab_size);
  require(spec.tokens.size() <= rows, spec.source, ": tokens: expected at most ", rows,
          " as the embedding has rows, found ", spec.tokens.size());
  spec.tokens.resize(rows);
  spec.kinds.resize(rows, TokenKind::kText);
  if (!spec.ranks.empty()) spec.ranks.resize(rows);
  return Tokenizer(std::move(spec));
}

}  // namespace thaw
