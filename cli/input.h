// The text that a command works on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "cli/flags.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

// Text from -p, -f or standard input ("-", or neither flag and standard input is no terminal).
struct InputOptions {
  std::optional<std::string> text;
  std::optional<std::string> file;
  bool dash = false;
};
void add_input_flags(Flags& flags, InputOptions& options, const std::string& what);
inline constexpr std::size_t kMaxInput = std::size_t{256} << 20;  // bytes
// At most kMaxInput. `source` names it in messages.
struct Input {
  std::string text;
  std::string source;
};
Input read_input(const InputOptions& options, const std::string& what);
Input read_file(const std::string& path);  // "-" is standard input

// Warns on standard error of bytes that no token of this vocabulary spells: they are lost.
void warn_of_missing(const Tokenizer& tokenizer, const Input& input);

// After that warning.
std::vector<TokenId> encode_input(const Tokenizer& tokenizer, const Input& input,
                                  Tokenizer::EncodeOptions options);

// Throws Error when `input` cannot possibly be `most` tokens or fewer, by its length alone: that
// spares the time and memory of encoding it.
void require_room(const Tokenizer& tokenizer, const Input& input, int most);

// Token ids as text: whole numbers between spaces, commas and square brackets.
std::vector<std::int32_t> parse_token_ids(const Input& input, int vocab_size);

}  // namespace thaw
