#include "cli/text_stream.h"

#include <algorithm>
#include <utility>

namespace thaw {
namespace {

// Bytes of the UTF-8 character that begins with `byte`; 1 when none does.
std::size_t utf8_length(unsigned char byte) {
  if (byte < 0xC2 || byte > 0xF4) return 1;
  return byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

}  // namespace

std::size_t unfinished_utf8(std::string_view text) {
  for (std::size_t n = 1; n <= std::min<std::size_t>(3, text.size()); ++n) {
    const auto byte = static_cast<unsigned char>(text[text.size() - n]);
    const bool inside = (byte & 0xC0) == 0x80;  // the character begins further left
    if (!inside) return n < utf8_length(byte) ? n : 0;
  }
  return 0;
}

TextStream::TextStream(std::vector<std::string> stops, Emit emit)
    : stops_(std::move(stops)), emit_(std::move(emit)) {
  std::erase(stops_, "");
}

bool TextStream::feed(std::string_view bytes) {
  for (std::size_t i = 0; i < bytes.size() && !stopped_; ++i) {
    held_ += bytes[i];
    if (const std::size_t stop = longest_stop_at_end()) {
      stopped_ = true;
      emit_front(held_.size() - stop);
      held_.clear();
    }
  }
  const std::size_t safe = held_.size() - possible_stop_at_end();
  emit_front(safe - unfinished_utf8(std::string_view(held_).substr(0, safe)));
  return !stopped_;
}

void TextStream::finish() { emit_front(held_.size()); }

void TextStream::emit_front(std::size_t n) {
  if (n == 0) return;
  emit_(std::string_view(held_).substr(0, n));
  held_.erase(0, n);
}

std::size_t TextStream::longest_stop_at_end() const {
  std::size_t longest = 0;
  for (const std::string& stop : stops_) {
    if (held_.ends_with(stop)) longest = std::max(longest, stop.size());
  }
  return longest;
}

// The longest end of held_ that begins a stop string.
std::size_t TextStream::possible_stop_at_end() const {
  std::size_t longest = 0;
  for (const std::string& stop : stops_) {
    for (std::size_t n = std::min(held_.size(), stop.size() - 1); n > longest; --n) {
      if (held_.ends_with(std::string_view(stop).substr(0, n))) longest = n;
    }
  }
  return longest;
}

}  // namespace thaw
