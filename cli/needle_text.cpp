#include "cli/needle_text.h"

#include <algorithm>
#include <random>
#include <string_view>

#include "device/error.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

using Tokens = std::vector<TokenId>;
using Words = std::initializer_list<const char*>;

constexpr std::size_t kLongestPiece = 64;  // tokens of a user's text between two places for a key

// Draws that are the same with every standard library.
class Dice {
 public:
  explicit Dice(std::uint64_t seed) : rng_(seed) {}
  std::size_t below(std::size_t n) { return rng_() % n; }
  const char* one_of(Words words) { return words.begin()[below(words.size())]; }
  std::string number(int digits) {
    std::string out(1, static_cast<char>('1' + below(9)));
    while (std::ssize(out) < digits) out += static_cast<char>('0' + below(10));
    return out;
  }

 private:
  std::mt19937_64 rng_;
};

// A space and a plain sentence, one of about 900,000.
std::string sentence(Dice& dice) {
  const std::string who = dice.one_of(
      {"the baker", "an old sailor", "my neighbour", "the teacher", "a young farmer", "the clerk",
       "a tired nurse", "the gardener", "our cousin", "the painter", "a quiet student",
       "the miller", "a passing driver", "the doctor", "their aunt"});
  const std::string did =
      dice.one_of({"walked to", "looked at", "talked about", "waited near", "wrote about", "drew",
                   "cleaned", "visited", "remembered", "painted", "came back from", "sat by"});
  const std::string what = dice.one_of({"the bridge", "the market", "the garden", "the harbour",
                                        "the library", "the old mill", "the school", "the forest",
                                        "the station", "the church", "the lake", "the orchard"});
  const std::string when = dice.one_of(
      {"in the morning", "after lunch", "before the rain", "in early spring", "at night",
       "on Sunday", "during the storm", "in the summer", "late in autumn", "every day"});
  const std::string how =
      dice.one_of({"with a friend", "without a word", "and went home", "and had some tea",
                   "while it snowed", "and found nothing new", "for a long time", "and sang a song",
                   "once again", "and thought of the sea"});
  std::string out;
  switch (dice.below(4)) {
    case 0:
      out = join(who, " ", did, " ", what, " ", when, " ", how);
      break;
    case 1:
      out = join(when, ", ", who, " ", did, " ", what, " ", how);
      break;
    case 2:
      out = join(who, " ", did, " ", what, " ", how, ", ", when);
      break;
    default:
      out = join(how[0] == 'a' ? "once " : "", when, ", ", who, " ", did, " ", what);
  }
  out[0] = static_cast<char>(out[0] - 'a' + 'A');
  return join(" ", out, ".");
}

// A part of a text that has begun.
Tokens go_on(const Tokenizer& tokenizer, const std::string& text) {
  return tokenizer.encode(text, {.continues = true});
}

// What stands between the keys, piece by piece.
class Source {
 public:
  Source(const Tokenizer& tokenizer, const NeedleSpec& spec, Dice& dice)
      : tokenizer_(tokenizer), filler_(spec.filler), dice_(dice) {
    if (filler_ == Filler::kText) {
      const auto enough = std::size_t{128} * spec.context;  // bytes: a token has fewer
      text_ = go_on(tokenizer, spec.text.substr(0, enough));
    }
  }

  // Empty when a user's text is used up.
  Tokens next() {
    if (filler_ == Filler::kSentences) return go_on(tokenizer_, sentence(dice_));
    if (filler_ == Filler::kRepeated) {
      constexpr const char* kLines[] = {" The grass is green.", " The sky is blue.",
                                        " The sun is yellow.", " Here we go.",
                                        " There and back again."};
      return go_on(tokenizer_, kLines[n_pieces_++ % std::size(kLines)]);
    }
    const std::size_t begin = at_;
    while (at_ < text_.size() && at_ - begin < kLongestPiece) {
      const std::string_view bytes = tokenizer_.decode(text_[at_++]);
      if (!bytes.empty() && std::string_view(".!?\n").find(bytes.back()) != std::string::npos)
        break;
    }
    return Tokens(text_.begin() + begin, text_.begin() + at_);
  }

 private:
  const Tokenizer& tokenizer_;
  Filler filler_;
  Dice& dice_;
  Tokens text_;
  std::size_t at_ = 0;
  std::size_t n_pieces_ = 0;
};

// ["close this message, open the assistant's"] as the chat format has it.
Tokens turn_change(const Tokenizer& tokenizer, ChatFormat format,
                   const std::vector<ChatMessage>& between) {
  std::vector<ChatMessage> messages = {{"assistant", ""}};  // opens as the assistant's turn does
  messages.insert(messages.end(), between.begin(), between.end());
  const Tokens opening = encode_chat(tokenizer, format, {});
  const Tokens all = encode_chat(tokenizer, format, messages);
  return Tokens(all.begin() + std::ssize(opening), all.end());
}

// The user's message up to where the filler begins, or the beginning of a plain text.
Tokens preamble(const Tokenizer& tokenizer, bool chat, bool several) {
  const std::string text =
      several ? "There are important pass keys hidden inside a lot of irrelevant text. Find them "
                "and memorize them. I will quiz you about them."
              : "There is an important pass key hidden inside a lot of irrelevant text. Find it "
                "and memorize it. I will quiz you about it.";
  if (!chat) return tokenizer.encode(text + "\n\n", {.add_special = true});
  const ChatFormat format = recognise_chat_format(tokenizer);
  std::vector<ChatMessage> messages;
  if (const std::string system = default_system_message(tokenizer); !system.empty())
    messages.push_back({"system", system});
  messages.push_back({"user", text});
  Tokens ids = encode_chat(tokenizer, format, messages);
  ids.resize(ids.size() - turn_change(tokenizer, format, {}).size());
  const Tokens gap = go_on(tokenizer, "\n\n");
  ids.insert(ids.end(), gap.begin(), gap.end());
  return ids;
}

