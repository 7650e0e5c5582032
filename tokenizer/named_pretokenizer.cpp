// The pre-tokenizers of published models, as their tokenizer.json (or tiktoken source) has them.
#include <algorithm>
#include <array>

#include "device/error.h"
#include "tokenizer/tokenizer.h"

namespace thaw {
namespace {

constexpr const char* kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr const char* kLlama3 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr const char* kQwen2 =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
// Hugging Face's Digits asks Rust's char::is_numeric, which knows the numbers of Unicode 17.
constexpr const char* kDigit = R"([\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}])";

template <std::size_t n>
bool among(const std::array<std::string_view, n>& names, std::string_view name) {
  return std::find(names.begin(), names.end(), name) != names.end();
}

}  // namespace

NamedPretokenizer named_pretokenizer(std::string_view name, const std::string& source) {
  constexpr std::array<std::string_view, 5> kLlama3Names = {"llama-bpe", "llama3", "llama-v3",
                                                            "falcon3", "pixtral"};
  constexpr std::array<std::string_view, 4> kSmollmNames = {"smollm", "starcoder", "refact",
                                                            "codeshell"};
  constexpr std::array<std::string_view, 4> kQwen2Names = {"qwen2", "deepseek-r1-qwen", "stablelm2",
                                                           "hunyuan"};
  constexpr std::array<std::string_view, 4> kGpt2Names = {"gpt-2", "phi-2", "olmo", "mpt"};
  if (among(kLlama3Names, name)) return {{kLlama3}, true, true};
  if (among(kSmollmNames, name)) return {{kDigit, kGpt2}, false, false};
  if (among(kQwen2Names, name)) return {{kQwen2}, false, false};
  if (among(kGpt2Names, name)) return {{kGpt2}, false, false};
  fail(source, ": tokenizer.ggml.pre: expected llama-bpe, smollm, qwen2 or gpt-2, found \"",
       printable(name), "\"");
}

}  // namespace thaw
