// Tokenizers from GGUF metadata, tokenizer.json and tiktoken files: good ones agree, bad ones are
// an error that names the file and the field.
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/tokenizer_source.h"
#include "device/error.h"
#include "tests/gguf_writer.h"
#include "tests/limited_memory.h"
#include "tests/sanitized.h"
#include "tests/tiny_files.h"

namespace thaw {
namespace {

using testing::GgufWriter;
using testing::TemporaryDirectory;
using testing::write_file;
using Ids = std::vector<TokenId>;
using Json = nlohmann::json;

// The 256 letters of GPT-2's byte alphabet.
std::vector<std::string> letters() {
  std::vector<std::string> out;
  int next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool itself = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    const int c = itself ? byte : next++;
    out.push_back(c < 128 ? std::string(1, static_cast<char>(c))
                          : std::string{static_cast<char>(0xc0 | c >> 6),
                                        static_cast<char>(0x80 | (c & 0x3f))});
  }
  return out;
}

const std::string kSpace = letters()[' '];

// A vocabulary without tensors: bytes, "he", "hel", " he", <|im_start|>, <|im_end|>, "##"
// (literal).
GgufWriter small_gguf() {
  GgufWriter gguf;
  std::vector<std::string> tokens = letters();
  for (const std::string& text :
       std::vector<std::string>{"he", "hel", kSpace + "he", "<|im_start|>", "<|im_end|>", "##"}) {
    tokens.push_back(text);
  }
  std::vector<std::int32_t> types(259, 1);
  types.insert(types.end(), {3, 3, 4});
  gguf.set("tokenizer.ggml.model", "gpt2");
  gguf.set("tokenizer.ggml.pre", "gpt-2");
  gguf.set("tokenizer.ggml.tokens", tokens);
  gguf.set("tokenizer.ggml.token_type", types);
  gguf.set("tokenizer.ggml.merges", std::vector<std::string>{"h e", "he l", kSpace + " he"});
  gguf.set("tokenizer.ggml.bos_token_id", std::uint32_t{259});
  gguf.set("tokenizer.ggml.eos_token_id", std::uint32_t{5});
  return gguf;
}

// The same as a tokenizer.json.
Json small_json() {
  Json vocab = Json::object();
  for (std::size_t id = 0; id < 256; ++id) vocab[letters()[id]] = id;
  vocab["he"] = 256, vocab["hel"] = 257, vocab[kSpace + "he"] = 258;
  const auto added = [](int id, const char* text, bool special) {
    return Json{{"id", id}, {"content", text}, {"special", special}, {"lstrip", false}};
  };
  return {
      {"model",
       {{"type", "BPE"},
        {"vocab", vocab},
        {"merges", {"h e", Json{"he", "l"}, Json{kSpace, "he"}}}}},
      {"added_tokens",
       {added(259, "<|im_start|>", true), added(260, "<|im_end|>", true), added(261, "##", false)}},
      {"normalizer", nullptr},
      {"pre_tokenizer", {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}}},
      {"decoder", {{"type", "ByteLevel"}}}};
}

std::string small_tiktoken() {
  return "YQ== 0\nYg== 1\nIA== 2\nYWI= 3\nIGFi 4\n";  // a, b, " ", ab, " ab"
}

class Files {
 public:
  std::filesystem::path put(const std::string& name, const std::string& bytes) const {
    write_file(directory_.path() / name, bytes);
    return directory_.path() / name;
  }
  // The message with which reading these bytes fails, after the name of the file.
  std::string error(const std::string& name, const std::string& bytes) const {
    const std::filesystem::path path = put(name, bytes);
    try {
      load_tokenizer(path);
    } catch (const Error& error) {
      const std::string message = error.what();
      CHECK(message.starts_with(path.string()));
      CHECK(message.find('\n') == std::string::npos);
      CHECK(message.size() < path.string().size() + 250);
      return message.substr(std::min(message.size(), path.string().size()));
    }
    return "no error";
  }
  const std::filesystem::path& path() const { return directory_.path(); }

 private:
  TemporaryDirectory directory_;
};

bool contains(const std::string& text, const std::string& part) {
  CAPTURE(text);
  CHECK(text.find(part) != std::string::npos);
  return text.find(part) != std::string::npos;
}

