// Model files that tests may use. `make test` fetches them and sets THAW_REQUIRE_WEIGHTS=1, so that
// a missing one fails; run by hand without them, the tests that need one skip and say so.
#pragma once

#include <doctest/doctest.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace thaw {

constexpr const char* kSmolLM2File = "SmolLM2-135M-Instruct.Q4_1.gguf";
constexpr const char* kLlama3TokenizerFile = "llama3-tokenizer.model";

// The file of that name in $THAW_WEIGHTS, or else in weights/; nothing when it is in neither.
inline std::optional<std::filesystem::path> weights_file(const std::string& name) {
  const char* const directory = std::getenv("THAW_WEIGHTS");
  const auto path = std::filesystem::path(directory ? directory : "weights") / name;
  if (std::filesystem::exists(path)) return path;
  const char* const required = std::getenv("THAW_REQUIRE_WEIGHTS");
  if (required && std::string(required) == "1")
    FAIL(path.string(), " is missing: run make weights");
  MESSAGE("skipped: ", path.string(), " is missing (make weights)");
  return std::nullopt;
}

}  // namespace thaw
