// thaw inspect: what a model is made of, and what fits in this machine.
#include <algorithm>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "cli/commands.h"
#include "cli/format.h"
#include "cli/options.h"
#include "cli/terminal.h"
#include "cli/tokenizer_source.h"
#include "model/check.h"
#include "model/forward.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

using Json = nlohmann::ordered_json;

struct Options {
  CommonOptions common;
  bool tensors = false;
  bool check = false;
};

bool parse(const Args& args, Options& o) {
  Flags flags(
      "inspect", "-m MODEL [flags]",
      "Prints a model's configuration, formats and sizes, its KV bytes a token, the context that "
      "fits in the memory now available, and what its tokenizer knows.");
  flags.section("Options");
  add_model_flag(flags, o.common, "a .gguf file or a Hugging Face directory");
  flags.toggle(o.tensors, "--tensors", "list every matrix: name, format, rows x columns, bytes");
  flags.toggle(o.check, "--check",
               "look for NaN and infinity among the weights; exit code 1 if there are any");
  flags.toggle(o.common.json, "--json", "print one JSON document instead of text");
  flags.examples("  thaw inspect -m model.gguf\n  thaw inspect -m model.gguf --tensors --check\n");
  if (!flags.parse(args)) return false;
  check_common(o.common);
  return true;
}

std::vector<const Tensor*> matrices(const Model& model) {
  const Weights& w = model.weights;
  std::vector<const Tensor*> all = {&w.embedding};
  for (const LayerWeights& l : w.layers) {
    all.insert(all.end(), {&l.wq, &l.wk, &l.wv, &l.wo, &l.w_gate, &l.w_up, &l.w_down});
  }
  if (!model.config.tied_output) all.push_back(&w.output);
  return all;
}

// Bytes that new allocations may take without swapping: what the kernel estimates, within the limit
// of this control group. 0 when it does not say.
std::int64_t available_memory() {
  std::int64_t available = 0;
  std::ifstream meminfo("/proc/meminfo");
  for (std::string line; std::getline(meminfo, line);) {
    if (line.starts_with("MemAvailable:")) available = std::stoll(line.substr(13)) * 1024;
  }
  std::int64_t limit = 0, used = 0;
  if (std::ifstream("/sys/fs/cgroup/memory.max") >> limit &&
      std::ifstream("/sys/fs/cgroup/memory.current") >> used) {
    available = std::clamp<std::int64_t>(limit - used, 0, available);
  }
  return available;
}

std::int64_t kv_bytes_per_token(const Config& c, KvType type) {
  return kv_shape(c, 1, type).bytes_per_token();
}

struct Sizes {
  std::int64_t parameters = 0;
  std::int64_t bytes = 0;  // in memory, where norms are f32
  std::map<std::string_view, std::pair<int, std::int64_t>> formats;  // matrices and bytes of each
};

Sizes sizes_of(const Model& model) {
  Sizes sizes;
  sizes.parameters = (2 * std::int64_t{model.config.n_layers} + 1) * model.config.dim;  // norms
  sizes.bytes = sizes.parameters * static_cast<std::int64_t>(sizeof(float));
  for (const Tensor* tensor : matrices(model)) {
    sizes.parameters += tensor->rows * tensor->cols;
    sizes.bytes += tensor->bytes();
    auto& [count, bytes] = sizes.formats[dtype_info(tensor->type).name];
    ++count, bytes += tensor->bytes();
  }
  return sizes;
}

std::string chat_format_name(const Tokenizer& tokenizer) {
  constexpr const char* kNames[] = {"none", "llama3", "chatml", "llama2", "mistral", "zephyr"};
  return kNames[static_cast<int>(recognise_chat_format(tokenizer))];
}

int count_special(const Tokenizer& tokenizer) {
  int count = 0;
  for (TokenId id = 0; id < tokenizer.vocab_size(); ++id) count += tokenizer.is_special(id);
  return count;
}

