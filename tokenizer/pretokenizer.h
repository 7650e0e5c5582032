// Splits text into pieces by regular expressions (PCRE2): bytes never merge across a piece's edge.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace thaw {

// The regex of a tokenizer file, which is written for Oniguruma or Rust's fancy-regex, as one that
// PCRE2 reads in the same way: \s is Unicode White_Space, and \p{L}, \p{N} and \p{M} are those of
// Unicode 16 even where PCRE2 knows an older version. Throws Error(WHERE: ...) on what the dialects
// read differently or what no published tokenizer needs.
std::string to_pcre2(std::string_view pattern, const std::string& where);

class Pretokenizer {
 public:
  using Sink = std::function<void(std::string_view)>;

  // Compiles the patterns (in the dialect of tokenizer files). Throws Error(SOURCE: ...).
  Pretokenizer(const std::vector<std::string>& patterns, const std::string& source);
  ~Pretokenizer();

  // Hands the pieces of `text` to `sink` in order; joined they are `text`. Each pattern splits the
  // pieces of the one before it into its matches and what lies between them, and sees one piece at
  // a time. A maximal run of bytes that are not UTF-8 is a piece of its own.
  void split(std::string_view text, const Sink& sink) const;

 private:
  class Regex;
  void split_from(std::size_t stage, std::string_view text, const Sink& sink) const;

  std::string source_;
  std::vector<std::unique_ptr<Regex>> stages_;
};

}  // namespace thaw
