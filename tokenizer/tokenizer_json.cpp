// Reads a Hugging Face tokenizer.json with the files beside it: of byte-level BPE, or with
// "byte_fallback" of SentencePiece. Whatever would change the tokens and is not known here is an
// error.
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "device/error.h"
#include "device/json.h"
#include "device/mapped_file.h"
#include "tokenizer/byte_alphabet.h"
#include "tokenizer/sentencepiece.h"
#include "tokenizer/tokenizer.h"

namespace thaw {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxFile = std::size_t{64} << 20;  // bytes; LLaMA 3 has 9 MiB
constexpr std::size_t kMaxTemplate = std::size_t{1} << 20;

std::string read_text(const std::filesystem::path& path, std::size_t max_bytes) {
  const MappedFile file(path);
  require(file.bytes().size() <= max_bytes, path.string(), ": size: expected at most ", max_bytes,
          " bytes, found ", file.bytes().size());
  return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
}

// An object of the file: a JSON value with the name by which messages call it.
class Node {
 public:
  Node(const Json& json, std::string where) : json_(json), where_(std::move(where)) {}

  const Json& json() const { return json_; }
  const std::string& where() const { return where_; }
  bool has(const char* key) const {
    return json_.is_object() && json_.contains(key) && !json_[key].is_null();
  }
  Node operator[](const char* key) const {
    require(has(key), where_, ": ", key, ": expected a value, found none");
    return {json_[key], where_ + ": " + key};
  }
  Node at(std::size_t i) const { return {json_[i], join(where_, "[", i, "]")}; }
  // The number of elements of an array.
  std::size_t size() const {
    require(json_.is_array(), where_, ": expected an array, found ", json_.type_name());
    return json_.size();
  }
  const std::string& string() const {
    require(json_.is_string(), where_, ": expected a string, found ", json_.type_name());
    return json_.get_ref<const std::string&>();
  }
  bool boolean() const {
    require(json_.is_boolean(), where_, ": expected true or false, found ", json_.type_name());
    return json_.get<bool>();
  }
  bool boolean(const char* key, bool fallback) const {
    return has(key) ? (*this)[key].boolean() : fallback;
  }
  // A token id below `count`.
  TokenId id(std::size_t count) const {
    const bool integer = json_.is_number_integer();
    const std::int64_t value = !integer ? -1
                               : json_.is_number_unsigned() && json_.get<std::uint64_t>() >= count
                                   ? -1
                                   : json_.get<std::int64_t>();
    require(value >= 0 && static_cast<std::size_t>(value) < count, where_,
            ": expected a token id from 0 to ", count - 1, ", found ", printable(json_.dump(), 40));
    return static_cast<TokenId>(value);
  }
  void expect_false(const char* key) const {
    require(!boolean(key, false), where_, ": ", key, ": expected false, found true");
  }
  [[noreturn]] void unsupported(const char* expected) const {
    fail(where_, ": expected ", expected, ", found ", printable(json_.dump(), 60));
  }