Json token_facts(const Tokenizer& tokenizer, TokenId id) {
  return {{"id", id}, {"text", std::string(tokenizer.decode(id, true))}};
}

// What the model's tokenizer knows, or why it cannot be used: a model is worth inspecting without.
Json tokenizer_facts(const Model& model) {
  try {
    const Tokenizer tokenizer = load_tokenizer(model);
    Json eog = Json::array();
    for (TokenId id : tokenizer.spec().eog) eog.push_back(token_facts(tokenizer, id));
    const TokenId bos = tokenizer.bos();
    return {{"vocab_size", tokenizer.vocab_size()},
            {"special_tokens", count_special(tokenizer)},
            {"bos", bos < 0 ? Json() : token_facts(tokenizer, bos)},
            {"adds_bos", tokenizer.spec().add_bos},
            {"eog", eog},
            {"chat_format", chat_format_name(tokenizer)}};
  } catch (const Error& error) {
    return {{"error", error.what()}};
  }
}

Json facts(const Options& o, const Model& model) {
  const Config& c = model.config;
  const Sizes sizes = sizes_of(model);
  Json formats = Json::object();
  for (const auto& [name, count] : sizes.formats) {
    formats[std::string(name)] = {{"tensors", count.first}, {"bytes", count.second}};
  }
  const std::int64_t available = available_memory();
  const std::int64_t kv = kv_bytes_per_token(c, KvType::kF16);
  Json document = {
      {"path", model.path.string()},
      {"source", model.gguf ? "gguf" : "hugging face"},
      {"name", c.name},
      {"n_layers", c.n_layers},
      {"dim", c.dim},
      {"n_heads", c.n_heads},
      {"n_kv_heads", c.n_kv_heads},
      {"head_dim", c.head_dim},
      {"ffn_dim", c.ffn_dim},
      {"vocab_size", c.vocab_size},
      {"context_tokens", c.context_length},
      {"norm_eps", c.norm_eps},
      {"rope_theta", c.rope_theta},
      {"rope_scaled", !c.rope_factors.empty()},
      {"rope_pairing", c.rope_pairing == RopePairing::kInterleaved ? "interleaved" : "halves"},
      {"tied_output", c.tied_output},
      {"parameters", sizes.parameters},
      {"weight_bytes", sizes.bytes},
      {"formats", formats},
      {"kv_bytes_per_token",
       {{"f16", kv}, {"bf16", kv}, {"f32", kv_bytes_per_token(c, KvType::kF32)}}},
      {"available_memory_bytes", available},
      {"context_tokens_that_fit_f16", std::max<std::int64_t>(0, available - sizes.bytes) / kv},
      {"tokenizer", tokenizer_facts(model)}};
  if (o.tensors) {
    document["tensors"] = Json::array();
    for (const Tensor* t : matrices(model)) {
      document["tensors"].push_back({{"name", t->name},
                                     {"format", dtype_info(t->type).name},
                                     {"rows", t->rows},
                                     {"cols", t->cols},
                                     {"bytes", t->bytes()}});
    }
  }
  return document;
}

// Text from the file, on one line of a terminal.
std::string shown(const Json& text) { return printable(text.get<std::string>()); }
std::string shown_token(const Json& token) {
  return join(shown(token["text"]), " (", token["id"], ")");
}

