#include "tokenizer/byte_alphabet.h"

#include <array>

#include "tokenizer/utf8.h"

namespace thaw {
namespace {

constexpr int kNone = -1;

// The byte that each of the first 324 code points stands for: itself when it is printable Latin-1,
// while the other 68 bytes are written, in order, as U+0100 and up.
constexpr std::array<int, 324> kBytes = [] {
  std::array<int, 324> bytes{};
  for (int& byte : bytes) byte = kNone;
  std::size_t next = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xff && byte != 0xad);
    bytes[printable ? static_cast<std::size_t>(byte) : next++] = byte;
  }
  return bytes;
}();

}  // namespace

std::string from_byte_alphabet(std::string_view text) {
  std::string bytes;
  for (std::size_t at = 0; at < text.size();) {
    const CodePoint c = code_point_at(text, at);
    if (c.bytes == 0 || c.value >= kBytes.size() || kBytes[c.value] == kNone) {
      return std::string(text);
    }
    bytes += static_cast<char>(kBytes[c.value]);
    at += c.bytes;
  }
  return bytes;
}

}  // namespace thaw