 private:
  const Json& json_;
  std::string where_;
};

using Ids = std::unordered_map<std::string_view, TokenId>;  // by the text that the file has

// Puts the text of token `id` in place; the same text twice is fine (vocabulary and added_tokens).
void put_token(TokenizerSpec& spec, TokenId id, std::string_view text, const std::string& where) {
  std::string& token = spec.tokens[static_cast<std::size_t>(id)];
  require(token.empty() || token == text, where, ": token ", id, ": expected one text, found \"",
          printable(token), "\" and \"", printable(text), "\"");
  token = text;
}

// Tokens are stored as the file has them until decode_tokens().
Ids read_vocabulary(const Node& root, TokenizerSpec& spec) {
  const Node vocab = root["model"]["vocab"];
  require(vocab.json().is_object(), vocab.where(), ": expected an object, found ",
          vocab.json().type_name());
  const Json none = Json::array();
  const Node added = root.has("added_tokens") ? root["added_tokens"] : Node(none, "");
  // Ids are dense, so none is as large as the number of entries.
  const std::size_t most = vocab.json().size() + added.size();
  spec.tokens.resize(most);
  spec.kinds.resize(most, TokenKind::kText);
  std::size_t count = 0;
  for (const auto& [text, id] : vocab.json().items()) {
    const Node node(id, join(vocab.where(), ": \"", printable(text), "\""));
    require(!text.empty(), node.where(), ": expected a text, found none");
    put_token(spec, node.id(most), text, vocab.where());
  }
  for (std::size_t i = 0; i < added.size(); ++i) {
    const Node token = added.at(i);
    const TokenId id = token["id"].id(most);
    require(!token["content"].string().empty(), token.where(),
            ": content: expected a text, found none");
    put_token(spec, id, token["content"].string(), added.where());
    for (const char* flag : {"single_word", "lstrip", "rstrip"}) token.expect_false(flag);
    spec.kinds[static_cast<std::size_t>(id)] =
        token.boolean("special", false) ? TokenKind::kControl : TokenKind::kLiteral;
  }
  while (count < most && !spec.tokens[count].empty()) ++count;
  for (std::size_t id = count; id < most; ++id) {
    require(spec.tokens[id].empty(), vocab.where(), ": token ", count,
            ": expected a text, found none");
  }
  spec.tokens.resize(count);
  spec.kinds.resize(count);
  Ids ids;
  ids.reserve(count);
  for (std::size_t id = 0; id < count; ++id) {
    const auto [it, first] = ids.emplace(spec.tokens[id], static_cast<TokenId>(id));
    require(first, vocab.where(), ": expected each text once, found \"", printable(spec.tokens[id]),
            "\" as ", it->second, " and ", id);
  }
  return ids;
}

// "a b" or ["a", "b"].
void read_merges(const Node& merges, const Ids& ids, TokenizerSpec& spec) {
  spec.merges.reserve(merges.size());
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const Node merge = merges.at(i);
    std::string_view left, right;
    if (merge.json().is_array()) {
      require(merge.size() == 2, merge.where(), ": expected two tokens, found ", merge.size());
      left = merge.at(0).string();
      right = merge.at(1).string();
    } else {
      const std::string_view text = merge.string();
      const std::size_t space = text.find(' ');
      require(space != std::string_view::npos, merge.where(),
              ": expected two tokens with a space between, found \"", printable(text), "\"");
      left = text.substr(0, space);
      right = text.substr(space + 1);
    }
    const auto id = [&](std::string_view token) {
      const auto it = ids.find(token);
      require(it != ids.end(), merge.where(), ": expected tokens of the vocabulary, found \"",
              printable(token), "\"");
      return it->second;
    };
    spec.merges.emplace_back(id(left), id(right));
  }
}

void read_model(const Node& root, TokenizerSpec& spec) {
  const Node model = root["model"];
  if (model.has("type") && model["type"].string() != "BPE") model["type"].unsupported("\"BPE\"");
  spec.characters = model.boolean("byte_fallback", false);
  if (!spec.characters) model.expect_false("fuse_unk");  // with all bytes, nothing is unknown
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (model.has(affix) && !model[affix].string().empty()) model[affix].unsupported("none");
  }
  if (model.has("dropout") && model["dropout"].json() != 0.0) model["dropout"].unsupported("none");
  spec.whole_pieces_first = model.boolean("ignore_merges", false);
  const Ids ids = read_vocabulary(root, spec);
  read_merges(model["merges"], ids, spec);
  if (model.has("unk_token")) {
    const auto it = ids.find(model["unk_token"].string());
    if (it == ids.end()) model["unk_token"].unsupported("a token of the vocabulary");
    spec.unk = it->second;
  }
}

