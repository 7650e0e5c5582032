#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "cli/text_stream.h"
#include "tests/tiny_model.h"

namespace thaw {
namespace {

struct Run {
  std::vector<std::string> pieces;
  bool stopped = false;
  std::string text() const {
    std::string all;
    for (const std::string& piece : pieces) all += piece;
    return all;
  }
};

Run run(const std::vector<std::string>& chunks, std::vector<std::string> stops = {}) {
  Run result;
  TextStream stream(std::move(stops), [&](std::string_view s) { result.pieces.emplace_back(s); });
  for (const std::string& chunk : chunks) {
    if ((result.stopped = !stream.feed(chunk))) break;
  }
  stream.finish();
  return result;
}

using Pieces = std::vector<std::string>;

TEST_CASE("text stream: a character cut in two is emitted whole") {
  CHECK(run({"a\xC3", "\xA9 b"}).pieces == Pieces{"a", "\xC3\xA9 b"});
  CHECK(run({"\xF0\x9F", "\x98", "\x80", "!"}).pieces == Pieces{"\xF0\x9F\x98\x80", "!"});
  CHECK(run({"\xE2\x82", "\xAC"}).pieces == Pieces{"\xE2\x82\xAC"});
}

TEST_CASE("text stream: invalid bytes pass unchanged and are not held") {
  CHECK(run({"\x80", "x"}).pieces == Pieces{"\x80", "x"});
  CHECK(run({"\xFF", "x"}).pieces == Pieces{"\xFF", "x"});
  CHECK(run({"\xC3", "x"}).text() == "\xC3x");
  CHECK(run({"\x80\x80\x80\x80", "x"}).pieces == Pieces{"\x80\x80\x80\x80", "x"});
}

TEST_CASE("text stream: an unfinished character at the end is emitted as it is") {
  CHECK(run({"a\xF0\x9F\x98"}).pieces == Pieces{"a", "\xF0\x9F\x98"});
}

TEST_CASE("text stream: unfinished_utf8 by length of the character") {
  CHECK(unfinished_utf8("") == 0);
  CHECK(unfinished_utf8("abc") == 0);
  CHECK(unfinished_utf8("\xC3") == 1);
  CHECK(unfinished_utf8("\xC3\xA9") == 0);
  CHECK(unfinished_utf8("\xE2\x82") == 2);
  CHECK(unfinished_utf8("\xF0\x9F\x98") == 3);
  CHECK(unfinished_utf8("\xF0\x9F\x98\x80") == 0);
  CHECK(unfinished_utf8("\xC1") == 0);
  CHECK(unfinished_utf8("\xF5") == 0);
}

TEST_CASE("text stream: a stop string is not printed, nor what follows it") {
  const Run r = run({"one\nUser", ": two"}, {"\nUser:"});
  CHECK(r.text() == "one");
  CHECK(r.stopped);
}

TEST_CASE("text stream: what could become a stop string waits, then passes") {
  const Run r = run({"a END", " of b"}, {"END."});
  CHECK(r.pieces == Pieces{"a ", "END of b"});
  CHECK_FALSE(r.stopped);
  CHECK(run({"aEN"}, {"END"}).text() == "aEN");  // the end of the text releases it
}

TEST_CASE("text stream: a stop string that begins again inside itself is found") {
  CHECK(run({"aab"}, {"ab"}).text() == "a");
  CHECK(run({"xababac!"}, {"abac"}).text() == "xab");
  CHECK(run({"x", "a", "a", "a", "b"}, {"aab"}).text() == "xa");
}

TEST_CASE("text stream: the stop string that is completed first wins, the longest on a tie") {
  CHECK(run({"abcd"}, {"abcd", "bc"}).text() == "a");
  CHECK(run({"xyz"}, {"z", "yz"}).text() == "x");
}

TEST_CASE("text stream: empty stop strings never match") {
  const Run r = run({"abc"}, {"", ""});
  CHECK(r.text() == "abc");
  CHECK_FALSE(r.stopped);
}

TEST_CASE("text stream: a stop string inside a character leaves the bytes before it") {
  CHECK(run({"a\xC3", "\xA9"}, {"\xA9"}).text() == "a\xC3");
}

TEST_CASE("text stream: random texts, cut anywhere, equal a search in the whole text") {
  testing::Random random(11);
  const char* const alphabet[] = {"a", "b", "\xC3\xA9", "\xE2\x82\xAC", "\xF0\x9F\x98\x80", "\x80"};
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (int n = random.below(20); n > 0; --n) text += alphabet[random.below(6)];
    std::vector<std::string> stops(random.below(3));
    for (std::string& stop : stops) {
      for (int n = 1 + random.below(3); n > 0; --n) stop += alphabet[random.below(3)];
    }
    std::string expected = text;
    for (std::size_t end = 1; end <= text.size() && expected == text; ++end) {
      for (const std::string& stop : stops) {
        if (!text.substr(0, end).ends_with(stop)) continue;
        expected = std::min(expected, text.substr(0, end - stop.size()));  // prefixes: the shortest
      }
    }
    std::vector<std::string> chunks;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t n = 1 + random.below(4);
      chunks.push_back(text.substr(at, n));
      at += n;
    }
    const Run r = run(chunks, stops);
    CAPTURE(text);
    CHECK(r.text() == expected);
    for (const std::string& piece : r.pieces) CHECK_FALSE(piece.empty());
  }
}

TEST_CASE("text stream: every piece of valid text is valid on its own") {
  testing::Random random(12);
  const std::string text = "na\xC3\xAFve \xE2\x82\xAC \xF0\x9F\x98\x80\xF0\x9F\x8F\xBD ok";
  for (int round = 0; round < 200; ++round) {
    std::vector<std::string> chunks;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t n = 1 + random.below(3);
      chunks.push_back(text.substr(at, n));
      at += n;
    }
    const Run r = run(chunks, {"\xF0\x9F\x98\x81", "xyz"});
    CHECK(r.text() == text);
    for (const std::string& piece : r.pieces) {
      CHECK(unfinished_utf8(piece) == 0);
      CHECK((static_cast<unsigned char>(piece[0]) & 0xC0) != 0x80);
    }
  }
}

}  // namespace
}  // namespace thaw
