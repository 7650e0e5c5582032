// Against Hugging Face tokenizers and tiktoken: tools/golden_tokenizer.py makes the data, and runs
// these tests on more of it by way of THAW_TOKENIZER_GOLDEN and THAW_TOKENIZER_JSON.
#include <doctest/doctest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/tokenizer_source.h"
#include "tests/weights.h"
#include "tokenizer/pretokenizer.h"

namespace thaw {
namespace {

using Json = nlohmann::json;
using Ids = std::vector<TokenId>;

const std::vector<Json>& golden() {
  static const std::vector<Json> records = [] {
    const char* const other = std::getenv("THAW_TOKENIZER_GOLDEN");
    std::ifstream file(other ? other : "tests/golden/tokenizer.jsonl");
    std::vector<Json> all;
    for (std::string line; std::getline(file, line);) all.push_back(Json::parse(line));
    return all;
  }();
  return records;
}

struct Tally {
  int compared = 0;
  int different = 0;
};

// Compares `actual(text)` with what the records hold under `key`, and says where they first differ.
template <class Actual>
void compare(const std::string& key, Actual actual) {
  Tally tally;
  for (const Json& record : golden()) {
    if (!record.contains(key)) continue;
    const auto& text = record["text"].get_ref<const std::string&>();
    ++tally.compared;
    if (actual(text) == record[key].get<Ids>()) continue;
    if (++tally.different == 1) {
      MESSAGE(key, ": ", Json(text).dump(), " expected ", record[key].dump(), " found ",
              Json(actual(text)).dump());
    }
  }
  MESSAGE(key, ": ", tally.compared, " strings, ", tally.different, " differ");
  CHECK(tally.compared >= 50);
  CHECK(tally.different == 0);
}

void compare_tokenizer(const Tokenizer& tokenizer, const std::string& key) {
  compare(key, [&](const std::string& text) { return tokenizer.encode(text); });
  compare(key + "_parsed",
          [&](const std::string& text) { return tokenizer.encode(text, {.parse_special = true}); });
  for (const Json& record : golden()) {
    const auto& text = record["text"].get_ref<const std::string&>();
    if (tokenizer.count_missing(text) == 0)
      REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

void compare_pieces(const std::string& name) {
  const Pretokenizer pretokenizer(named_pretokenizer(name, "test").patterns, "test");
  compare(name, [&](const std::string& text) {
    Ids lengths;
    pretokenizer.split(text, [&](std::string_view piece) {
      lengths.push_back(static_cast<TokenId>(piece.size()));
    });
    return lengths;
  });
}

TEST_CASE("golden tokens of SmolLM2, vocabulary from GGUF") {
  if (const auto path = weights_file(kSmolLM2File))
    compare_tokenizer(load_tokenizer(*path), "smollm2");
}

TEST_CASE("golden tokens of LLaMA-3, vocabulary from tiktoken") {
  if (const auto path = weights_file(kLlama3TokenizerFile)) {
    compare_tokenizer(load_tokenizer(*path), "llama3");
  }
}

TEST_CASE("golden tokens of SmolLM2, vocabulary as tokenizers saves it") {
  if (const char* const path = std::getenv("THAW_TOKENIZER_JSON")) {
    compare_tokenizer(load_tokenizer(std::filesystem::path(path)), "smollm2");
  }
}

TEST_CASE("golden tokens: pieces of qwen2") { compare_pieces("qwen2"); }

TEST_CASE("golden tokens: pieces of gpt-2") { compare_pieces("gpt-2"); }

}  // namespace
}  // namespace thaw
