// The commands of thaw, one file each.
#pragma once

#include <string>
#include <vector>

namespace thaw {

// args: what follows the command's name. Returns the exit code; 0 after printing --help.
using Args = std::vector<std::string>;
int run_generate(const Args& args);
int run_chat(const Args& args);
int run_tokenize(const Args& args);
int run_logits(const Args& args);
int run_perplexity(const Args& args);
int run_inspect(const Args& args);
int run_bench(const Args& args);
int run_needle(const Args& args);

constexpr int kInterruptedExit = 130;

struct Command {
  const char* name;
  const char* summary;
  int (*run)(const Args&);
};
inline constexpr Command kCommands[] = {
    {"generate", "continue a text, or answer one message with --chat", run_generate},
    {"chat", "talk with a model, message by message", run_chat},
    {"tokenize", "text to token ids and back", run_tokenize},
    {"perplexity", "how well a model predicts a text", run_perplexity},
    {"logits", "logits and intermediates of a text, as .npy files", run_logits},
    {"inspect", "what a model is made of, and what fits in this machine", run_inspect},
    {"needle", "whether a key hidden in a long text is found again", run_needle},
    {"bench", "how fast prompts are read and tokens written", run_bench},
};

}  // namespace thaw
