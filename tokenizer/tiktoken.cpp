// Reads a tiktoken tokenizer.model: lines of a token in base64, a space, and its rank.
#include <algorithm>
#include <charconv>
#include <numeric>

#include "device/error.h"
#include "device/mapped_file.h"
#include "tokenizer/tokenizer.h"

namespace thaw {
namespace {

constexpr std::size_t kMaxTokens = 128000;  // LLaMA 3; later models have more, and another regex
constexpr std::size_t kMaxTokenBytes = 512;
constexpr std::size_t kMaxLine = 2 * kMaxTokenBytes;

// -1 for what is not in the alphabet of base64 (RFC 4648).
int base64_digit(char c) {
  if (c >= 'A' && c <= 'Z') return c - 'A';
  if (c >= 'a' && c <= 'z') return c - 'a' + 26;
  if (c >= '0' && c <= '9') return c - '0' + 52;
  return c == '+' ? 62 : c == '/' ? 63 : -1;
}

// False when `text` is not base64.
bool decode_base64(std::string_view text, std::string& bytes) {
  if (text.empty() || text.size() % 4 != 0) return false;
  const std::size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  unsigned bits = 0;
  for (std::size_t i = 0; i < text.size(); ++i) {
    const int digit = i < text.size() - padding ? base64_digit(text[i]) : 0;
    if (digit < 0) return false;
    bits = bits << 6 | static_cast<unsigned>(digit);
    if (i % 4 == 3) {
      for (const int shift : {16, 8, 0}) bytes += static_cast<char>(bits >> shift & 0xff);
      bits = 0;
    }
  }
  bytes.resize(bytes.size() - padding);
  return true;
}

void read_line(std::string_view line, const std::string& where, std::vector<std::string>& tokens) {
  const std::size_t space = line.find(' ');
  std::string bytes;
  const bool spelled = space != std::string_view::npos && line.size() <= kMaxLine &&
                       decode_base64(line.substr(0, space), bytes);
  TokenId rank = -1;
  if (spelled) {
    const char* const end = line.data() + line.size();
    const auto [stop, error] = std::from_chars(line.data() + space + 1, end, rank);
    if (error != std::errc() || stop != end) rank = -1;
  }
  require(rank >= 0, where, ": expected a token in base64 and its rank, found \"",
          printable(line, 40), "\"");
  require(bytes.size() <= kMaxTokenBytes, where, ": expected a token of at most ", kMaxTokenBytes,
          " bytes, found ", bytes.size());
  const auto id = static_cast<std::size_t>(rank);
  require(id < kMaxTokens, where, ": rank: expected below ", kMaxTokens, " (LLaMA 3), found ",
          rank);
  if (id >= tokens.size()) tokens.resize(id + 1);
  require(tokens[id].empty(), where, ": rank: expected each once, found ", rank, " again");
  tokens[id] = std::move(bytes);
}

// The special tokens of LLaMA 3, in order after the last rank (llama_models/llama3/tokenizer.py).
std::vector<std::string> special_tokens() {
  std::vector<std::string> tokens = {"<|begin_of_text|>",
                                     "<|end_of_text|>",
                                     "<|reserved_special_token_0|>",
                                     "<|reserved_special_token_1|>",
                                     "<|finetune_right_pad_id|>",
                                     "<|step_id|>",
                                     "<|start_header_id|>",
                                     "<|end_header_id|>",
                                     "<|eom_id|>",
                                     "<|eot_id|>",
                                     "<|python_tag|>",
                                     "<|image|>"};
  for (int i = 2; tokens.size() < 256; ++i) {
    tokens.push_back(join("<|reserved_special_token_", i, "|>"));
  }
  return tokens;
}

}  // namespace

TokenizerSpec read_tiktoken(const std::filesystem::path& path) {
  const MappedFile file(path);
  std::string_view rest(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  TokenizerSpec spec;
  spec.source = path.string();
  require(
      !rest.starts_with("\n\x0e\n\x05<unk>"), spec.source,
      ": expected tiktoken's lines, found SentencePiece's binary; thaw reads tokenizer.json or a "
      "GGUF file of such a model");
  for (int number = 1; !rest.empty(); ++number) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    std::string_view line = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.empty()) read_line(line, join(spec.source, ": line ", number), spec.tokens);
  }
  require(!spec.tokens.empty(), spec.source,
          ": expected lines of a token and its rank, found none");
  for (std::size_t id = 0; id < spec.tokens.size(); ++id) {
    require(!spec.tokens[id].empty(), spec.source, ": rank ", id, ": expected a token, found none");
  }
  spec.kinds.assign(spec.tokens.size(), TokenKind::kText);
  const auto first_special = static_cast<TokenId>(spec.tokens.size());
  for (std::string& token : special_tokens()) spec.tokens.push_back(std::move(token));
  spec.kinds.resize(spec.tokens.size(), TokenKind::kControl);
  const NamedPretokenizer llama3 = named_pretokenizer("llama-bpe", spec.source);
  spec.patterns = llama3.patterns;
  spec.whole_pieces_first = llama3.whole_pieces_first;
  spec.add_bos = llama3.add_bos;
  spec.ranks.resize(spec.tokens.size());
  std::iota(spec.ranks.begin(), spec.ranks.end(), 0);
  spec.max_part = 400'000;
  spec.max_run = 25'000;
  spec.bos = first_special;
  add_known_eog(spec);
  return spec;
}

}  // namespace thaw