// Appends the patterns of a pre-tokenizer; true when it ends by turning bytes into the alphabet.
bool read_pretokenizer(const Node& node, TokenizerSpec& spec) {
  const std::string& type = node["type"].string();
  if (type == "Sequence") {
    const Node parts = node["pretokenizers"];
    bool byte_level = false;
    for (std::size_t i = 0; i < parts.size(); ++i) {
      require(!byte_level, parts.at(i).where(), ": expected nothing after ByteLevel, found more");
      byte_level = read_pretokenizer(parts.at(i), spec);
    }
    return byte_level;
  }
  if (type == "ByteLevel") {
    require(!node.boolean("add_prefix_space", true), node.where(),
            ": add_prefix_space: expected false, found true");
    if (node.boolean("use_regex", true)) {
      spec.patterns.push_back(named_pretokenizer("gpt-2", spec.source).patterns.front());
    }
    return true;
  }
  if (type == "Digits") {
    if (!node.boolean("individual_digits", false)) {
      node.unsupported("Digits with individual_digits");
    }
    spec.patterns.push_back(named_pretokenizer("smollm", spec.source).patterns.front());
    return false;
  }
  if (type == "Split") {
    if (!node["pattern"].has("Regex")) node["pattern"].unsupported("a Regex");
    if (node["behavior"].string() != "Isolated") node["behavior"].unsupported("\"Isolated\"");
    node.expect_false("invert");
    spec.patterns.push_back(node["pattern"]["Regex"].string());
    return false;
  }
  node["type"].unsupported("Sequence, Split, Digits or ByteLevel");
}

void expect_mark(const Node& node) {
  if (node.string() != kSpaceMark) node.unsupported("\"\\u2581\"");
}

// A normalizer that puts a space before a text, or writes spaces as marks, as the tokens have them.
void read_normalizer(const Node& node, TokenizerSpec& spec) {
  const std::string& type = node["type"].string();
  if (type == "Sequence") {
    const Node parts = node["normalizers"];
    for (std::size_t i = 0; i < parts.size(); ++i) read_normalizer(parts.at(i), spec);
  } else if (type == "Prepend") {
    expect_mark(node["prepend"]);
    spec.prefix = SpacePrefix::kEach;
  } else if (type == "Replace") {
    if (node["pattern"]["String"].string() != " ") node["pattern"].unsupported("a space");
    expect_mark(node["content"]);
  } else {
    node["type"].unsupported("Sequence, Prepend or Replace");
  }
}

// The same as a pre-tokenizer, which may also split a text before each space.
void read_metaspace(const Node& node, TokenizerSpec& spec) {
  if (node["type"].string() != "Metaspace") node["type"].unsupported("Metaspace");
  expect_mark(node["replacement"]);
  const bool always = node.boolean("add_prefix_space", true);
  const std::string scheme = node.has("prepend_scheme") ? node["prepend_scheme"].string()
                             : always                   ? "always"
                                                        : "never";
  if (scheme == "always") {
    spec.prefix = SpacePrefix::kEach;
  } else if (scheme == "first") {
    spec.prefix = SpacePrefix::kFirst;
  } else if (scheme != "never") {
    node["prepend_scheme"].unsupported("always, first or never");
  }
  spec.prefix_if_missing = true;
  if (node.boolean("split", true)) spec.patterns = {"[ \u2581][^ \u2581]*|[^ \u2581]+"};
}

// How a text becomes pieces, and their symbols.
void read_steps(const Node& root, TokenizerSpec& spec) {
  if (!spec.characters) {
    if (root.has("normalizer")) root["normalizer"].unsupported("none");
    const Node pretokenizer = root["pre_tokenizer"];
    if (!read_pretokenizer(pretokenizer, spec)) pretokenizer.unsupported("ByteLevel at the end");
    if (root.has("decoder") && root["decoder"]["type"].string() != "ByteLevel")
      root["decoder"].unsupported("ByteLevel");
    return;
  }
  const bool normalizes = root.has("normalizer"), splits = root.has("pre_tokenizer");
  require(normalizes != splits, root.where(),
          ": expected a normalizer or a pre_tokenizer beside byte_fallback, found ",
          normalizes ? "both" : "neither");
  if (normalizes) read_normalizer(root["normalizer"], spec);
  if (splits) read_metaspace(root["pre_tokenizer"], spec);
}

// Which tokens the post-processor puts before a text: begin of text, or none.
void read_post_processor(const Node& node, const Ids& ids, TokenizerSpec& spec) {
  const std::string& type = node["type"].string();
  if (type == "ByteLevel") return;
  if (type == "Sequence") {
    const Node parts = node["processors"];
    for (std::size_t i = 0; i < parts.size(); ++i) read_post_processor(parts.at(i), ids, spec);
    return;
  }
  if (type != "TemplateProcessing") node["type"].unsupported("ByteLevel or TemplateProcessing");
  const Node single = node["single"];
  const std::size_t size = single.size();
  if (size < 1 || size > 2 || !single.at(size - 1).has("Sequence")) {
    single.unsupported("the text, or one token and the text");
  }
  if (size == 1) return;
  const Node token = single.at(0)["SpecialToken"]["id"];
  const auto it = ids.find(token.string());
  if (it == ids.end()) token.unsupported("a token of the vocabulary");
  spec.bos = it->second;
  spec.add_bos = true;
}