void check_small(const Tokenizer& tokenizer) {
  CHECK(tokenizer.vocab_size() == 262);
  CHECK(tokenizer.encode("hel he##\xff") == Ids{257, 258, 261, 255});
  CHECK(tokenizer.encode("<|im_end|>").size() == 10);
  CHECK(tokenizer.encode("<|im_end|>", {.parse_special = true}) == Ids{260});
  CHECK(tokenizer.decode(Ids{257, 258, 260, 255}) == "hel he\xff");
  CHECK(tokenizer.is_eog(260));  // by its text
  CHECK_FALSE(tokenizer.is_eog(259));
}

TEST_CASE("a GGUF vocabulary and a tokenizer.json give the same tokenizer") {
  const Files files;
  const Tokenizer gguf = load_tokenizer(files.put("vocabulary.gguf", small_gguf().bytes()));
  check_small(gguf);
  CHECK(gguf.bos() == 259);
  CHECK(gguf.is_eog(5));
  CHECK(gguf.encode("a", {.add_special = true}).size() == 1);
  files.put("tokenizer.json", small_json().dump());
  check_small(load_tokenizer(files.path()));
}

TEST_CASE("a tokenizer takes the addresses of its file once") {
  const Files files;
  const auto path = files.put("large.gguf", small_gguf().bytes());
  constexpr std::uintmax_t kSize = 512 << 20;
  std::filesystem::resize_file(path, kSize);  // a hole, as long as weights are
  CHECK(testing::holds_in_64mb([&] {
    std::size_t pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    const rlim_t room = pages * static_cast<std::size_t>(::getpagesize()) + kSize * 3 / 2;
    const rlimit addresses{room, room};
    if (!testing::sanitized()) ::setrlimit(RLIMIT_AS, &addresses);
    return load_tokenizer(path).is_eog(5);
  }));
}

