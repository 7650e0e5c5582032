// thaw tokenize: text to token ids and back.
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"

namespace thaw {
namespace {

struct Options {
  CommonOptions common;
  InputOptions input;
  bool decode = false;
  bool special = false;
  bool bos = false;
  bool pieces = false;
};

bool parse(const Args& args, Options& o) {
  Flags flags(
      "tokenize", "-m PATH [-p TEXT | -f FILE | -] [flags]",
      "Prints the token ids of a text, on one line; or, with --decode, exactly the bytes that "
      "token ids stand for. The text is taken as it is, a newline at its end included.");
  flags.section("Tokenizer and input");
  add_model_flag(flags, o.common,
                 "a model (.gguf file or Hugging Face directory), a tokenizer.json, a tiktoken "
                 "tokenizer.model, or a .gguf file with only a vocabulary");
  add_input_flags(flags, o.input, "the text or the ids");
  flags.toggle(o.decode, "--decode",
               "the input is token ids: print their text. Spaces, commas and "
               "brackets may separate ids");
  flags.toggle(o.special, "--special",
               "read control tokens such as <|im_start|> in the text as such; "
               "with --decode: print them");
  flags.toggle(o.bos, "--bos", "begin with the begin-of-text token");
  flags.section("Output");
  flags.toggle(o.pieces, "--pieces", "one token a line: id, tab, text in quotes");
  flags.toggle(o.common.json, "--json",
               "print one JSON document; bytes that are not UTF-8 appear there "
               "as U+FFFD");
  flags.examples(
      "  thaw tokenize -m model.gguf -p \"Hello, world\"\n"
      "  thaw tokenize -m tokenizer.json -f page.txt --json\n"
      "  thaw tokenize -m model.gguf --decode -p \"19556 28 905\"\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  if (o.decode && o.bos) throw UsageError("--bos has no meaning with --decode");
  return true;
}

std::vector<TokenId> encode(const Options& o, const Tokenizer& tokenizer, const Input& input) {
  std::vector<TokenId> ids = encode_input(tokenizer, input, {.parse_special = o.special});
  if (o.bos) {
    require(tokenizer.bos() >= 0, *o.common.model,
            ": begin-of-text token: expected one for --bos, found none");
    ids.insert(ids.begin(), tokenizer.bos());
  }
  return ids;
}

std::string to_json(const Tokenizer& tokenizer, const std::vector<TokenId>& ids,
                    const std::string& text) {
  nlohmann::ordered_json pieces = nlohmann::ordered_json::array();
  for (TokenId id : ids) pieces.push_back(std::string(tokenizer.decode(id, true)));
  return json_line({{"text", text}, {"n_tokens", ids.size()}, {"tokens", ids}, {"pieces", pieces}});
}

}  // namespace

int run_tokenize(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Tokenizer tokenizer = load_tokenizer(*o.common.model);
  const Input input = read_input(o.input, o.decode ? "token ids" : "a text");
  const std::vector<TokenId> ids =
      o.decode ? parse_token_ids(input, tokenizer.vocab_size()) : encode(o, tokenizer, input);
  const std::string text = o.decode ? tokenizer.decode(ids, o.special) : input.text;
  std::string out;
  if (o.common.json) {
    out = to_json(tokenizer, ids, text);
  } else if (o.pieces) {
    for (TokenId id : ids) out += join(id, '\t', json_line(tokenizer.decode(id, true)));
  } else if (o.decode) {
    out = text;
    if (stdout_is_terminal() && !out.ends_with('\n')) out += '\n';
  } else {
    for (TokenId id : ids) out += std::to_string(id) + ' ';
    if (!out.empty()) out.back() = '\n';
  }
  write_stdout(out);
  return 0;
}

}  // namespace thaw
