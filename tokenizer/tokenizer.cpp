#include "tokenizer/tokenizer.h"

#include <algorithm>
#include <array>
#include <limits>
#include <unordered_map>

#include "device/error.h"
#include "tokenizer/added_tokens.h"
#include "tokenizer/bpe.h"
#include "tokenizer/long_text.h"
#include "tokenizer/pretokenizer.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

using TokenMap = std::unordered_map<std::string_view, TokenId>;

constexpr std::size_t kMaxAddedToken = 1024;   // bytes; keeps the search for them fast
constexpr std::size_t kMaxRankedToken = 1024;  // bytes; each place to cut it is tried

std::string token_name(const TokenizerSpec& spec, TokenId id) {
  return join("token ", id, " \"", printable(spec.tokens[static_cast<std::size_t>(id)]), "\"");
}

TokenKind kind_of(const TokenizerSpec& spec, TokenId id) {
  return spec.kinds[static_cast<std::size_t>(id)];
}

void check_ids(const TokenizerSpec& spec) {
  const std::string& source = spec.source;
  require(!spec.tokens.empty(), source, ": tokens: expected at least one, found none");
  require(spec.tokens.size() <= std::numeric_limits<TokenId>::max(), source,
          ": tokens: expected fewer than 2^31, found ", spec.tokens.size());
  require(spec.kinds.size() == spec.tokens.size(), source, ": token kinds: expected ",
          spec.tokens.size(), ", found ", spec.kinds.size());
  const auto count = static_cast<TokenId>(spec.tokens.size());
  const auto check = [&](const char* name, TokenId id, TokenId least) {
    require(id >= least && id < count, source, ": ", name, ": expected a token id below ", count,
            ", found ", id);
  };
  check("bos", spec.bos, -1);
  check("unk", spec.unk, -1);
  for (const TokenId id : spec.eog) check("end of generation", id, 0);
  require(spec.ranks.empty() || spec.ranks.size() == spec.tokens.size(), source,
          ": token ranks: expected ", spec.tokens.size(), ", found ", spec.ranks.size());
  for (const auto& [left, right] : spec.merges) {
    check("merge", left, 0);
    check("merge", right, 0);
  }
  require(!spec.add_bos || spec.bos >= 0, source, ": expected a begin-of-text token, found none");
}

// The tokens of byte i; -1 where the vocabulary lacks it.
std::array<TokenId, 256> map_bytes(const TokenizerSpec& spec) {
  std::array<TokenId, 256> map;
  map.fill(-1);
  const TokenKind kind = spec.characters ? TokenKind::kByte : TokenKind::kText;
  for (TokenId id = 0; id < static_cast<TokenId>(spec.tokens.size()); ++id) {
    const std::string& text = spec.tokens[static_cast<std::size_t>(id)];
    if (text.size() == 1 && kind_of(spec, id) == kind)
      map[static_cast<unsigned char>(text[0])] = id;
  }
  const auto n = std::count_if(map.begin(), map.end(), [](TokenId id) { return id >= 0; });
  if (spec.characters)
    require(n == 256, spec.source, ": byte tokens: expected <0x00> to <0xFF>, found ", n);
  require(n > 0 || spec.unk >= 0, spec.source,
          ": tokens: expected one for each of the 256 bytes, found none of them");
  return map;
}

// The tokens that `wanted` picks, by their bytes; empty ones are padding.
template <class Wanted>
TokenMap map_tokens(const TokenizerSpec& spec, Wanted wanted) {
  TokenMap map;
  map.reserve(spec.tokens.size());
  for (TokenId id = 0; id < static_cast<TokenId>(spec.tokens.size()); ++id) {
    const std::string& text = spec.tokens[static_cast<std::size_t>(id)];
    if (text.empty() || !wanted(kind_of(spec, id))) continue;
    const auto [it, added] = map.emplace(text, id);
    if (!added)
      fail(spec.source, ": tokens: expected each once, found ", token_name(spec, it->second),
           " again as token ", id);
  }
  return map;
}

AddedTokens added_tokens(const TokenizerSpec& spec, const TokenMap& added, bool control) {
  std::vector<std::pair<std::string_view, TokenId>> tokens;
  for (const auto& [text, id] : added) {
    require(text.size() <= kMaxAddedToken, spec.source, ": ", token_name(spec, id),
            ": expected at most ", kMaxAddedToken, " bytes, found ", text.size());
    if (control || kind_of(spec, id) == TokenKind::kLiteral) tokens.emplace_back(text, id);
  }
  return AddedTokens(std::move(tokens));
}

TokenId lookup(const TokenMap& map, std::string_view text) {
  const auto it = map.find(text);
  return it == map.end() ? -1 : it->second;
}

