// How SentencePiece's vocabularies (LLaMA 2, TinyLlama, Mistral) write their tokens in GGUF and
// Hugging Face files: a space as U+2581, and a byte token as "<0x0A>".
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace thaw {

inline constexpr std::string_view kSpaceMark = "\u2581";

// `text` with spaces for space marks.
std::string from_space_marks(std::string_view text);

// The byte that "<0x0A>" names; none where `text` is something else.
std::optional<char> byte_named(std::string_view text);

}  // namespace thaw
