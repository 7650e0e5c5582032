// SentencePiece vocabularies (LLaMA 2, TinyLlama, Mistral), from GGUF and from tokenizer.json:
// against sentencepiece and Hugging Face's tokenizers (tools/golden_sentencepiece.py, which runs
// these tests on more strings by way of THAW_SENTENCEPIECE_GOLDEN), and what bad files get.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/tokenizer_source.h"
#include "device/error.h"
#include "tests/gguf_writer.h"
#include "tests/run_thaw.h"
#include "tests/tiny_files.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

using testing::GgufWriter;
using testing::TemporaryDirectory;
using testing::write_file;
using Ids = std::vector<TokenId>;
using Json = nlohmann::json;

const std::string kMark = "\u2581";

const Json& golden() {
  static const Json data = [] {
    const char* const other = std::getenv("THAW_SENTENCEPIECE_GOLDEN");
    std::ifstream file(other ? other : "tests/golden/sentencepiece.json");
    return Json::parse(file);
  }();
  return data;
}

GgufWriter golden_gguf() {
  GgufWriter gguf;
  gguf.set("tokenizer.ggml.model", "llama");
  gguf.set("tokenizer.ggml.tokens", golden()["pieces"].get<std::vector<std::string>>());
  gguf.set("tokenizer.ggml.scores", golden()["scores"].get<std::vector<float>>());
  gguf.set("tokenizer.ggml.token_type", golden()["types"].get<std::vector<std::int32_t>>());
  gguf.set("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  gguf.set("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  gguf.set("tokenizer.ggml.unknown_token_id", std::uint32_t{0});
  return gguf;
}

// A tokenizer.json with the steps of one of the golden file's tokenizers.
Json golden_json(const std::string& name) {
  Json vocab = Json::object(), added = Json::array();
  const Json& pieces = golden()["pieces"];
  for (std::size_t id = 0; id < pieces.size(); ++id) vocab[pieces[id].get<std::string>()] = id;
  for (int id = 0; id < 3; ++id)
    added.push_back({{"id", id}, {"content", pieces[id]}, {"special", true}});
  Json document = golden()["steps"][name];
  document["added_tokens"] = added;
  document["model"] = {{"type", "BPE"},        {"vocab", vocab},   {"merges", golden()["merges"]},
                       {"unk_token", "<unk>"}, {"fuse_unk", true}, {"byte_fallback", true}};
  return document;
}

TokenizerSpec spec_of(const Json& document) {
  const TemporaryDirectory directory;
  write_file(directory.path() / "tokenizer.json", document.dump());
  return read_tokenizer_json(directory.path() / "tokenizer.json");
}

TokenizerSpec spec_of(const GgufWriter& gguf) {
  const std::vector<std::byte> bytes = testing::exact(gguf.bytes());
  return tokenizer_spec(Gguf(bytes, "model.gguf"));
}

template <class Source>
Tokenizer tokenizer_of(const Source& source) {
  return Tokenizer(spec_of(source));
}

// With [INST] and [/INST] as control tokens, as Mistral has them.
Json golden_json_with_marks() {
  Json document = golden_json("first");
  std::size_t id = golden()["pieces"].size();
  for (const char* mark : {"[INST]", "[/INST]"})
    document["added_tokens"].push_back({{"id", id++}, {"content", mark}, {"special", true}});
  return document;
}

template <class Source>
std::string error_of(const Source& source) {
  try {
    tokenizer_of(source);
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

void compare(const Tokenizer& tokenizer, const std::string& key, bool parse_special) {
  int different = 0;
  for (const Json& c : golden()["cases"]) {
    const auto text = c["text"].get<std::string>();
    const Ids ids = tokenizer.encode(text, {.parse_special = parse_special});
    if (ids != c[key].get<Ids>() && ++different == 1)
      MESSAGE(key, ": ", c["text"].dump(), " expected ", c[key].dump(), " found ",
              Json(ids).dump());
  }
  CHECK(golden()["cases"].size() >= 400);
  CHECK(different == 0);
}

TEST_CASE("golden tokens of sentencepiece, vocabulary and scores from GGUF") {
  const Tokenizer tokenizer = tokenizer_of(golden_gguf());
  compare(tokenizer, "model", false);
  for (const Json& c : golden()["cases"]) {
    const auto text = c["text"].get<std::string>();
    CHECK((tokenizer.count_missing(text) == 0) == !contains(text, kMark));
    if (!contains(text, kMark)) REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("golden tokens of LLaMA 2's and Mistral's kinds of tokenizer.json") {
  compare(tokenizer_of(golden_json("prepend")), "prepend", true);
  compare(tokenizer_of(golden_json("first")), "first", true);
  compare(tokenizer_of(golden_json("split")), "split", true);
}

TEST_CASE("golden tokens of conversations in the formats of LLaMA 2, Mistral and Zephyr") {
  for (const Json& chat : golden()["chats"]) {
    const auto name = chat["format"].get<std::string>();
    CAPTURE(name);
    TokenizerSpec spec =
        name == "marks" ? spec_of(golden_json_with_marks()) : spec_of(golden_gguf());
    spec.chat_template = chat["template"].get<std::string>();
    spec.bos = 1, spec.add_bos = true;
    const Tokenizer tokenizer(spec);
    const ChatFormat format = recognise_chat_format(tokenizer);
    CHECK(format == (name == "llama2"   ? ChatFormat::kLlama2
                     : name == "zephyr" ? ChatFormat::kZephyr
                                        : ChatFormat::kMistral));
    std::vector<ChatMessage> messages;
    for (const Json& m : chat["messages"])
      messages.push_back({m["role"].get<std::string>(), m["content"].get<std::string>()});
    const auto expected = chat["ids"].get<Ids>();
    CHECK(encode_chat(tokenizer, format, messages) == expected);
    if (messages.size() < 3) continue;  // and turn by turn
    const ChatMessage reply = messages.back(), answer = messages[messages.size() - 2];
    messages.resize(messages.size() - 2);
    Ids ids = encode_chat(tokenizer, format, messages);
    for (const Ids& more :
         {encode_answer(tokenizer, format, answer.content), encode_reply(tokenizer, format, reply)})
      ids.insert(ids.end(), more.begin(), more.end());
    CHECK(ids == expected);
  }
}

TEST_CASE("a text gets a space before it, and loses it again") {
  const Tokenizer tokenizer = tokenizer_of(golden_gguf());
  const Ids ids = tokenizer.encode("qui", {.add_special = true});
  REQUIRE(ids.size() == 2);
  CHECK(ids[0] == 1);
  CHECK(tokenizer.decode(ids[1]) == " qui");
  Tokenizer::Reader reader(tokenizer, true), later(tokenizer, false);
  CHECK(reader.read(ids[0]) == "");  // the control token before it is no text
  CHECK(reader.read(ids[1]) == "qui");
  CHECK(reader.read(ids[1]) == " qui");
  CHECK(later.read(ids[1]) == " qui");
  CHECK(tokenizer.decode(ids) == "qui");
  CHECK(tokenizer.decode(tokenizer.encode("qui", {.continues = true})) == "qui");
  CHECK(tokenizer.encode("qui", {.continues = true}) != tokenizer.encode("qui"));
  CHECK(tokenizer.encode(" qui", {.continues = true}) == tokenizer.encode("qui"));
  CHECK(tokenizer.encode("").empty());
  CHECK(tokenizer.count_missing("a" + kMark + kMark + "b") == 4);  // two spaces are written

  GgufWriter none = golden_gguf();
  none.set("tokenizer.ggml.add_space_prefix", false);
  CHECK(tokenizer_of(none).encode(" qui") == tokenizer.encode("qui"));
  CHECK(tokenizer_of(none).decode(tokenizer.encode("qui")) == " qui");
}

TEST_CASE("bytes that are no UTF-8 are byte tokens, as characters without a token are") {
  const Tokenizer tokenizer = tokenizer_of(golden_gguf());
  const Ids ids = tokenizer.encode("\xff\xf0\x9f", {.continues = true});
  CHECK(ids == Ids{3 + 0xff, 3 + 0xf0, 3 + 0x9f});  // after <unk>, <s> and </s>
  CHECK(tokenizer.decode(ids) == "\xff\xf0\x9f");
  CHECK(tokenizer.encode("\U0001f9ca", {.continues = true}) ==
        Ids{3 + 0xf0, 3 + 0x9f, 3 + 0xa7, 3 + 0x8a});
  CHECK(tokenizer.encode("<0x41>") != Ids{3 + 0x41});  // a text, not the byte
  CHECK(tokenizer.is_special(0));
  CHECK(tokenizer.is_eog(2));
}

// A tiny model whose vocabulary is three control tokens and the bytes.
std::string write_tiny_model(const TemporaryDirectory& directory, const std::string& jinja) {
  const testing::TinyModel tiny = testing::make_tiny_model();
  const auto n = static_cast<std::size_t>(tiny.model.config.vocab_size);
  std::vector<std::string> tokens = {"<unk>", "<s>", "</s>"};
  std::vector<std::int32_t> types = {2, 3, 3};
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", static_cast<unsigned>(byte));
    tokens.emplace_back(text), types.push_back(6);
  }
  while (tokens.size() < n) tokens.push_back(join("unused", tokens.size())), types.push_back(5);
  GgufWriter gguf = testing::tiny_gguf(tiny);
  gguf.erase("tokenizer.ggml.merges");
  gguf.erase("tokenizer.ggml.add_bos_token");
  gguf.set("tokenizer.ggml.model", "llama");
  gguf.set("tokenizer.ggml.tokens", tokens);
  gguf.set("tokenizer.ggml.token_type", types);
  gguf.set("tokenizer.ggml.scores", std::vector<float>(n, 0.0f));
  gguf.set("tokenizer.ggml.bos_token_id", std::uint32_t{1});
  gguf.set("tokenizer.ggml.eos_token_id", std::uint32_t{2});
  gguf.set("tokenizer.chat_template", jinja);
  const std::string path = (directory.path() / "tiny.gguf").string();
  write_file(path, gguf.bytes());
  return path;
}

TEST_CASE("a model with a SentencePiece vocabulary tokenizes, writes and is inspected") {
  const TemporaryDirectory directory;
  const std::string model = write_tiny_model(directory, "");
  const auto out = [&](std::vector<std::string> args) {
    args.insert(args.begin() + 1, {"-m", model});
    const testing::RunResult result = testing::run_thaw(args);
    CHECK(result.err == "");
    REQUIRE(result.exit_code == 0);
    return result.out;
  };
  CHECK(out({"tokenize", "-p", "a b"}) == "35 100 35 101\n");  // " a b": a byte is 3 less
  CHECK(out({"tokenize", "--decode", "-p", "35 100 35 101"}) == "a b");
  const Json prompt =
      Json::parse(out({"generate", "-p", "a b", "-n", "9", "--json", "-q", "--temp", "0"}));
  CHECK(prompt["prompt_tokens"] == 5);  // with <s>
  CHECK(contains(out({"inspect"}), "begins with <s> (1)"));
}

TEST_CASE("a model with LLaMA 2's chat format answers, and goes on from a file") {
  const TemporaryDirectory directory;
  const std::string model = write_tiny_model(directory, "[INST] <<SYS>>");
  const std::string session = (directory.path() / "talk").string();
  const std::vector<std::string> args = {"chat",   "-m",        model,      "-n", "8",
                                         "-q",     "--session", session,    "-c", "200",
                                         "--seed", "1",         "--system", "Hi"};
  const testing::RunResult first = testing::run_thaw(args, {.input = "One\nTwo\n"});
  CHECK(first.exit_code == 0);
  const testing::RunResult second = testing::run_thaw(args, {.input = "Three\n"});
  CHECK(second.exit_code == 0);
  CHECK(std::count(first.out.begin(), first.out.end(), '\n') >= 2);
  const std::string header = testing::read_file(session);
  const Json talk = Json::parse(header.substr(0, header.find('\n')));
  REQUIRE(talk["turns"].size() == 3);
  // Every turn of the user is the tokens that its text makes: a byte is its own code and 3.
  const auto tokens = talk["tokens"].get<Ids>();
  Ids expected = {1};
  for (const char c : std::string(" [INST] <<SYS>>\nHi\n<</SYS>>\n\nOne [/INST]"))
    expected.push_back(c + 3);
  CHECK(Ids(tokens.begin(), tokens.begin() + std::ssize(expected)) == expected);
  const testing::RunResult needle =
      testing::run_thaw({"needle", "-m", model, "--chat", "--context", "200"});
  CHECK(needle.exit_code == 1);
  CHECK(contains(needle.err, "--chat is not for this model"));
}

TEST_CASE("bad SentencePiece metadata in GGUF is named") {
  const auto error = [](const std::function<void(GgufWriter&)>& change) {
    GgufWriter gguf = golden_gguf();
    change(gguf);
    return error_of(gguf);
  };
  const auto pieces = golden()["pieces"].get<std::vector<std::string>>();
  auto scores = golden()["scores"].get<std::vector<float>>();
  auto types = golden()["types"].get<std::vector<std::int32_t>>();
  CHECK(contains(error([](GgufWriter& w) { w.erase("tokenizer.ggml.scores"); }),
                 "tokenizer.ggml.scores"));
  scores[300] = std::numeric_limits<float>::infinity();
  CHECK(contains(error([&](GgufWriter& w) { w.set("tokenizer.ggml.scores", scores); }),
                 "scores: token 300: expected a finite number, found inf"));
  scores.pop_back();
  CHECK(contains(
      error([&](GgufWriter& w) { w.set("tokenizer.ggml.scores", scores); }),
      join("expected ", pieces.size(), " as there are tokens, found ", pieces.size() - 1)));
  types[400] = 6;
  CHECK(contains(error([&](GgufWriter& w) { w.set("tokenizer.ggml.token_type", types); }),
                 "token 400: expected a byte such as <0x0A>, found"));
  types[400] = 7;
  CHECK(contains(error([&](GgufWriter& w) { w.set("tokenizer.ggml.token_type", types); }),
                 "token 400: expected 1 to 6, found 7"));
  types[400] = 1, types[10] = 1;
  CHECK(contains(error([&](GgufWriter& w) { w.set("tokenizer.ggml.token_type", types); }),
                 "byte tokens: expected <0x00> to <0xFF>, found 255"));
  CHECK(
      contains(error([](GgufWriter& w) { w.set("tokenizer.ggml.remove_extra_whitespaces", true); }),
               "remove_extra_whitespaces: expected false, found true"));
  auto long_pieces = pieces;
  long_pieces[500] = std::string(2000, 'x');
  CHECK(contains(error([&](GgufWriter& w) { w.set("tokenizer.ggml.tokens", long_pieces); }),
                 "expected at most 1024 bytes, found 2000"));
}

TEST_CASE("bad steps of a tokenizer.json with byte_fallback are named") {
  const auto error = [](const char* name, const std::function<void(Json&)>& change) {
    Json document = golden_json(name);
    change(document);
    return error_of(document);
  };
  CHECK(contains(error("prepend",
                       [](Json& j) {
                         j["normalizer"]["normalizers"][0] = {{"type", "NFKC"}};
                       }),
                 "type: expected Sequence, Prepend or Replace, found \"NFKC\""));
  CHECK(contains(
      error("prepend", [](Json& j) { j["normalizer"]["normalizers"][1]["content"] = "_"; }),
      "content: expected \"\\u2581\", found \"_\""));
  CHECK(contains(error("first", [](Json& j) { j["pre_tokenizer"]["prepend_scheme"] = "last"; }),
                 "prepend_scheme: expected always, first or never, found \"last\""));
  CHECK(contains(error("first", [](Json& j) { j["pre_tokenizer"]["type"] = "Whitespace"; }),
                 "pre_tokenizer: type: expected Metaspace, found \"Whitespace\""));
  CHECK(contains(error("first", [](Json& j) { j["pre_tokenizer"] = nullptr; }),
                 "expected a normalizer or a pre_tokenizer beside byte_fallback, found neither"));
  CHECK(contains(error("first", [](Json& j) { j["model"]["byte_fallback"] = false; }), "fuse_unk"));
  const auto renamed = [](Json& j) {
    Json& vocab = j["model"]["vocab"];
    vocab["<0x0a0a>"] = vocab["<0x0A>"], vocab.erase("<0x0A>");
  };
  CHECK(contains(error("first", renamed), "byte tokens: expected <0x00> to <0xFF>, found 255"));
}

}  // namespace
}  // namespace thaw