// Every way to cut a token into two tokens is a merge, ranked as what it makes.
MergeTable merges_by_product(const TokenizerSpec& spec, const TokenMap& text_tokens) {
  std::vector<std::array<TokenId, 3>> merges;  // left, right, product
  for (const auto& [text, id] : text_tokens) {
    if (text.size() > kMaxRankedToken)
      fail(spec.source, ": ", token_name(spec, id), ": expected at most ", kMaxRankedToken,
           " bytes, found ", text.size());
    for (std::size_t cut = 1; cut < text.size(); ++cut) {
      const TokenId left = lookup(text_tokens, text.substr(0, cut));
      if (left < 0) continue;
      const TokenId right = lookup(text_tokens, text.substr(cut));
      if (right >= 0) merges.push_back({left, right, id});
    }
  }
  MergeTable table(merges.size());
  for (const auto& [left, right, id] : merges)
    table.add(left, right, {spec.ranks[static_cast<std::size_t>(id)], id});
  return table;
}

// What may be wrong is put into words only once it is: there are as many merges as tokens.
MergeTable merges_by_rank(const TokenizerSpec& spec, const TokenMap& text_tokens,
                          const TokenMap& added) {
  MergeTable table(spec.merges.size());
  for (std::size_t rank = 0; rank < spec.merges.size(); ++rank) {
    const auto [left, right] = spec.merges[rank];
    const std::string text =
        spec.tokens[static_cast<std::size_t>(left)] + spec.tokens[static_cast<std::size_t>(right)];
    const auto where = [&] { return join(spec.source, ": merge ", rank); };
    TokenId product = lookup(text_tokens, text);
    if (product < 0) product = lookup(added, text);
    if (product < 0) fail(where(), ": expected to make a token, found \"", printable(text), "\"");
    if (kind_of(spec, product) == TokenKind::kControl)
      fail(where(), ": expected to make a text token, found the control ",
           token_name(spec, product));
    if (!table.add(left, right, {static_cast<std::int32_t>(rank), product}))
      fail(where(), ": expected each merge once, found ", token_name(spec, left), " with ",
           token_name(spec, right), " again");
  }
  return table;
}

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerSpec s);

  void encode_part(std::string_view text, const EncodeOptions& options, Merger& merger,
                   std::vector<TokenId>& out) const;
  bool wants_prefix(std::string_view text, bool first) const;
  void encode_plain(std::string_view text, Merger& merger, std::vector<TokenId>& out) const;
  void encode_piece(std::string_view piece, Merger& merger, std::vector<TokenId>& out) const;
  void add_bytes(std::string_view bytes, std::vector<TokenId>& out) const;
  void add_characters(std::string_view piece, std::vector<TokenId>& out) const;

  TokenizerSpec spec;
  TokenMap text_tokens;  // by their bytes, which lie in spec
  TokenMap added;        // literal and control tokens
  AddedTokens literals;
  AddedTokens literals_and_controls;
  MergeTable merges;
  Pretokenizer pretokenizer;
  std::array<TokenId, 256> byte_tokens;  // -1 where the vocabulary lacks the byte
  std::vector<bool> eog;                 // of token i
};

Tokenizer::Impl::Impl(TokenizerSpec s)
    : spec((check_ids(s), std::move(s))),
      text_tokens(map_tokens(spec, [](TokenKind kind) { return kind == TokenKind::kText; })),
      added(map_tokens(spec,
                       [](TokenKind kind) {
                         return kind == TokenKind::kLiteral || kind == TokenKind::kControl;
                       })),
      literals(added_tokens(spec, added, false)),
      literals_and_controls(added_tokens(spec, added, true)),
      merges(spec.ranks.empty() ? merges_by_rank(spec, text_tokens, added)
                                : merges_by_product(spec, text_tokens)),
      pretokenizer(spec.patterns, spec.source),
      byte_tokens(map_bytes(spec)),
      eog(spec.tokens.size()) {
  for (const TokenId id : spec.eog) eog[static_cast<std::size_t>(id)] = true;
}

// One part of a long text: added tokens, and what lies between them.
void Tokenizer::Impl::encode_part(std::string_view text, const EncodeOptions& options,
                                  Merger& merger, std::vector<TokenId>& out) const {
  const AddedTokens& wanted = options.parse_special ? literals_and_controls : literals;
  for (std::size_t at = 0; at < text.size();) {
    const AddedTokens::Match match = wanted.find(text, at);
    const std::string_view between = text.substr(at, match.begin - at);
    if (!(options.continues && at == 0) && wants_prefix(between, at == 0)) {
      encode_plain(join(' ', between), merger, out);
    } else {
      encode_plain(between, merger, out);
    }
    if (match.bytes == 0) break;
    out.push_back(match.id);
    at = match.begin + match.bytes;
  }
}

bool Tokenizer::Impl::wants_prefix(std::string_view text, bool first) const {
  if (text.empty() || spec.prefix == SpacePrefix::kNone) return false;
  if (spec.prefix == SpacePrefix::kFirst && !first) return false;
  return !(spec.prefix_if_missing && (text.starts_with(' ') || text.starts_with(kSpaceMark)));
}

void Tokenizer::Impl::encode_plain(std::string_view text, Merger& merger,
                                   std::vector<TokenId>& out) const {
  pretokenizer.split(text, [&](std::string_view piece) { encode_piece(piece, merger, out); });
}

