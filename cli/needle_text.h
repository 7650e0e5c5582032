// Long texts with something to find in them: filler, keys at given depths, and questions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tokenizer/tokenizer.h"

namespace thaw {

struct NeedleKey {
  std::string owner;   // "Anna"; "" when there is only one key
  std::string digits;  // what to find
  double depth = 0;    // where it stands, as a share of the filler: 0 .. 1
  int position = 0;    // of its first token in the context
};

enum class Filler { kSentences, kRepeated, kText };

struct NeedleSpec {
  int context = 1500;  // tokens before the first question, at most; some sentence less
  int digits = 7;
  std::vector<double> depths;  // of the keys in this text, ascending
  int distractors = 0;         // numbers that nobody will ask about
  Filler filler = Filler::kSentences;
  std::string text;  // kText: the filler
  bool chat = false;
  std::uint64_t seed = 0;
};

struct NeedleText {
  std::vector<TokenId> tokens;
  std::vector<NeedleKey> keys;  // as many as depths, in their order
};

// The same text for the same spec everywhere. The keys are named in the literature's words
// (Mohtashami and Jaggi, 2305.16300): "The pass key is N. Remember it. N is the pass key." Throws
// UsageError when keys and distractors do not fit the context, or the text given is too short.
NeedleText make_needle_text(const Tokenizer& tokenizer, const NeedleSpec& spec);

// Tokens that ask for a key after the context (or, when `again`, after an answer) and begin its
// answer: what the model writes next is the key.
std::vector<TokenId> needle_question(const Tokenizer& tokenizer, const NeedleKey& key, bool chat,
                                     bool again);

// The first run of digits in a text, and how many of `key`'s digits stand at their place in it.
std::string first_number(const std::string& text);
int digits_right(const std::string& found, const std::string& key);

}  // namespace thaw