std::string of(const std::string& owner) { return owner.empty() ? "" : " of " + owner; }

// Something that is put between two pieces of filler.
struct Insert {
  double depth;
  int key;  // -1: a distractor
  Tokens tokens;
};

std::vector<Insert> make_inserts(const Tokenizer& tokenizer, const NeedleSpec& spec, Dice& dice,
                                 std::vector<NeedleKey>& keys) {
  constexpr const char* kOwners[] = {"Anna",  "Boris", "Carla", "David",
                                     "Elena", "Frank", "Greta", "Hugo"};
  constexpr const char* kThings[] = {"phone number", "ticket number", "account number",
                                     "locker code"};
  constexpr const char* kOthers[] = {"Ivan", "Julia", "Karl", "Laura", "Marco", "Nina", "Oscar"};
  const auto say = [&](const std::string& thing, const std::string& owner,
                       const std::string& number) {
    return go_on(tokenizer, join(" The ", thing, of(owner), " is ", number, ". Remember it. ",
                                 number, " is the ", thing, of(owner), "."));
  };
  std::vector<Insert> inserts;
  for (std::size_t i = 0; i < spec.depths.size(); ++i) {
    const std::string owner = spec.depths.size() > 1 ? kOwners[i % std::size(kOwners)] : "";
    keys.push_back({owner, dice.number(spec.digits), spec.depths[i], 0});
    inserts.push_back(
        {spec.depths[i], static_cast<int>(i), say("pass key", owner, keys[i].digits)});
  }
  for (int i = 0; i < spec.distractors; ++i) {
    const double depth = static_cast<double>(dice.below(1000)) / 1000;
    inserts.push_back({depth, -1,
                       say(kThings[i % std::size(kThings)], kOthers[i % std::size(kOthers)],
                           dice.number(spec.digits))});
  }
  std::stable_sort(inserts.begin(), inserts.end(),
                   [](const Insert& a, const Insert& b) { return a.depth < b.depth; });
  return inserts;
}

}  // namespace

NeedleText make_needle_text(const Tokenizer& tokenizer, const NeedleSpec& spec) {
  Dice dice(spec.seed);
  NeedleText result;
  const std::vector<Insert> inserts = make_inserts(tokenizer, spec, dice, result.keys);
  result.tokens = preamble(tokenizer, spec.chat, spec.depths.size() > 1);
  std::size_t needed = result.tokens.size();
  for (const Insert& insert : inserts) needed += insert.tokens.size();
  if (needed > static_cast<std::size_t>(spec.context)) {
    throw UsageError(join("--context: expected at least ", needed,
                          " tokens, which the keys and "
                          "the rest take without filler, found ",
                          spec.context));
  }
  const std::size_t room = spec.context - needed;
  Source source(tokenizer, spec, dice);
  auto next = inserts.begin();
  const auto insert_up_to = [&](double depth) {
    for (; next != inserts.end() && next->depth <= depth; ++next) {
      if (next->key >= 0) result.keys[next->key].position = static_cast<int>(result.tokens.size());
      result.tokens.insert(result.tokens.end(), next->tokens.begin(), next->tokens.end());
    }
  };
  for (std::size_t filled = 0;;) {
    const Tokens piece = source.next();
    if (piece.empty()) {
      throw UsageError(join("-f: expected a text of at least ", room, " tokens, found ", filled));
    }
    if (filled + piece.size() > room) break;
    insert_up_to(static_cast<double>(filled) / static_cast<double>(room));
    result.tokens.insert(result.tokens.end(), piece.begin(), piece.end());
    filled += piece.size();
  }
  insert_up_to(1);
  return result;
}

std::vector<TokenId> needle_question(const Tokenizer& tokenizer, const NeedleKey& key, bool chat,
                                     bool again) {
  const std::string question = join("What is the pass key", of(key.owner), "?");
  const std::string answer = join("The pass key", of(key.owner), " is");
  if (!chat) return go_on(tokenizer, join("\n\n", question, " ", answer));
  const ChatFormat format = recognise_chat_format(tokenizer);
  Tokens ids;
  if (again) {
    ids = turn_change(tokenizer, format, {{"user", question}});
  } else {
    ids = go_on(tokenizer, "\n\n" + question);
    const Tokens change = turn_change(tokenizer, format, {});
    ids.insert(ids.end(), change.begin(), change.end());
  }
  const Tokens begun = go_on(tokenizer, answer);
  ids.insert(ids.end(), begun.begin(), begun.end());
  return ids;
}

std::string first_number(const std::string& text) {
  const auto is_digit = [](char c) { return c >= '0' && c <= '9'; };
  const auto begin = std::find_if(text.begin(), text.end(), is_digit);
  return std::string(begin, std::find_if_not(begin, text.end(), is_digit));
}

int digits_right(const std::string& found, const std::string& key) {
  int right = 0;
  for (std::size_t i = 0; i < std::min(found.size(), key.size()); ++i) right += found[i] == key[i];
  return right;
}

}  // namespace thaw