TEST_CASE("the files beside tokenizer.json give bos, end tokens and the chat template") {
  const Files files;
  Json json = small_json();
  json["post_processor"] = {{"type", "Sequence"},
                            {"processors",
                             {{{"type", "ByteLevel"}},
                              {{"type", "TemplateProcessing"},
                               {"single",
                                {{{"SpecialToken", {{"id", "<|im_start|>"}, {"type_id", 0}}}},
                                 {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}}}}};
  const auto path = files.put("tokenizer.json", json.dump());
  files.put("tokenizer_config.json",
            R"({"eos_token": {"content": "##"}, "chat_template":
              [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]})");
  files.put("generation_config.json", R"({"eos_token_id": [7, 8]})");
  const Tokenizer tokenizer = load_tokenizer(path);
  CHECK(tokenizer.encode("a", {.add_special = true}) == Ids{259, 'a'});
  CHECK(tokenizer.spec().eog == Ids{261, 7, 8, 260});
  CHECK(tokenizer.spec().chat_template == "y");
  files.put("chat_template.jinja", "z");
  CHECK(load_tokenizer(path).spec().chat_template == "z");
  files.put("generation_config.json", R"({"eos_token_id": 262})");
  CHECK_THROWS_AS(load_tokenizer(path), Error);
}

TEST_CASE("a tiktoken file gets LLaMA-3's special tokens after its own") {
  const Files files;
  const Tokenizer tokenizer = load_tokenizer(files.put("tokenizer.model", small_tiktoken()));
  CHECK(tokenizer.vocab_size() == 5 + 256);
  CHECK(tokenizer.encode("ab ab", {.add_special = true}) == Ids{5, 3, 4});
  CHECK(tokenizer.encode("<|eot_id|>", {.parse_special = true}) == Ids{5 + 9});
  CHECK(tokenizer.spec().eog == Ids{5 + 1, 5 + 8, 5 + 9});
  CHECK(tokenizer.find("<|reserved_special_token_245|>") == 5 + 255);
}

TEST_CASE("GGUF metadata that cannot be a tokenizer is refused") {
  const Files files;
  const auto error = [&](const std::function<void(GgufWriter&)>& change) {
    GgufWriter gguf = small_gguf();
    change(gguf);
    return files.error("bad.gguf", gguf.bytes());
  };
  using W = GgufWriter;
  using Strings = std::vector<std::string>;
  const auto set = [](const char* key, auto value) {
    return [=](W& w) { w.set(std::string("tokenizer.ggml.") + key, value); };
  };
  contains(error(set("model", "bert")), "expected gpt2 (byte-level BPE) or llama");
  contains(error(set("model", "llama")), "tokenizer.ggml.scores: expected the key, found none");
  contains(error(set("pre", "tekken")), "tokenizer.ggml.pre");
  contains(error([](W& w) { w.erase("tokenizer.ggml.pre"); }), "tokenizer.ggml.pre");
  contains(error([](W& w) { w.erase("tokenizer.ggml.tokens"); }), "tokenizer.ggml.tokens");
  contains(error([](W& w) { w.erase("tokenizer.ggml.merges"); }), "tokenizer.ggml.merges");
  contains(error(set("tokens", std::vector<std::int32_t>{1, 2})), "tokenizer.ggml.tokens");
  contains(error(set("tokens", "a")), "tokenizer.ggml.tokens");
  contains(error(set("tokens", Strings{})), "expected 0 as there are tokens, found 262");
  contains(error(set("token_type", Strings{"1"})), "tokenizer.ggml.token_type");
  contains(error(set("token_type", std::vector<float>{1})), "tokenizer.ggml.token_type");
  contains(error(set("token_type", std::vector<std::int32_t>(262, 9))), "expected 1 to 5, found 9");
  contains(error(set("token_type", std::vector<std::int32_t>(261, 1))), "expected 262");
  contains(error(set("merges", std::vector<float>{1})), "tokenizer.ggml.merges");
  contains(error(set("merges", Strings{"he"})), "with a space between");
  contains(error(set("merges", Strings{"h nothing"})),
           "merge 0: expected tokens of the vocabulary");
  contains(error(set("merges", Strings{"h l"})), "expected to make a token, found \"hl\"");
  contains(error(set("merges", Strings{"h e", "h e"})), "expected each merge once");
  contains(error(set("bos_token_id", std::uint32_t{262})), "expected a token id below 262");
  contains(error(set("eos_token_id", std::uint32_t{4'000'000'000})), "found 4000000000");
  contains(error(set("add_bos_token", "yes")), "add_bos_token");
  contains(error([](W& w) { w.set("tokenizer.ggml.tokens", Strings(262, "x")); }),
           "expected each token once");
}

TEST_CASE("a tokenizer.json that thaw would read wrongly is refused") {
  const Files files;
  const auto error = [&](const char* pointer, const Json& value) {
    Json json = small_json();
    json[Json::json_pointer(pointer)] = value;
    return files.error("tokenizer.json", json.dump());
  };
  contains(error("/model/type", "WordPiece"), "model: type: expected \"BPE\"");
  contains(error("/model/byte_fallback", true), "pre_tokenizer: type: expected Metaspace");
  contains(error("/model/fuse_unk", true), "fuse_unk: expected false");
  const Json one = {{"type", "Split"}, {"pattern", {{"Regex", "a"}}}, {"behavior", "Isolated"}};
  Json many = Json::array();
  for (int i = 0; i < 17; ++i) many.push_back(one);
  many.push_back({{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}});
  contains(error("/pre_tokenizer", {{"type", "Sequence"}, {"pretokenizers", many}}),
           "pre-tokenizer: expected at most 16 patterns, found 17");
  contains(error("/model/dropout", 0.1), "dropout");
  contains(error("/model/continuing_subword_prefix", "##"), "continuing_subword_prefix");
  contains(error("/model/unk_token", "no such"), "unk_token");
  contains(error("/model/vocab", Json::array()), "vocab: expected an object");
  contains(error("/model/vocab/he", "256"), "expected a token id");
  contains(error("/model/vocab/he", -1), "found -1");
  contains(error("/model/vocab/he", 4'000'000'000'000), "found 4000000000000");
  contains(error("/model/vocab/he", 18'446'744'073'709'551'615U), "found 18446744073709551615");
  contains(error("/model/vocab/he", 1.5), "found 1.5");
  contains(error("/model/vocab/he", 10), "token 10: expected one text");
  contains(error("/model/merges", "h e"), "merges: expected an array");
  contains(error("/model/merges/0", 7), "merges[0]");
  contains(error("/model/merges/1", Json{"h"}), "merges[1]: expected two tokens, found 1");
  contains(error("/model/merges/0", "h nothing"), "expected tokens of the vocabulary");
  contains(error("/added_tokens/0/lstrip", true), "added_tokens[0]: lstrip: expected false");
  contains(error("/added_tokens/0/id", 300), "expected a token id");
  contains(error("/added_tokens/0/content", 3), "expected a string, found number");
  contains(error("/normalizer", Json{{"type", "NFC"}}), "normalizer: expected none");
  contains(error("/pre_tokenizer", nullptr), "pre_tokenizer");
  contains(error("/pre_tokenizer/type", "Metaspace"), "pre_tokenizer: type");
  contains(error("/pre_tokenizer/add_prefix_space", true), "add_prefix_space: expected false");
  contains(error("/decoder/type", "Metaspace"), "decoder");
  contains(error("/post_processor", Json{{"type", "BertProcessing"}}), "post_processor: type");
  const auto split = [](const char* regex, const char* behavior) {
    const Json part = {{"type", "Split"}, {"pattern", {{"Regex", regex}}}, {"behavior", behavior}};
    const Json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
    return Json{{"type", "Sequence"}, {"pretokenizers", {part, bytes}}};
  };
  CHECK(error("/pre_tokenizer", split("\\p{L}+", "Isolated")) == "no error");
  contains(error("/pre_tokenizer", split("\\p{L}+", "Removed")), "behavior: expected \"Isolated\"");
  contains(error("/pre_tokenizer", split("(a", "Isolated")), "expected a regular expression");
  contains(error("/pre_tokenizer", split("a*", "Isolated")), "cannot match nothing");
}

TEST_CASE("files that are no tokenizer at all are refused in one line") {
  const Files files;
  contains(files.error("tokenizer.json", ""), "an empty file");
  contains(files.error("tokenizer.json", "<!DOCTYPE html><html></html>"), "an HTML page");
  contains(files.error("tokenizer.json", "{\"model\": "), "expected JSON");
  contains(files.error("tokenizer.json", "{}"), "model: expected a value, found none");
  contains(files.error("tokenizer.json", "{\"model\": 3}"), "model: vocab");
  const std::string deep = "{\"a\":" + std::string(200'000, '[');
  contains(files.error("tokenizer.json", deep), "nesting");
  contains(files.error("tokenizer.model", "\n\n"), "found none");
  contains(files.error("tokenizer.model", std::string("\n\x0e\n\x05<unk>", 9)),
           "found SentencePiece's binary");
  CHECK_THROWS_AS(load_tokenizer(files.path() / "missing.json"), Error);
  const Files empty;
  CHECK_THROWS_WITH_AS(load_tokenizer(empty.path()),
                       doctest::Contains("expected tokenizer.json or tokenizer.model"), Error);
}

TEST_CASE("tiktoken lines that lie are refused with their number") {
  const Files files;
  const auto error = [&](const std::string& line) {
    return files.error("tokenizer.model", small_tiktoken() + line);
  };
  for (const char* line : {"YQ==", "YQ== ", "YQ== x", "YQ== -1", "YQ== 5 ", "YQ= 5", "Y*== 5", " 5",
                           "YQ== 99999999999999999999"}) {
    contains(error(line), ": line 6: expected a token in base64 and its rank");
  }
  contains(error("Yw== 4"), "expected each once, found 4 again");
  contains(error("Yw== 128000"), "expected below 128000");
  contains(error("Yw== 6"), "rank 5: expected a token, found none");
  contains(error("YQ== 5"), "expected each once, found token 0");
  contains(error(std::string(800, 'A') + " 5"), "at most 512 bytes");
  contains(error(std::string(4000, 'A') + " 5"), "expected a token in base64");
}

TEST_CASE("padding rows of the embedding are tokens without text, missing rows an error") {
  const Files files;
  Model model;
  model.path = files.put("m.gguf", small_gguf().bytes());
  model.gguf = std::make_shared<const Gguf>(model.path);
  model.config.vocab_size = 300;
  const Tokenizer tokenizer = load_tokenizer(model);
  CHECK(tokenizer.vocab_size() == 300);
  CHECK(tokenizer.decode(299).empty());
  model.config.vocab_size = 261;
  CHECK_THROWS_WITH_AS(load_tokenizer(model), doctest::Contains("expected at most 261"), Error);
}

}  // namespace
}  // namespace thaw
