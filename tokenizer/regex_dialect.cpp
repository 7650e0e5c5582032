#include <algorithm>
#include <string>
#include <string_view>

#include "device/error.h"
#include "tokenizer/pretokenizer.h"

namespace thaw {
namespace {

// Unicode White_Space. PCRE2's own \s also has U+180E, which lost the property in Unicode 6.3.
constexpr std::string_view kSpace =
    R"(\t-\r \x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// What Unicode 15, 15.1 and 16 added; PCRE2 10.42 has Unicode 14.
constexpr std::string_view kLetters =
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3})"
    R"(\x{10d4a}-\x{10d65}\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240})"
    R"(\x{11380}-\x{11389}\x{1138b}\x{1138e}\x{11390}-\x{113b5}\x{113b7}\x{113d1}\x{113d3})"
    R"(\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10}\x{11f12}-\x{11f33}\x{1342f})"
    R"(\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d}\x{16d40}-\x{16d6c}\x{18cff})"
    R"(\x{1b132}\x{1b155}\x{1df25}-\x{1df2a}\x{1e030}-\x{1e06d}\x{1e4d0}-\x{1e4eb})"
    R"(\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNumbers =
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59})"
    R"(\x{16130}-\x{16139}\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3})"
    R"(\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";
constexpr std::string_view kMarks =
    R"(\x{897}\x{cf3}\x{ece}\x{10d69}-\x{10d6d}\x{10efc}-\x{10eff}\x{11241}\x{113b8}-\x{113c0})"
    R"(\x{113c2}\x{113c5}\x{113c7}-\x{113ca}\x{113cc}-\x{113d0}\x{113d2}\x{113e1}-\x{113e2})"
    R"(\x{11f00}-\x{11f01}\x{11f03}\x{11f34}-\x{11f3a}\x{11f3e}-\x{11f42}\x{11f5a}\x{13440})"
    R"(\x{13447}-\x{13455}\x{1611e}-\x{1612f}\x{1e08f}\x{1e4ec}-\x{1e4ef}\x{1e5ee}-\x{1e5ef})";

// One pass over a pattern, left to right; every method takes what starts at `at_`.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where)
      : pattern_(pattern), where_(where) {}

  std::string run() {
    while (at_ < pattern_.size()) step();
    return std::move(out_);
  }

 private:
  [[noreturn]] void unsupported() const {
    fail(where_, ": pattern: expected a construct that thaw knows, found \"",
         printable(pattern_.substr(at_), 24), "\"");
  }
  bool here(std::string_view text) const { return pattern_.substr(at_).starts_with(text); }
  void copy(std::size_t count) {
    out_ += pattern_.substr(at_, count);
    at_ += count;
  }
  void replace(std::size_t count, std::string_view text) {
    out_ += text;
    at_ += count;
  }

  void step() {
    switch (pattern_[at_]) {
      case '\\':
        return escape(false);
      case '[':
        return character_class();
      case '(':
        return group();
      case '{':
        return repeat();
      case '^':
      case '$':
        unsupported();
      default:
        copy(1);
    }
  }

  void group() {
    for (const std::string_view open : {"(?:", "(?i:", "(?=", "(?!"}) {
      if (here(open)) return copy(open.size());
    }
    if (here("(?") || here("(*")) unsupported();
    copy(1);
  }

  // {n}, {n,} or {n,m}. Oniguruma reads a + or ? after it as a second repeat, others do not.
  void repeat() {
    const std::size_t end = pattern_.find('}', at_);
    if (end == std::string_view::npos || end == at_ + 1) unsupported();
    const std::string_view inside = pattern_.substr(at_ + 1, end - at_ - 1);
    if (inside.find_first_not_of("0123456789,") != std::string_view::npos || inside[0] == ',' ||
        std::count(inside.begin(), inside.end(), ',') > 1) {
      unsupported();
    }
    if (end + 1 < pattern_.size() &&
        std::string_view("+?*").find(pattern_[end + 1]) != std::string_view::npos) {
      unsupported();
    }
    copy(end + 1 - at_);
  }

  void character_class() {
    copy(here("[^") ? 2 : 1);
    if (here("]")) unsupported();
    while (!here("]")) {
      if (at_ == pattern_.size() || here("[") || here("&&")) unsupported();
      if (here("\\")) {
        escape(true);
      } else {
        copy(1);
      }
    }
    copy(1);
  }

  // `set` as part of a class, or as a class.
  void put_set(std::size_t count, std::string_view set, bool in_class) {
    replace(count, in_class ? std::string(set) : join('[', set, ']'));
  }

  void escape(bool in_class) {
    if (here("\\s")) return put_set(2, kSpace, in_class);
    if (here("\\S") && !in_class) return replace(2, join("[^", kSpace, ']'));
    if (here("\\d")) return replace(2, "\\p{Nd}");
    if (here("\\p{L}")) return put_set(5, join("\\p{L}", kLetters), in_class);
    if (here("\\p{N}")) return put_set(5, join("\\p{N}", kNumbers), in_class);
    if (here("\\p{M}")) return put_set(5, join("\\p{M}", kMarks), in_class);
    for (const std::string_view category :
         {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "No", "P", "S", "Z"}) {
      if (here(join("\\p{", category, '}'))) return copy(category.size() + 4);
    }
    if (here("\\x{")) return code_point();
    const char next = at_ + 1 < pattern_.size() ? pattern_[at_ + 1] : '\0';
    const bool letter_or_digit = (next >= '0' && next <= '9') || (next >= 'A' && next <= 'Z') ||
                                 (next >= 'a' && next <= 'z');
    const bool plain = next == 'r' || next == 'n' || next == 't';
    if (next <= ' ' || next >= 0x7f || (letter_or_digit && !plain)) unsupported();
    copy(2);
  }

  void code_point() {
    const std::size_t end = pattern_.find('}', at_);
    if (end == std::string_view::npos || end > at_ + 9) unsupported();
    copy(end + 1 - at_);
  }

  std::string_view pattern_;
  const std::string& where_;
  std::size_t at_ = 0;
  std::string out_;
};

}  // namespace

std::string to_pcre2(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

}  // namespace thaw
