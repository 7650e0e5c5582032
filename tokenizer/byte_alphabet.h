// GPT-2's way to write bytes as printable text: the vocabularies of Hugging Face and GGUF files are
// written in it (openai/gpt-2, encoder.py, bytes_to_unicode).
#pragma once

#include <string>
#include <string_view>

namespace thaw {

// The bytes that `text` spells, or `text` itself when it has a character outside the alphabet.
std::string from_byte_alphabet(std::string_view text);

}  // namespace thaw