void Tokenizer::Impl::encode_piece(std::string_view piece, Merger& merger,
                                   std::vector<TokenId>& out) const {
  if (spec.whole_pieces_first) {
    if (const TokenId whole = lookup(text_tokens, piece); whole >= 0) return out.push_back(whole);
  }
  const std::size_t begin = out.size();
  if (spec.characters) {
    add_characters(piece, out);
  } else {
    add_bytes(piece, out);
  }
  merger.merge(out, begin);
}

void Tokenizer::Impl::add_bytes(std::string_view bytes, std::vector<TokenId>& out) const {
  for (const char byte : bytes) {
    const TokenId token = byte_tokens[static_cast<unsigned char>(byte)];
    if (token >= 0) {
      out.push_back(token);
    } else if (spec.unk >= 0) {
      out.push_back(spec.unk);
    }
  }
}

void Tokenizer::Impl::add_characters(std::string_view piece, std::vector<TokenId>& out) const {
  for (std::size_t at = 0; at < piece.size();) {
    const CodePoint c = code_point_at(piece, at);
    const std::string_view character = piece.substr(at, std::max<std::size_t>(c.bytes, 1));
    const TokenId token =
        c.bytes == 0 ? -1 : lookup(text_tokens, character == kSpaceMark ? " " : character);
    if (token >= 0) {
      out.push_back(token);
    } else {
      add_bytes(character, out);
    }
    at += character.size();
  }
}

Tokenizer::Tokenizer(TokenizerSpec spec) : impl_(std::make_unique<Impl>(std::move(spec))) {}
Tokenizer::~Tokenizer() = default;
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;

std::vector<TokenId> Tokenizer::encode(std::string_view text, EncodeOptions options) const {
  require(text.size() <= std::numeric_limits<std::int32_t>::max(),
          "text: expected less than 2 GiB, found ", text.size(), " bytes");
  std::vector<TokenId> out;
  if (options.add_special && impl_->spec.add_bos) out.push_back(impl_->spec.bos);
  Merger merger(impl_->merges);
  split_long_text(text, impl_->spec.max_part, impl_->spec.max_run,
                  [&](std::string_view part) { impl_->encode_part(part, options, merger, out); });
  return out;
}

std::string_view Tokenizer::decode(TokenId id, bool show_special) const {
  require(id >= 0 && id < vocab_size(), spec().source, ": token id: expected 0 to ",
          vocab_size() - 1, ", found ", id);
  if (is_special(id) && !show_special) return {};
  return spec().tokens[static_cast<std::size_t>(id)];
}

std::string_view Tokenizer::Reader::read(TokenId id) {
  std::string_view text = tokenizer_.decode(id, show_special_);
  const bool strips = begins_ && tokenizer_.spec().prefix != SpacePrefix::kNone;
  begins_ = begins_ && tokenizer_.is_special(id);
  if (strips && !begins_ && text.starts_with(' ')) text.remove_prefix(1);
  return text;
}

std::string Tokenizer::decode(const std::vector<TokenId>& ids, bool show_special) const {
  std::string text;
  Reader reader(*this, true, show_special);
  for (const TokenId id : ids) text += reader.read(id);
  return text;
}

int Tokenizer::vocab_size() const { return static_cast<int>(spec().tokens.size()); }

TokenId Tokenizer::bos() const { return spec().bos; }

bool Tokenizer::is_special(TokenId id) const {
  return id >= 0 && id < vocab_size() && kind_of(spec(), id) == TokenKind::kControl;
}

bool Tokenizer::is_eog(TokenId id) const {
  return id >= 0 && id < vocab_size() && impl_->eog[static_cast<std::size_t>(id)];
}

TokenId Tokenizer::find(std::string_view token_text) const {
  const TokenId id = lookup(impl_->added, token_text);
  return id >= 0 ? id : lookup(impl_->text_tokens, token_text);
}

std::size_t Tokenizer::count_missing(std::string_view text) const {
  if (spec().characters) {
    std::size_t n = 0;
    for (std::size_t at = 0; (at = text.find(kSpaceMark, at)) != text.npos; at += kSpaceMark.size())
      n += kSpaceMark.size() - 1;
    return n;
  }
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [&](char byte) {
    return impl_->byte_tokens[static_cast<unsigned char>(byte)] < 0;
  }));
}

const TokenizerSpec& Tokenizer::spec() const { return impl_->spec; }

void add_known_eog(TokenizerSpec& spec) {
  // The texts with which published models end a turn, a message, or a document.
  constexpr std::array<std::string_view, 9> kTexts = {
      "<|eot_id|>", "<|eom_id|>",    "<|end_of_text|>", "<|im_end|>", "<|endoftext|>",
      "<|end|>",    "<end_of_turn>", "<EOT>",           "</s>"};
  for (std::size_t id = 0; id < spec.tokens.size(); ++id) {
    const auto token = static_cast<TokenId>(id);
    if (spec.kinds[id] == TokenKind::kControl &&
        std::find(kTexts.begin(), kTexts.end(), spec.tokens[id]) != kTexts.end() &&
        std::find(spec.eog.begin(), spec.eog.end(), token) == spec.eog.end()) {
      spec.eog.push_back(token);
    }
  }
}

}  // namespace thaw
