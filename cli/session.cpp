#include "cli/session.h"

#include <algorithm>
#include <charconv>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>

#include "cli/flags.h"
#include "cli/format.h"
#include "cli/output_file.h"
#include "device/error.h"
#include "device/json.h"
#include "model/identity.h"

namespace thaw {
namespace {

using nlohmann::json;

constexpr std::string_view kBegins = "{\"thaw_session\":";
constexpr int kVersion = 1;
constexpr std::size_t kMaxHeader = std::size_t{64} << 20;

// Reads fields of the header, and says of which file and field one is wrong.
class Reader {
 public:
  Reader(const json& object, std::string where) : object_(object), where_(std::move(where)) {
    require(object.is_object(), where_, ": expected an object, found ", object.type_name());
  }

  const json& field(const char* key) const {
    const auto found = object_.find(key);
    require(found != object_.end(), where_, ": ", key, ": expected it, found none");
    return *found;
  }
  const json& array(const char* key) const {
    const json& value = field(key);
    require(value.is_array(), where_, ": ", key, ": expected a list, found ", value.type_name());
    return value;
  }
  std::string text(const char* key) const {
    const json& value = field(key);
    require(value.is_string(), where_, ": ", key, ": expected a text, found ", value.type_name());
    return value.get<std::string>();
  }
  int integer(const char* key, int least, std::int64_t most) const {
    return number(field(key), key, least, most);
  }
  int number(const json& value, const char* key, int least, std::int64_t most) const {
    const bool fits = value.is_number_integer() &&
                      !(value.is_number_unsigned() &&
                        value.get<std::uint64_t>() > static_cast<std::uint64_t>(most)) &&
                      value.get<std::int64_t>() >= least && value.get<std::int64_t>() <= most;
    require(fits, where_, ": ", key, ": expected a whole number from ", least, " to ", most,
            ", found ", printable(value.dump(-1, ' ', true, json::error_handler_t::replace), 24));
    return value.get<int>();
  }
  Reader object(const char* key) const { return {field(key), join(where_, ": ", key)}; }

