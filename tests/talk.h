// A conversation with the tiny model, for tests.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "cli/conversation.h"
#include "cli/tokenizer_source.h"
#include "tests/tiny_cli.h"

namespace thaw::testing {

// Greedy, with penalties that would tell if a token were seen twice. The system message is "Be".
struct Talk {
  Talk(KvType type, int capacity, int max_tokens)
      : kv(make_kv_store(kv_shape(model.config, capacity, type))) {
    options.max_tokens = max_tokens;
    talk.begin("Be");
  }

  static SamplerOptions sampler() {
    SamplerOptions s;
    s.temperature = 0;
    s.frequency_penalty = 0.05f;
    s.penalty_window = -1;
    return s;
  }

  std::vector<TokenId> say(const std::string& message) {
    talk.add({message, "test"});
    const Generation g = talk.answer(options, [&](std::string_view piece) { out += piece; });
    n_read = g.prompt_tokens;
    return g.tokens;
  }

  Model model = load_model(TinyCli::get().model());
  Tokenizer tokenizer = load_tokenizer(model);
  Transformer transformer{model, 1};
  std::unique_ptr<KvStore> kv;
  Conversation talk{tokenizer, transformer, *kv, sampler()};
  GenerateOptions options;
  std::string out;  // of all answers
  int n_read = 0;   // tokens, before the last one
};

}  // namespace thaw::testing
