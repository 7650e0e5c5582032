// thaw logits: what the model computes over known tokens, as .npy files.
#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/input.h"
#include "cli/npy.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "model/generate.h"

namespace thaw {
namespace {

struct Options {
  CommonOptions common;
  InputOptions input;
  std::optional<std::string> tokens;
  bool special = false;
  std::optional<std::string> output;
  std::optional<int> prefill;
  int batch = 128;
  std::optional<std::string> dump;
  std::optional<int> layer;
  std::vector<std::string> names;  // `dump`, split
};

// The names that a forward pass reports, in its order.
const std::vector<std::string> kNames = {
    "embed",      "attn_norm",     "q",        "k",          "v",
    "attn_out",   "attn_residual", "ffn_norm", "ffn_hidden", "ffn_residual",
    "final_norm", "logits"};

std::string list_of_names() {
  std::string list;
  for (const std::string& name : kNames) list += (list.empty() ? "" : ", ") + name;
  return list;
}

std::vector<std::string> split_names(const std::string& list) {
  std::vector<std::string> names;
  std::istringstream in(list + ",");
  for (std::string name; std::getline(in, name, ',');) {
    if (std::find(kNames.begin(), kNames.end(), name) == kNames.end()) {
      throw UsageError(join("--dump: expected names among ", list_of_names(), ", found \"",
                            printable(name), "\""));
    }
    if (std::find(names.begin(), names.end(), name) == names.end()) names.push_back(name);
  }
  return names;
}

bool parse(const Args& args, Options& o) {
  Flags flags(
      "logits", "-m MODEL [-p TEXT | -f FILE | - | --tokens FILE] -o OUT [flags]",
      "Runs known tokens through the model (teacher forcing) and writes the logits of every "
      "position to OUT, a .npy file of tokens x vocabulary f32; or, with --dump, named "
      "intermediates to OUT, a directory. A file appears only when it is complete.");
  flags.section("Model and tokens");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  add_input_flags(flags, o.input, "the text");
  flags.path(o.tokens, "--tokens", "FILE",
             "token ids instead of a text, as 'thaw tokenize' prints them");
  flags.toggle(o.special, "--special",
               "read control tokens such as <|im_start|> in the text as such");
  flags.section("What is written");
  flags.output(o.output, "-o, --output", "OUT",
               "the .npy file; with --dump the directory, made if missing");
  flags.text(o.dump, "--dump", "NAMES",
             "intermediates to write, with commas between: " + list_of_names() +
                 ". Files are NAME.npy, in layer L NAME.L.npy");
  flags.integer(o.layer, "--layer", "with --dump: only this layer, counted from 0", 0, 1 << 20);
  flags.section("How it is computed");
  flags.integer(o.prefill, "--prefill",
                "run the first N tokens in batches and the rest one at a time, as "
                "generation does; by default all in batches",
                0, 1 << 24);
  flags.integer(o.batch, "--batch", "tokens in a batch", 1, 4096);
  add_kv_flags(flags, o.common, "most tokens; by default the model's context");
  add_run_flags(flags, o.common);
  add_output_flags(flags, o.common);
  flags.examples(
      "  thaw logits -m model.gguf -f page.txt -o page.npy\n"
      "  thaw logits -m model.gguf -p \"Once upon a time\" --dump q,attn_out --layer 3 -o out/\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  check_kv({o.common.kv});
  if (!o.output)
    throw UsageError("expected where to write: -o FILE.npy, or -o DIRECTORY with --dump");
  if (o.layer && !o.dump) throw UsageError("--layer needs --dump");
  if (o.tokens && (o.input.text || o.input.file || o.input.dash)) {
    throw UsageError("expected one of -p, -f, - and --tokens, found several");
  }
  if (o.dump) o.names = split_names(*o.dump);
  const auto in_layers = [](const std::string& name) {
    return name != "embed" && name != "final_norm" && name != "logits";
  };
  if (o.layer && std::none_of(o.names.begin(), o.names.end(), in_layers))
    throw UsageError(join("--layer: expected a name that each layer has, found ", *o.dump));
  return true;
}

std::vector<TokenId> read_tokens(const Options& o, const Model& model, int capacity) {
  std::vector<TokenId> ids;
  std::string source;
  if (o.tokens) {
    const Input input = read_file(*o.tokens);
    source = input.source;
    ids = parse_token_ids(input, model.config.vocab_size);
  } else {
    const Input input = read_input(o.input, "a text");
    source = input.source;
    const Tokenizer tokenizer = load_tokenizer(model);
    require_room(tokenizer, input, capacity);
    ids = encode_input(tokenizer, input, {.add_special = true, .parse_special = o.special});
  }
  require(!ids.empty(), source, ": expected at least 1 token, found 0");
  require(ids.size() <= static_cast<std::size_t>(capacity), source, ": expected at most ", capacity,
          " tokens (the context), found ", ids.size());
  return ids;
}

// The files of one run: each named intermediate of each layer grows by the rows of every call.
class Dump {
 public:
  Dump(const Options& o, std::int64_t n_tokens)
      : directory_(*o.output), names_(o.names), layer_(o.layer), n_tokens_(n_tokens) {
    std::error_code error;
    std::filesystem::create_directories(directory_, error);
    if (error) fail(directory_.string(), ": cannot make this directory: ", error.message());
  }

  void add(const ActivationView& a) {
    if (std::find(names_.begin(), names_.end(), a.name) == names_.end()) return;
    if (layer_ && a.layer >= 0 && a.layer != *layer_) return;
    const std::string layer = a.layer < 0 ? "" : join(".", a.layer);
    const std::string file = (directory_ / join(a.name, layer, ".npy")).string();
    std::unique_ptr<NpyWriter>& writer = writers_[file];
    if (!writer) writer = std::make_unique<NpyWriter>(file, n_tokens_, a.cols);
    writer->append({a.data, static_cast<std::size_t>(a.rows * a.cols)});
  }

  std::vector<std::string> finish() {
    std::vector<std::string> files;
    for (auto& [file, writer] : writers_) writer->finish(), files.push_back(file);
    return files;
  }

 private:
  std::filesystem::path directory_;
  std::vector<std::string> names_;
  std::optional<int> layer_;
  std::int64_t n_tokens_;
  std::map<std::string, std::unique_ptr<NpyWriter>> writers_;
};

// Names of the files written, or nothing when interrupted.
std::vector<std::string> write_files(const Options& o, const Model& model,
                                     const std::vector<TokenId>& ids) {
  Transformer transformer(model, make_backend(o.common, model), o.batch);
  const auto kv =
      make_kv_store(transformer.backend(), o.common.kv, model.config, static_cast<int>(ids.size()));
  std::unique_ptr<Dump> dump;
  std::unique_ptr<NpyWriter> logits_file;
  const auto n_tokens = static_cast<std::int64_t>(ids.size());
  if (o.dump) {
    dump = std::make_unique<Dump>(o, n_tokens);
    transformer.observe([&](const ActivationView& view) { dump->add(view); });
  } else {
    logits_file = std::make_unique<NpyWriter>(*o.output, n_tokens, model.config.vocab_size);
  }
  const std::atomic<bool>& interrupted = catch_interrupt();
  Progress progress(o.common.quiet);
  const bool complete = teacher_force(transformer, *kv, ids, {.prefill = o.prefill.value_or(-1)},
                                      [&](int row, std::span<const float> logits) {
                                        if (logits_file) logits_file->append(logits);
                                        progress.show(join("token ", row + 1, " of ", n_tokens));
                                        return !interrupted;
                                      });
  if (!complete) return {};
  if (dump) return dump->finish();
  logits_file->finish();
  return {*o.output};
}

}  // namespace

int run_logits(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  const int n_layers = model.config.n_layers;
  if (o.layer.value_or(0) >= n_layers) {
    throw UsageError(
        join("--layer: expected 0 to ", n_layers - 1, " for this model, found ", *o.layer));
  }
  const std::vector<TokenId> ids = read_tokens(o, model, context_tokens(o.common, model.config));
  const std::vector<std::string> files = write_files(o, model, ids);
  if (files.empty()) {
    std::cerr << "interrupted: nothing is written\n";
    return kInterruptedExit;
  }
  if (o.common.json) {
    write_stdout(json_line({{"tokens", ids}, {"files", files}}));
  } else if (!o.common.quiet) {
    for (const std::string& file : files) std::cerr << "wrote " << file << "\n";
  }
  return 0;
}

}  // namespace thaw