 private:
  const json& object_;
  std::string where_;
};

std::uint64_t read_identity(const Reader& model, const std::string& where) {
  const std::string text = model.text("identity");
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value, 16);
  require(error == std::errc() && text.size() == 16 && end == text.data() + 16, where,
          ": model: identity: expected 16 hexadecimal digits, found \"", printable(text), "\"");
  return value;
}

Said read_said(const Reader& header, const std::string& where) {
  Said said = {header.text("system"), {}, {}};
  for (const json& item : header.array("tokens"))
    said.tokens.push_back(header.number(item, "tokens", 0, INT32_MAX));
  const auto n_tokens = std::ssize(said.tokens);
  int least = 0;  // where the next turn may begin
  for (const json& item : header.array("turns")) {
    const Reader turn(item, join(where, ": turn ", said.turns.size()));
    const int first = turn.integer("first", least, least == 0 ? 0 : n_tokens - 1);
    const int reply = turn.integer("reply", first + 1, n_tokens);
    said.turns.push_back({turn.text("message"), turn.text("answer"),
                          static_cast<std::size_t>(first), static_cast<std::size_t>(reply)});
    least = reply;
  }
  require(said.turns.empty() == said.tokens.empty(), where,
          ": expected turns where there are tokens, found ", said.turns.size(), " turns and ",
          n_tokens, " tokens");
  return said;
}

KvShape read_shape(const Reader& kv, const std::string& where, int n_tokens) {
  constexpr int kMost = 1 << 20;
  KvShape shape;
  const std::string name = kv.text("type");
  const std::optional<KvType> type = kv_type_named(name);
  require(type.has_value(), where, ": kv: type: expected f16, bf16, f32, q8_0 or q4_0, found \"",
          printable(name), "\"");
  shape.type = *type;
  shape.n_layers = kv.integer("layers", 1, kMost);
  shape.n_kv_heads = kv.integer("heads", 1, kMost);
  shape.head_dim = kv.integer("head_dim", 1, kMost);
  shape.capacity = std::max(n_tokens, 1);
  try {
    check_shape(shape);
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
  return shape;
}

// Up to the end of its first line.
std::string_view header_line(std::span<const std::byte> bytes, const std::string& where) {
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  require(text.starts_with(kBegins), where, ": expected a saved conversation, which begins with ",
          kBegins, ", found \"", printable(text.substr(0, kBegins.size())), "\"");
  const std::size_t end = text.substr(0, kMaxHeader).find('\n');
  require(end != text.npos, where, ": expected a line of at most ", kMaxHeader,
          " bytes, found no end of it");
  return text.substr(0, end);
}

std::string header_of(const Model& model, const Conversation& talk) {
  const KvShape& shape = talk.kv().shape();
  nlohmann::ordered_json turns = json::array();
  for (const Said::Turn& turn : talk.said().turns)
    turns.push_back({{"first", turn.first},
                     {"reply", turn.reply},
                     {"message", turn.message},
                     {"answer", turn.answer}});
  return json_line({{"thaw_session", kVersion},
                    {"model", {{"name", model.config.name}, {"identity", hex(identity(model))}}},
                    {"system", talk.said().system},
                    {"turns", turns},
                    {"tokens", talk.said().tokens},
                    {"kv",
                     {{"type", kv_type_name(shape.type)},
                      {"layers", shape.n_layers},
                      {"heads", shape.n_kv_heads},
                      {"head_dim", shape.head_dim},
                      {"tokens", talk.kv().length()}}}});
}

}  // namespace

Session read_session(const std::filesystem::path& path) {
  const std::string where = path.string();
  MappedFile file(path);
  const std::string_view line = header_line(file.bytes(), where);
  const json document = parse_json(line, where, kMaxHeader);
  const Reader header(document, where);
  header.integer("thaw_session", kVersion, kVersion);
  const Reader model = header.object("model"), kv = header.object("kv");
  Said said = read_said(header, where);
  const int n_rows = kv.integer("tokens", 0, std::ssize(said.tokens));
  const KvShape shape = read_shape(kv, where, n_rows);
  const std::span<const std::byte> rest = file.bytes().subspan(line.size() + 1);
  const std::int64_t expected = n_rows * shape.bytes_per_token();
  require(std::ssize(rest) == expected, where, ": keys and values: expected ", expected,
          " bytes, found ", rest.size());
  const std::string name = model.text("name");
  const std::uint64_t number = read_identity(model, where);
  return {name, number, std::move(said), std::move(file), {rest, shape, n_rows}};
}

bool has_session(const std::filesystem::path& path) {
  std::error_code none;
  return std::filesystem::exists(path, none) && !(std::filesystem::is_regular_file(path, none) &&
                                                  std::filesystem::file_size(path, none) == 0);
}

void require_writable_session(const std::filesystem::path& path) {
  if (has_session(path)) header_line(MappedFile(path).bytes(), path.string());
  const OutputFile file(path);
}

std::int64_t write_session(const std::filesystem::path& path, const Model& model,
                           const Conversation& conversation) {
  require_writable_session(path);
  OutputFile file(path, 0600);
  const std::string header = header_of(model, conversation);
  file.write(header);
  auto n_bytes = std::ssize(header);
  save_rows(conversation.kv(), [&](std::span<const std::byte> bytes) {
    file.write({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
    n_bytes += std::ssize(bytes);
  });
  file.finish();
  return n_bytes;
}

Resumed resumed(const Session& session, const Model& model, const Conversation& conversation) {
  const std::string where = session.file.path().string();
  const KvShape &saved = session.rows.shape(), &shape = conversation.kv().shape();
  Resumed result = {session.said, session.identity == identity(model)};
  if (result.rows) {
    for (const TokenId id : session.said.tokens)
      require(id < model.config.vocab_size, where, ": tokens: expected ids below ",
              model.config.vocab_size, ", found ", id);
    require(saved.n_layers == shape.n_layers && saved.n_kv_heads == shape.n_kv_heads &&
                saved.head_dim == shape.head_dim,
            where, ": kv: expected ", shape.n_layers, " layers of ", shape.n_kv_heads, " heads of ",
            shape.head_dim, ", found ", saved.n_layers, " of ", saved.n_kv_heads, " of ",
            saved.head_dim);
    require(
        session.rows.finite_as(shape.type), where,
        ": keys and values: expected numbers that are finite in the store's type, found others");
  } else {
    result.said = conversation.encoded(std::move(result.said));
  }
  require(conversation.fits(result.said), where, ": expected at most ", shape.capacity,
          " tokens (the context), found ", result.said.tokens.size());
  return result;
}

}  // namespace thaw