std::string model_text(const Json& j) {
  std::string formats;
  for (const auto& [name, format] : j["formats"].items()) {
    formats += join(formats.empty() ? "" : ", ", name, " ", format_bytes(format["bytes"]), " in ",
                    count(format["tensors"], "tensor"));
  }
  const std::int64_t bytes = j["weight_bytes"], parameters = j["parameters"];
  return join(
      "model       ", shown(j["name"]), "\npath        ", one_line(j["path"].get<std::string>()),
      "\nlayers      ", j["n_layers"], " of width ", j["dim"], ", feed-forward ", j["ffn_dim"],
      "\nheads       ", j["n_heads"], " query, ", j["n_kv_heads"], " key/value, of ", j["head_dim"],
      "\nrope        theta ", j["rope_theta"].get<double>(), ", ", shown(j["rope_pairing"]),
      " pairs", j["rope_scaled"] ? ", scaled" : "", "\nnorm eps    ", j["norm_eps"].get<double>(),
      "\ncontext     ", j["context_tokens"], " tokens in training\nvocabulary  ", j["vocab_size"],
      j["tied_output"] ? ", output head tied to the embedding" : ", separate output head",
      "\nweights     ", fixed(static_cast<double>(parameters) / 1e6, 1), " million, ",
      format_bytes(bytes), ", ",
      fixed(8.0 * static_cast<double>(bytes) / static_cast<double>(parameters), 2),
      " bits each\nformats     ", formats, "\n");
}

std::string memory_text(const Json& j) {
  const std::int64_t kv = j["kv_bytes_per_token"]["f16"], context = j["context_tokens"];
  return join("kv          ", format_bytes(kv), " a token as f16 or bf16, ",
              format_bytes(j["kv_bytes_per_token"]["f32"]), " as f32; ", format_bytes(kv * context),
              " for the whole context\nmemory      ", format_bytes(j["available_memory_bytes"]),
              " available: weights and ", j["context_tokens_that_fit_f16"], " tokens of f16 fit\n");
}

std::string tokenizer_text(const Json& t) {
  if (t.contains("error")) {
    return join("tokenizer   unusable: ", one_line(t["error"].get<std::string>()), "\n");
  }
  std::string ends;
  for (const Json& token : t["eog"]) ends += (ends.empty() ? "" : ", ") + shown_token(token);
  return join("tokenizer   ", t["vocab_size"], " tokens, ", t["special_tokens"],
              " of them special\n            begins with ",
              t["bos"].is_null() ? "nothing" : shown_token(t["bos"]),
              t["bos"].is_null() || t["adds_bos"] ? "" : " only where asked",
              "\n            ends with ", ends.empty() ? "nothing" : ends, "\nchat        ",
              shown(t["chat_format"]), "\n");
}

std::string tensors_text(const Json& tensors) {
  std::string out = "\n";
  for (const Json& t : tensors) {
    std::string name = printable(t["name"].get<std::string>(), 80);
    name.resize(std::max<std::size_t>(name.size() + 2, 36), ' ');
    out += join(name, t["format"].get<std::string>(), "  ", t["rows"], " x ", t["cols"], "  ",
                format_bytes(t["bytes"]), "\n");
  }
  return out;
}

// Lines on standard output, or entries of `document`; the number of tensors at fault.
std::size_t check(const Model& model, Json& document, std::string& text) {
  const std::vector<NonFinite> found = find_non_finite(model);
  document["non_finite"] = Json::array();
  for (const NonFinite& f : found) {
    document["non_finite"].push_back(
        {{"tensor", f.tensor}, {"first", f.first}, {"count", f.count}});
    text += join("check       ", printable(f.tensor, 80), ": ", f.count,
                 " NaN or infinite, the first at element ", f.first, "\n");
  }
  if (found.empty()) text += "check       every weight is finite\n";
  return found.size();
}

}  // namespace

int run_inspect(const Args& args) {
  Options o;
  if (!parse(args, o)) return 0;
  const Model model = load_model(*o.common.model);
  Json document = facts(o, model);
  std::string text =
      model_text(document) + memory_text(document) + tokenizer_text(document["tokenizer"]);
  std::size_t faults = 0;
  if (o.check) faults = check(model, document, text);
  if (o.tensors) text += tensors_text(document["tensors"]);
  if (o.common.json) text = json_line(document);
  write_stdout(text);
  require(faults == 0, model.path.string(),
          ": weights: expected finite numbers, found NaN or infinity in ",
          count(static_cast<std::int64_t>(faults), "tensor"));
  return 0;
}

}  // namespace thaw
