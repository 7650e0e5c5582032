// What each command prints and writes, against the library on the same tiny model.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/tokenizer_source.h"
#include "device/error.h"
#include "model/generate.h"
#include "tests/compare.h"
#include "tests/run_thaw.h"
#include "tests/tiny_cli.h"
#include "tests/weights.h"
#include "tokenizer/chat_template.h"

namespace thaw {
namespace {

using nlohmann::json;
using testing::read_file;
using testing::run_thaw;
using testing::RunOptions;
using testing::RunResult;
using testing::TinyCli;

std::string tiny() { return TinyCli::get().model(); }
std::string file(const std::string& name) { return TinyCli::get().path(name); }

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// thaw COMMAND -m tiny ARGS..., which must succeed.
RunResult run(const std::string& command, std::vector<std::string> args,
              const RunOptions& options = {}) {
  args.insert(args.begin(), {command, "-m", tiny()});
  const RunResult r = run_thaw(args, options);
  CAPTURE(r.err);
  CHECK(r.exit_code == 0);
  return r;
}

json run_json(const std::string& command, std::vector<std::string> args) {
  args.push_back("--json");
  return json::parse(run(command, std::move(args)).out);
}

// The library's answers.
struct Library {
  KvType type = KvType::kF16;
  Model model = load_model(tiny());
  Tokenizer tokenizer = load_tokenizer(model);
  Transformer transformer{model, 1};
  std::unique_ptr<KvStore> kv = make_kv_store(kv_shape(model.config, 512, type));