void decode_tokens(TokenizerSpec& spec) {
  for (std::size_t id = 0; id < spec.tokens.size(); ++id) {
    std::string& token = spec.tokens[id];
    TokenKind& kind = spec.kinds[id];
    const auto byte = spec.characters ? byte_named(token) : std::nullopt;
    if (kind == TokenKind::kText && byte) {
      token = *byte, kind = TokenKind::kByte;
    } else if (spec.characters && kind != TokenKind::kControl) {
      token = from_space_marks(token);
    } else if (kind == TokenKind::kText) {
      token = from_byte_alphabet(token);
    }
  }
}

void add_eog(TokenizerSpec& spec, TokenId id) {
  for (const TokenId known : spec.eog) {
    if (known == id) return;
  }
  spec.eog.push_back(id);
}

// generation_config.json: "eos_token_id" is one id or several.
void read_generation_config(const std::filesystem::path& path, TokenizerSpec& spec) {
  const Json json = parse_json(read_text(path, kMaxFile), path.string());
  const Node root(json, path.string());
  if (!root.has("eos_token_id")) return;
  const Node eos = root["eos_token_id"];
  if (!eos.json().is_array()) return add_eog(spec, eos.id(spec.tokens.size()));
  for (std::size_t i = 0; i < eos.size(); ++i) add_eog(spec, eos.at(i).id(spec.tokens.size()));
}

// tokenizer_config.json: bos_token and eos_token (a string, or an object with "content") and
// chat_template (a string, or a list of named ones).
void read_tokenizer_config(const std::filesystem::path& path, const Ids& ids, TokenizerSpec& spec) {
  const Json json = parse_json(read_text(path, kMaxFile), path.string());
  const Node root(json, path.string());
  const auto token = [&](const char* key) -> TokenId {
    if (!root.has(key)) return -1;
    const Node value = root[key].json().is_object() ? root[key]["content"] : root[key];
    const auto it = ids.find(value.string());
    if (it == ids.end()) value.unsupported("a token of the vocabulary");
    return it->second;
  };
  if (spec.bos < 0) spec.bos = token("bos_token");
  if (const TokenId eos = token("eos_token"); eos >= 0) add_eog(spec, eos);
  if (!root.has("chat_template")) return;
  const Node chat = root["chat_template"];
  if (!chat.json().is_array()) {
    spec.chat_template = chat.string();
    return;
  }
  for (std::size_t i = 0; i < chat.size(); ++i) {
    if (chat.at(i)["name"].string() == "default")
      spec.chat_template = chat.at(i)["template"].string();
  }
}

}  // namespace

TokenizerSpec read_tokenizer_json(const std::filesystem::path& path) {
  TokenizerSpec spec;
  spec.source = path.string();
  const Json json = parse_json(read_text(path, kMaxFile), spec.source, kMaxFile);
  const Node root(json, spec.source);
  read_model(root, spec);
  Ids ids;
  const std::vector<std::string> texts = spec.tokens;
  for (std::size_t id = 0; id < texts.size(); ++id)
    ids.emplace(texts[id], static_cast<TokenId>(id));
  read_steps(root, spec);
  if (root.has("post_processor")) read_post_processor(root["post_processor"], ids, spec);
  decode_tokens(spec);
  const std::filesystem::path directory = path.parent_path();
  std::error_code none;
  if (const auto beside = directory / "tokenizer_config.json";
      std::filesystem::exists(beside, none)) {
    read_tokenizer_config(beside, ids, spec);
  }
  if (const auto beside = directory / "generation_config.json";
      std::filesystem::exists(beside, none)) {
    read_generation_config(beside, spec);
  }
  if (const auto beside = directory / "chat_template.jinja";
      std::filesystem::exists(beside, none)) {
    spec.chat_template = read_text(beside, kMaxTemplate);
  }
  add_known_eog(spec);
  return spec;
}

}  // namespace thaw
