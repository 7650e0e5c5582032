#include "cli/input.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iostream>

#include "cli/format.h"
#include "cli/terminal.h"
#include "device/error.h"

namespace thaw {
namespace {

class Descriptor {
 public:
  explicit Descriptor(const std::string& path)
      : fd_(path == "-" ? ::dup(STDIN_FILENO) : ::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {}
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

void add_input_flags(Flags& flags, InputOptions& o, const std::string& what) {
  flags.text(o.text, "-p, --prompt", "TEXT", what + " itself");
  flags.path(o.file, "-f, --file", "FILE",
             "read " + what + " from FILE; - or neither flag: from standard input");
  flags.dash(o.dash);
}

Input read_file(const std::string& path) {
  Input input{"", path == "-" ? "standard input" : path};
  const Descriptor file(path);
  if (file.get() < 0) fail(input.source, ": cannot open: ", std::strerror(errno));
  std::vector<char> block(1 << 16);
  for (;;) {
    const ssize_t n = ::read(file.get(), block.data(), block.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && errno == EAGAIN) {  // somebody who shares it does not wait for it
      pollfd more = {file.get(), POLLIN, 0};
      ::poll(&more, 1, -1);
      continue;
    }
    if (n < 0) fail(input.source, ": cannot read: ", std::strerror(errno));
    if (n == 0) return input;
    input.text.append(block.data(), static_cast<std::size_t>(n));
    require(input.text.size() <= kMaxInput, input.source, ": expected at most ",
            format_bytes(kMaxInput), " of text, found more");
  }
}

Input read_input(const InputOptions& o, const std::string& what) {
  if (o.text.has_value() + o.file.has_value() + o.dash > 1) {
    throw UsageError(join(what, ": expected one of -p, -f and -, found several"));
  }
  if (o.text) return {*o.text, "-p"};
  if (!o.file && !o.dash && stdin_is_terminal()) {
    throw UsageError(join("expected ", what, ": -p TEXT, -f FILE, or - for standard input"));
  }
  return read_file(o.file.value_or("-"));
}

void warn_of_missing(const Tokenizer& tokenizer, const Input& input) {
  if (const std::size_t missing = tokenizer.count_missing(input.text)) {
    std::cerr << "warning: " << input.source << ": "
              << count(static_cast<std::int64_t>(missing), "byte")
              << " that this vocabulary cannot spell\n";
  }
}

std::vector<TokenId> encode_input(const Tokenizer& tokenizer, const Input& input,
                                  Tokenizer::EncodeOptions options) {
  warn_of_missing(tokenizer, input);
  return tokenizer.encode(input.text, options);
}

void require_room(const Tokenizer& tokenizer, const Input& input, int most) {
  std::size_t longest = 1;
  for (TokenId id = 0; id < tokenizer.vocab_size(); ++id) {
    longest = std::max(longest, tokenizer.decode(id, true).size());
  }
  const std::size_t spelled = input.text.size() - tokenizer.count_missing(input.text);
  const std::size_t least = (spelled + longest - 1) / longest;
  require(least <= static_cast<std::size_t>(most), input.source, ": expected at most ", most,
          " tokens (the context), found ", least, " or more");
}

std::vector<std::int32_t> parse_token_ids(const Input& input, int vocab_size) {
  std::vector<std::int32_t> ids;
  const std::string_view text = input.text;
  constexpr std::string_view kBetween = " \t\r\n,[]";
  for (std::size_t at = 0; (at = text.find_first_not_of(kBetween, at)) != text.npos;) {
    const std::size_t end = std::min(text.find_first_of(kBetween, at), text.size());
    const std::string_view word = text.substr(at, end - at);
    const auto id = parse_number<std::int32_t>(word);
    require(id && *id >= 0 && *id < vocab_size, input.source, ": token ", ids.size(),
            ": expected an id from 0 to ", vocab_size - 1, ", found \"", printable(word, 20), "\"");
    ids.push_back(*id);
    at = end;
  }
  return ids;
}

}  // namespace thaw