  std::vector<TokenId> greedy(const std::vector<TokenId>& prompt, int n) {
    SamplerOptions s;
    s.temperature = 0;
    Sampler sampler(s);
    GenerateOptions o;
    o.max_tokens = n;
    kv->clear();
    return generate(transformer, *kv, sampler, prompt, o).tokens;
  }
  std::vector<float> logits(const std::vector<TokenId>& tokens) {
    kv->clear();
    const auto all = transformer.forward(tokens, *kv, static_cast<int>(tokens.size()));
    return {all.begin(), all.end()};
  }
};

const std::vector<std::string> kGreedy = {"--temp", "0", "--ignore-eos", "-n", "24"};

std::vector<std::string> greedy(std::vector<std::string> args) {
  args.insert(args.end(), kGreedy.begin(), kGreedy.end());
  return args;
}

TEST_CASE("generate: standard output is exactly the text, statistics are on standard error") {
  Library library;
  const auto tokens = library.greedy(library.tokenizer.encode("Once"), 24);
  const RunResult r = run("generate", greedy({"-p", "Once"}));
  CHECK(r.out == library.tokenizer.decode(tokens));
  CHECK(r.out.size() > 10);
  for (const char* part :
       {"prompt   4 tokens in ", "output   24 tokens in ", " tok/s; -n reached\n",
        "first token after ",
        "kv       27 tokens, 6.8 KiB as f16, all exact: freezing begins at 1024 tokens\n",
        "seed     "}) {
    CHECK(contains(r.err, part));
  }
  const std::string freezing = run("generate", greedy({"-p", "Once", "--freeze-from", "0"})).err;
  CHECK(contains(freezing, "kv       27 tokens, 6.8 KiB as f16; thaw holds "));
  CHECK(contains(freezing, " recalls a layer and step\n"));
  CHECK(run("generate", greedy({"-p", "Once", "--quiet"})).err.empty());
  CHECK(run("generate", greedy({"-p", "Once", "--echo"})).out == "Once" + r.out);
  CHECK(contains(run("generate", greedy({"-p", "Once", "-v"})).err, "logits   fingerprint "));
}

TEST_CASE("generate: --json is one document with the same tokens") {
  Library library;
  const json j = run_json("generate", greedy({"-p", "Once"}));
  CHECK(j["tokens"] == library.greedy(library.tokenizer.encode("Once"), 24));
  CHECK(j["finish_reason"] == "length");
  CHECK(j["prompt_tokens"] == 4);
  CHECK(j["output_tokens"] == 24);
  CHECK(j["kv_bytes"] == 27 * library.kv->shape().bytes_per_token());
  CHECK(j["decode_tok_s"] > 0);
  CHECK(j["logits_fingerprint"].get<std::string>().size() == 16);
}

TEST_CASE("generate: the same from -p, a file, and standard input, where one newline is dropped") {
  const std::string expected = run("generate", greedy({"-p", "Once\n"})).out;
  testing::write_file(file("prompt.txt"), "Once\n\n");
  testing::write_file(file("crlf.txt"), "Once\n\r\n");
  CHECK(run("generate", greedy({"-f", file("prompt.txt")})).out == expected);
  CHECK(run("generate", greedy({"-f", file("crlf.txt")})).out == expected);
  CHECK(run("generate", greedy({}), {.input = "Once\n\n"}).out == expected);
  CHECK(run("generate", greedy({"-"}), {.input = "Once\n\n"}).out == expected);
  CHECK(run("generate", greedy({"-f", "-"}), {.input = "Once\n\n"}).out == expected);
  CHECK(run("generate", greedy({"-p", "Once"})).out != expected);
}

TEST_CASE("generate: a seed gives the same text again, on any number of threads") {
  const std::vector<std::string> args = {"-p", "Once", "-n", "30", "--temp", "2", "--ignore-eos"};
  const auto with = [&](std::vector<std::string> more) {
    more.insert(more.end(), args.begin(), args.end());
    return run_json("generate", more);
  };
  const json a = with({"--seed", "7"}), b = with({"--seed", "7", "-t", "1"}),
             c = with({"--seed", "8"});
  CHECK(a["seed"] == 7);
  CHECK(a["tokens"] == b["tokens"]);
  CHECK(a["logits_fingerprint"] == b["logits_fingerprint"]);
  CHECK(a["tokens"] != c["tokens"]);
  const json random = with({}),
             again = with({"--seed", std::to_string(random["seed"].get<std::uint64_t>())});
  CHECK(random["tokens"] == again["tokens"]);
  CHECK(with({})["seed"] != random["seed"]);
}

TEST_CASE("generate: a stop string ends the text before it, also across tokens") {
  const std::string text = run("generate", greedy({"-p", "Once"})).out;
  const std::string stop = text.substr(text.size() / 2, 3);
  const RunResult r =
      run("generate", greedy({"-p", "Once", "--stop", "not in it", "--stop", stop}));
  CHECK(r.out == text.substr(0, text.find(stop)));
  CHECK(contains(r.err, "; --stop text\n"));
}

TEST_CASE("generate: a full context ends the text and says so") {
  const RunResult r = run("generate", {"-p", "Once", "-c", "10", "-n", "-1", "--ignore-eos"});
  CHECK(contains(r.err, "output   7 tokens in "));
  CHECK(contains(r.err, "; the context is full\n"));
}

TEST_CASE("generate: an empty prompt starts from the begin-of-text token") {
  Library library;
  const json j = run_json("generate", greedy({"-p", ""}));
  CHECK(j["tokens"] == library.greedy({library.tokenizer.bos()}, 24));
}

TEST_CASE("generate: a prompt of any bytes is taken") {
  const json j = run_json("generate", greedy({"-p", "\xff\xc3 \x80"}));
  CHECK(j["prompt_tokens"] == 4);
}

TEST_CASE("generate: --chat wraps the message, with the system message that is given") {
  Library library;
  const ChatFormat format = recognise_chat_format(library.tokenizer);
  const auto expected = [&](const std::vector<ChatMessage>& messages) {
    return json(library.greedy(encode_chat(library.tokenizer, format, messages), 24));
  };
  CHECK(run_json("generate", greedy({"--chat", "-p", "Hi", "--system", "Be"}))["tokens"] ==
        expected({{"system", "Be"}, {"user", "Hi"}}));
  CHECK(run_json("generate", greedy({"--chat", "-p", "Hi", "--system", ""}))["tokens"] ==
        expected({{"user", "Hi"}}));
}

TEST_CASE("generate: control tokens in the prompt are text unless --special") {
  CHECK(run_json("generate", greedy({"-p", "<|im_end|>"}))["prompt_tokens"] == 10);
  CHECK(run_json("generate", greedy({"-p", "<|im_end|>", "--special"}))["prompt_tokens"] == 1);
}

TEST_CASE("tokenize: ids there and text back, byte for byte") {
  Library library;
  const std::string text = "Hello\n \xc3\xa9\xff\n";
  const std::string ids = run("tokenize", {}, {.input = text}).out;
  std::string expected;
  for (TokenId id : library.tokenizer.encode(text)) expected += std::to_string(id) + " ";
  expected.back() = '\n';
  CHECK(ids == expected);
  CHECK(run("tokenize", {"--decode"}, {.input = ids}).out == text);
  CHECK(run("tokenize", {"--decode", "-p", "[72,101]"}).out ==
        library.tokenizer.decode(std::vector<TokenId>{72, 101}));
  CHECK(run("tokenize", {"-p", ""}).out.empty());
}

TEST_CASE("tokenize: control tokens, begin-of-text, pieces and JSON") {
  Library library;
  const TokenId end = library.tokenizer.find("<|im_end|>"), begin = library.tokenizer.bos();
  const json j = run_json("tokenize", {"-p", "a<|im_end|>", "--special", "--bos"});
  CHECK(j["tokens"] == json({begin, library.tokenizer.find("a"), end}));
  CHECK(j["pieces"] == json({"<|im_start|>", "a", "<|im_end|>"}));
  CHECK(j["n_tokens"] == 3);
  CHECK(run_json("tokenize", {"-p", "a<|im_end|>"})["n_tokens"] == 11);
  CHECK(
      run("tokenize", {"-p", "a\n", "--pieces"}).out ==
      join(library.tokenizer.find("a"), "\t\"a\"\n", library.tokenizer.find("\n"), "\t\"\\n\"\n"));
  CHECK(run("tokenize", {"--decode", "-p", std::to_string(end)}).out.empty());
  CHECK(run("tokenize", {"--decode", "--special", "-p", std::to_string(end)}).out == "<|im_end|>");
}

struct Npy {
  std::string header;
  std::vector<float> values;
};

Npy read_npy(const std::string& path) {
  const std::string bytes = read_file(path);
  REQUIRE(bytes.size() >= 128);
  CHECK(bytes.substr(0, 8) == std::string("\x93NUMPY\x01\x00", 8));
  const std::size_t end =
      10 + static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
  CHECK(end % 64 == 0);
  CHECK(bytes[end - 1] == '\n');
  Npy npy{bytes.substr(10, end - 10), std::vector<float>((bytes.size() - end) / 4)};
  std::memcpy(npy.values.data(), bytes.data() + end, npy.values.size() * 4);
  return npy;
}

// In f32: where rounding decides which f16 a key becomes, it moves logits by far more than itself.
TEST_CASE("logits: a .npy of tokens x vocabulary with the model's logits") {
  Library library{KvType::kF32};
  const std::vector<float> expected = library.logits(library.tokenizer.encode("Xbqkz"));
  testing::write_file(file("ids.txt"), run("tokenize", {"-p", "Xbqkz"}).out);
  const std::vector<std::vector<std::string>> ways = {{"-p", "Xbqkz"},
                                                      {"--tokens", file("ids.txt")},
                                                      {"-p", "Xbqkz", "--batch", "2"},
                                                      {"-p", "Xbqkz", "--prefill", "2"}};
  for (std::vector<std::string> args : ways) {
    args.insert(args.end(), {"--kv-type", "f32", "-o", file("out.npy")});
    CHECK(run("logits", args).out.empty());
    const Npy npy = read_npy(file("out.npy"));
    CHECK(npy.header.starts_with("{'descr': '<f4', 'fortran_order': False, 'shape': (5, 288), }"));
    CHECK(testing::n_beyond(npy.values, expected, testing::kTinyLogitError) == 0);
  }
}

TEST_CASE("logits: a failure leaves no file, not even in part, and an old file as it was") {
  testing::TemporaryDirectory directory;
  const std::string out = (directory.path() / "x.npy").string();
  CHECK(run_thaw({"logits", "-m", tiny(), "-p", "Xbqkz", "-o", "/dev/null/x.npy"}).exit_code == 1);
  testing::write_file(out, "old");
  CHECK(run_thaw({"logits", "-m", tiny(), "-p", "Xbqkz", "-c", "3", "-o", out}).exit_code == 1);
  CHECK(read_file(out) == "old");
  CHECK(run_thaw({"logits", "-m", tiny(), "-p", "Xbqkz", "-o", directory.path().string()})
            .exit_code == 1);
  CHECK(std::distance(std::filesystem::directory_iterator(directory.path()), {}) == 1);
  CHECK_FALSE(std::filesystem::exists(directory.path().string() + ".partial"));
}

TEST_CASE("logits: what is no regular file is not replaced by one") {
  testing::TemporaryDirectory directory;
  const std::string fifo = (directory.path() / "pipe").string();
  REQUIRE(::mkfifo(fifo.c_str(), 0600) == 0);
  const RunResult r = run_thaw({"logits", "-m", tiny(), "-p", "Xbqkz", "-o", fifo});
  CHECK(r.exit_code == 1);
  CHECK(r.err ==
        "thaw: " + fifo + ": expected a regular file or none to write, found another kind\n");
  CHECK(std::filesystem::is_fifo(fifo));
  CHECK(std::distance(std::filesystem::directory_iterator(directory.path()), {}) == 1);
}

TEST_CASE("logits: --dump writes each intermediate over all tokens, one file a layer") {
  Library library{KvType::kF32};
  const std::string all = file("dump-all"), some = file("dump-some");
  run("logits", {"-p", "Xbqkz", "--dump",
                 "embed,attn_norm,q,k,v,attn_out,attn_residual,ffn_norm,ffn_hidden,ffn_residual,"
                 "final_norm,logits",
                 "-o", all, "--batch", "2", "--kv-type", "f32"});
  for (const std::string layer : {".0", ".1"}) {
    for (const std::string name :
         {"attn_norm", "q", "attn_out", "attn_residual", "ffn_norm", "ffn_residual"}) {
      CHECK(contains(read_npy(all + "/" + name + layer + ".npy").header, "(5, 64)"));
    }
    for (const std::string name : {"k", "v"})
      CHECK(contains(read_npy(all + "/" + name + layer + ".npy").header, "(5, 32)"));
    CHECK(contains(read_npy(all + "/ffn_hidden" + layer + ".npy").header, "(5, 96)"));
  }
  for (const std::string name : {"embed", "final_norm"})
    CHECK(contains(read_npy(all + "/" + name + ".npy").header, "(5, 64)"));
  const std::vector<float> expected = library.logits(library.tokenizer.encode("Xbqkz"));
  const std::vector<float> found = read_npy(all + "/logits.npy").values;
  CHECK(testing::n_beyond(found, expected, testing::kTinyLogitError) == 0);
  CHECK(std::distance(std::filesystem::directory_iterator(all), {}) == 2 * 9 + 3);

  const json j =
      run_json("logits", {"-p", "Xbqkz", "--dump", "q,embed,q", "--layer", "1", "-o", some});
  CHECK(j["files"] == json({some + "/embed.npy", some + "/q.1.npy"}));
  CHECK(std::distance(std::filesystem::directory_iterator(some), {}) == 2);
}

TEST_CASE("inspect: what the model is made of") {
  const json j = run_json("inspect", {"--tensors", "--check"});
  CHECK(j["n_layers"] == 2);
  CHECK(j["n_kv_heads"] == 2);
  CHECK(j["vocab_size"] == 288);
  CHECK(j["formats"]["F32"]["tensors"] == 16);
  const int layer = 64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3 + 2 * 64;  // with two norms
  CHECK(j["parameters"] == 288 * 64 * 2 + 2 * layer + 64);
  CHECK(j["weight_bytes"] == 4 * j["parameters"].get<int>());
  CHECK(j["kv_bytes_per_token"]["f16"] == 2 * 2 * 32 * 2);
  CHECK(j["context_tokens_that_fit_f16"] > 1000);
  CHECK(j["tokenizer"]["bos"]["text"] == "<|im_start|>");
  CHECK(j["tokenizer"]["chat_format"] == "chatml");
  CHECK(j["tensors"].size() == 16);
  CHECK(j["tensors"][1]["name"] == "blk.0.attn_q.weight");
  CHECK(j["non_finite"].empty());
  const std::string text = run("inspect", {"--check", "--tensors"}).out;
  CHECK(contains(text, "layers      2 of width 64"));
  CHECK(contains(text, "check       every weight is finite\n"));
  CHECK(contains(text, "blk.1.ffn_down.weight"));
}

TEST_CASE("inspect: a model whose tokenizer cannot be read is inspected all the same") {
  testing::GgufWriter w = testing::tiny_gguf(testing::make_tiny_model());
  w.set("tokenizer.ggml.pre", "strange");
  testing::write_file(file("strange.gguf"), w.bytes());
  const std::string reason = file("strange.gguf") +
                             ": tokenizer.ggml.pre: expected llama-bpe, smollm, qwen2 or gpt-2, "
                             "found \"strange\"";
  const RunResult text = run_thaw({"inspect", "-m", file("strange.gguf"), "--check"});
  CHECK(text.exit_code == 0);
  CHECK(contains(text.out, "\ntokenizer   unusable: " + reason + "\n"));
  CHECK(contains(text.out, "every weight is finite"));
  const json j = json::parse(run_thaw({"inspect", "-m", file("strange.gguf"), "--json"}).out);
  CHECK(j["n_layers"] == 2);
  CHECK(j["tokenizer"] == json{{"error", reason}});
}

TEST_CASE("inspect: --check names the tensor with a NaN and fails") {
  testing::TinyModel broken = testing::make_tiny_model();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::memcpy(broken.storage[1].data() + 4 * 70, &nan, 4);
  testing::write_file(file("nan.gguf"), testing::tiny_gguf(broken).bytes());
  const RunResult r = run_thaw({"inspect", "-m", file("nan.gguf"), "--check"});
  CHECK(r.exit_code == 1);
  CHECK(
      contains(r.out, "check       blk.0.attn_q.weight: 1 NaN or infinite, the first at element"));
  CHECK(contains(r.err, "expected finite numbers, found NaN or infinity in 1 tensor"));
  CHECK(run_thaw({"inspect", "-m", file("nan.gguf")}).exit_code == 0);
  const RunResult text = run_thaw({"generate", "-m", file("nan.gguf"), "-p", "Once", "-q"});
  CHECK(text.exit_code == 1);
  CHECK(contains(text.err,
                 "thaw: " + file("nan.gguf") + ": logits: expected finite numbers, found "));
  CHECK(contains(text.err, "; thaw inspect --check looks for NaN among the weights\n"));
}

TEST_CASE("cli: a Hugging Face directory gives the text that the GGUF file gives") {
  testing::save(file("hf"), testing::tiny_hf(testing::make_tiny_model()));
  std::vector<std::string> args = greedy({"generate", "-m", file("hf"), "-p", "Once", "-q"});
  CHECK(run_thaw(args).out == run("generate", greedy({"-p", "Once"})).out);
}

TEST_CASE("cli: SmolLM2 knows capitals, counts, and ends its answers") {
  const auto path = weights_file(kSmolLM2File);
  if (!path) return;
  const std::string m = path->string();
  const RunResult paris =
      run_thaw({"generate", "-m", m, "-p", "The capital of France is", "--temp", "0", "-n", "1"});
  CHECK(paris.out == " Paris");
  const RunResult count = run_thaw(
      {"generate", "-m", m, "-p", "1, 2, 3, 4, 5, 6,", "--temp", "0", "-n", "24", "--stop", " 9"});
  CHECK(count.out == " 7, 8,");
  const RunResult cut =
      run_thaw({"generate", "-m", m, "--chat", "-p", "Tell me a story.", "-n", "-1"},
               {.interrupt_after = 10});
  CHECK(cut.exit_code == 130);
  CHECK(contains(cut.err, "; interrupted\n"));
}

}  // namespace
}  // namespace thaw
