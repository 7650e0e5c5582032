#include "tokenizer/pretokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>

#include "device/error.h"
#include "tokenizer/utf8.h"

namespace thaw {
namespace {

template <auto free_it>
struct Deleter {
  template <class T>
  void operator()(T* pointer) const {
    free_it(pointer);
  }
};
using Code = std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>>;
using MatchContext = std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>>;
using MatchData = std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>>;

constexpr std::size_t kMaxPattern = 16384;    // bytes; published ones stay below 1000
constexpr std::size_t kMaxPatterns = 16;      // each splits what the one before left
constexpr std::uint32_t kMaxHeapKiB = 65536;  // of PCRE2's interpreter, where it has no JIT

std::string message_of(int error) {
  PCRE2_UCHAR text[160];
  pcre2_get_error_message(error, text, sizeof text);
  return reinterpret_cast<const char*>(text);
}

}  // namespace

class Pretokenizer::Regex {
 public:
  Regex(std::string_view pattern, const std::string& source);

  // The first match in `text` at or after byte `from`, as [begin, end); {npos, npos} for none.
  // `text` is valid UTF-8.
  std::pair<std::size_t, std::size_t> find(std::string_view text, std::size_t from,
                                           const std::string& source,
                                           pcre2_match_data* match) const;
  MatchData new_match() const {
    return MatchData(pcre2_match_data_create_from_pattern(code_.get(), nullptr));
  }

 private:
  Code code_;
};

Pretokenizer::Regex::Regex(std::string_view pattern, const std::string& source) {
  const std::string where = source + ": pre-tokenizer";
  require(pattern.size() <= kMaxPattern, where, ": pattern: expected at most ", kMaxPattern,
          " bytes, found ", pattern.size());
  const std::string translated = to_pcre2(pattern, where);
  int error = 0;
  std::size_t offset = 0;
  code_.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                            PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr));
  require(code_ != nullptr, where, ": pattern: expected a regular expression, found \"",
          printable(pattern), "\": ", message_of(error));
  std::uint32_t matches_empty = 0;
  pcre2_pattern_info(code_.get(), PCRE2_INFO_MATCHEMPTY, &matches_empty);
  require(matches_empty == 0, where, ": pattern: expected one that cannot match nothing, found \"",
          printable(pattern), "\"");
  pcre2_jit_compile(code_.get(), PCRE2_JIT_COMPLETE);  // without JIT, pcre2_match interprets
}

std::pair<std::size_t, std::size_t> Pretokenizer::Regex::find(std::string_view text,
                                                              std::size_t from,
                                                              const std::string& source,
                                                              pcre2_match_data* match) const {
  // A look over the whole text for one match is legitimate (white space to its end); more is not.
  static thread_local const MatchContext context(pcre2_match_context_create(nullptr));
  const std::size_t steps = std::min<std::size_t>(1'000'000 + 16 * text.size(), 0xffffffff);
  pcre2_set_match_limit(context.get(), static_cast<std::uint32_t>(steps));
  pcre2_set_heap_limit(context.get(), kMaxHeapKiB);
  const int count = pcre2_match(code_.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(),
                                from, PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY, match, context.get());
  if (count == PCRE2_ERROR_NOMATCH) return {std::string_view::npos, std::string_view::npos};
  require(count > 0, source, ": pre-tokenizer: expected to split the text at byte ", from,
          ", found: ", message_of(count));
  const std::size_t* span = pcre2_get_ovector_pointer(match);
  return {span[0], span[1]};
}

Pretokenizer::Pretokenizer(const std::vector<std::string>& patterns, const std::string& source)
    : source_(source) {
  require(patterns.size() <= kMaxPatterns, source, ": pre-tokenizer: expected at most ",
          kMaxPatterns, " patterns, found ", patterns.size());
  for (const std::string& pattern : patterns) {
    stages_.push_back(std::make_unique<Regex>(pattern, source));
  }
}

Pretokenizer::~Pretokenizer() = default;

void Pretokenizer::split(std::string_view text, const Sink& sink) const {
  while (!text.empty()) {
    const std::size_t valid = valid_utf8_prefix(text);
    if (valid > 0) split_from(0, text.substr(0, valid), sink);
    text.remove_prefix(valid);
    const std::size_t invalid = invalid_utf8_prefix(text);
    if (invalid > 0) sink(text.substr(0, invalid));
    text.remove_prefix(invalid);
  }
}

// Splits `text`, valid UTF-8 and not empty, by the patterns from `stage` on.
void Pretokenizer::split_from(std::size_t stage, std::string_view text, const Sink& sink) const {
  if (stage == stages_.size()) return sink(text);
  const Regex& regex = *stages_[stage];
  const MatchData match = regex.new_match();
  std::size_t at = 0;
  while (at < text.size()) {
    const auto [begin, end] = regex.find(text, at, source_, match.get());
    if (begin == std::string_view::npos) break;
    if (begin > at) split_from(stage + 1, text.substr(at, begin - at), sink);
    split_from(stage + 1, text.substr(begin, end - begin), sink);
    at = end;
  }
  if (at < text.size()) split_from(stage + 1, text.substr(at), sink);
}

}  // namespace thaw
