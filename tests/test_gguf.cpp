
#include <doctest/doctest.h>

#include <cstring>

#include "model/config_reader.h"
#include "tests/error_of.h"
#include "tests/limited_memory.h"
#include "tests/tiny_files.h"

using namespace thaw;
using namespace thaw::testing;

namespace {

// A file with three tensors and a few keys, without a tokenizer: short, so that sweeps are quick.
GgufWriter small() {
  GgufWriter w;
  w.set("general.architecture", "llama");
  w.set("a.number", std::uint32_t{7});
  w.set("a.real", 2.5f);
  w.set("a.flag", true);
  w.set("a.text", "snow");
  w.set("a.list", std::vector<std::int32_t>{1, -2, 3});
  w.set("a.reals", std::vector<float>{0.5f, -1.5f});
  w.set("a.words", std::vector<std::string>{"ice", "", "melt"});
  w.tensors.push_back({"norm", {32}, 0, std::string(128, '\1')});
  w.tensors.push_back({"matrix", {32, 3}, 2, std::string(54, '\2')});
  w.tensors.push_back({"last", {4, 2}, 1, std::string(16, '\3')});
  return w;
}

std::string error_in(const std::string& bytes) {
  const auto held = exact(bytes);
  return error_of([&] { Gguf(held, "model.gguf"); });
}

std::string error_in(const GgufWriter& writer) { return error_in(writer.bytes()); }

// What an array says that claims `n` elements of `type` and holds none.
std::string error_of_array(std::uint32_t type, std::uint64_t n) {
  GgufWriter w = small();
  w.tensors.clear();
  w.set_raw("liar", GgufWriter::kArray, GgufWriter::array_start(type, n));
  return error_in(w);
}

}  // namespace

TEST_CASE("gguf: versions 2 and 3 give keys and tensors as they stand in the file") {
  for (const std::uint32_t version : {2u, 3u}) {
    GgufWriter w = small();
    w.version = version;
    const auto held = exact(w.bytes());
    const Gguf gguf(held, "model.gguf");
    CHECK(gguf.version() == static_cast<int>(version));
    CHECK(gguf.integer("a.number") == 7);
    CHECK(gguf.integer("absent", 9) == 9);
    CHECK(gguf.real("a.real") == 2.5);
    CHECK(gguf.boolean("a.flag", false));
    CHECK(gguf.string("a.text") == "snow");
    CHECK(gguf.integers("a.list") == std::vector<std::int64_t>{1, -2, 3});
    CHECK(gguf.strings("a.words") == std::vector<std::string_view>{"ice", "", "melt"});
    REQUIRE(gguf.tensors().size() == 3);
    const Tensor* matrix = gguf.find_tensor("matrix");
    REQUIRE(matrix);
    CHECK(matrix->type == DType::kQ4_0);
    CHECK(matrix->rows == 3);
    CHECK(matrix->cols == 32);
    CHECK(matrix->data[0] == std::byte{2});
    CHECK(matrix->data[53] == std::byte{2});
    CHECK(gguf.find_tensor("norm")->rows == 1);
    CHECK(gguf.find_tensor("last")->data[15] == std::byte{3});
    CHECK(gguf.find_tensor("absent") == nullptr);
  }
}

TEST_CASE("gguf: integers of every width are read, with their sign") {
  GgufWriter w;
  const auto set = [&](const char* key, std::uint32_t type, auto value) {
    std::string payload;
    put(payload, value);
    w.set_raw(key, type, payload);
  };
  set("u8", GgufWriter::kU8, std::uint8_t{200});
  set("i8", GgufWriter::kI8, std::int8_t{-100});
  set("u16", GgufWriter::kU16, std::uint16_t{60000});
  set("i16", GgufWriter::kI16, std::int16_t{-30000});
  set("i32", GgufWriter::kI32, std::int32_t{-2000000000});
  set("u64", GgufWriter::kU64, std::uint64_t{1} << 40);
  set("i64", GgufWriter::kI64, -(std::int64_t{1} << 40));
  set("f64", GgufWriter::kF64, 0.1);
  set("big", GgufWriter::kU64, ~std::uint64_t{0});
  const auto held = exact(w.bytes());
  const Gguf gguf(held, "model.gguf");
  CHECK(gguf.integer("u8") == 200);
  CHECK(gguf.integer("i8") == -100);
  CHECK(gguf.integer("u16") == 60000);
  CHECK(gguf.integer("i16") == -30000);
  CHECK(gguf.integer("i32") == -2000000000);
  CHECK(gguf.integer("u64") == std::int64_t{1} << 40);
  CHECK(gguf.integer("i64") == -(std::int64_t{1} << 40));
  CHECK(gguf.real("f64") == 0.1);
  CHECK(error_of([&] { gguf.integer("big"); }) ==
        "model.gguf: big: expected at most 9223372036854775807, found 18446744073709551615");
}

TEST_CASE("gguf: a key that is missing or of another type is named with both types") {
  const auto held = exact(small().bytes());
  const Gguf gguf(held, "model.gguf");
  CHECK(error_of([&] { gguf.integer("absent"); }) ==
        "model.gguf: absent: expected the key, found none");
  CHECK(error_of([&] { gguf.integer("a.text"); }) ==
        "model.gguf: a.text: expected an integer, found a string");
  CHECK(error_of([&] { gguf.real("a.number"); }) ==
        "model.gguf: a.number: expected a real number, found an integer");
  CHECK(error_of([&] { gguf.strings("a.list"); }) ==
        "model.gguf: a.list: expected an array of strings, found an array of integers");
  CHECK(error_of([&] { gguf.integers("a.words"); }) ==
        "model.gguf: a.words: expected an array of integers, found an array of strings");
  CHECK(error_of([&] { gguf.boolean("a.real", false); }) ==
        "model.gguf: a.real: expected a bool, found a real number");
  CHECK(error_of([&] { gguf.string("a.flag", "x"); }) ==
        "model.gguf: a.flag: expected a string, found a bool");
}

TEST_CASE("gguf: files that are something else are called by name") {
  CHECK(error_in("") == "model.gguf: expected a GGUF model, found an empty file");
  CHECK(error_in("<!DOCTYPE html><html>404</html>") ==
        "model.gguf: expected a GGUF model, found an HTML page (a download that failed?)");
  CHECK(error_in("\n  <html lang=\"en\">").find("found an HTML page") != std::string::npos);
  CHECK(
      error_in("version https://git-lfs.github.com/spec/v1\noid sha256:1\n") ==
      "model.gguf: expected a GGUF model, found a git-lfs pointer (git lfs pull fetches the file)");
  CHECK(error_in("PK\3\4 zip") == "model.gguf: magic: expected \"GGUF\", found \"PK\\x03\\x04\"");
  CHECK(error_in("GG") == "model.gguf: magic: expected \"GGUF\", found \"GG\"");
}

TEST_CASE("gguf: only versions 2 and 3 of little-endian files are read") {
  GgufWriter w = small();
  for (const std::uint32_t version : {0u, 1u, 4u, 0xffffffffu}) {
    w.version = version;
    CHECK(error_in(w) == join("model.gguf: version: expected 2 or 3, found ", version));
  }
  w.version = 0x03000000;
  CHECK(error_in(w) ==
        "model.gguf: byte order: expected a little-endian GGUF file, found a big-endian one");
}

TEST_CASE("gguf: every truncation is an error of one line") {
  const std::string whole = small().bytes();
  CHECK(error_in(whole) == "");
  for (std::size_t n = 0; n < whole.size(); ++n) {
    CAPTURE(n);
    CHECK(error_in(whole.substr(0, n)) != "");
  }
}

TEST_CASE("gguf: truncation says which field misses how many bytes") {
  const std::string whole = small().bytes();
  CHECK(
      error_in(whole.substr(0, 10)) ==
      "model.gguf: tensor count: expected 8 bytes at offset 8, found 2 before the end of the file");
  const std::string last = error_in(whole.substr(0, whole.size() - 1));
  CHECK(
      last ==
      "model.gguf: tensor last: data: expected 16 bytes at offset 192 of the data, found only 207 "
      "bytes of data in the file");
}

TEST_CASE("gguf: counts and lengths that lie allocate nothing") {
  const std::uint64_t lies[] = {1 << 20, std::uint64_t{1} << 32, std::uint64_t{1} << 60,
                                std::uint64_t{1} << 63, ~std::uint64_t{0}};
  for (const std::uint64_t lie : lies) {
    CAPTURE(lie);
    CHECK(holds_in_64mb([&] {
      GgufWriter tensors = small(), entries = small(), key = small();
      tensors.n_tensors = lie, entries.n_entries = lie;
      std::string bytes = small().bytes();
      std::memcpy(&bytes[24], &lie, 8);  // length of the first key
      return error_in(tensors).find("tensor count: expected at most 65536") != std::string::npos &&
             error_in(entries).find("metadata count: expected at most 65536") !=
                 std::string::npos &&
             error_in(bytes).find("metadata key: expected ") != std::string::npos &&
             error_of_array(GgufWriter::kU8, lie)
                     .find("liar: array length: expected at most the ") != std::string::npos &&
             error_of_array(GgufWriter::kString, lie).find("liar: array length") !=
                 std::string::npos &&
             error_of_array(GgufWriter::kArray, lie).find("liar: array length") !=
                 std::string::npos;
    }));
  }
  GgufWriter w = small();
  w.n_entries = 9;
  CHECK(error_in(w) != "");  // reads a tensor as a key
  w = small();
  w.n_tensors = 4;
  CHECK(error_in(w) != "");
  w.n_tensors = 2;
  CHECK(error_in(w) == "");  // the data of the third lies in the gap; nothing is wrong with that
}

TEST_CASE("gguf: names and texts have an end") {
  GgufWriter w = small();
  w.set(std::string(65535, 'k'), std::uint32_t{1});
  CHECK(error_in(w) == "");
  w.set(std::string(65536, 'k'), std::uint32_t{1});
  CHECK(error_in(w) ==
        "model.gguf: metadata key: expected a text of at most 65535 bytes, found 65536");
  w = small();
  w.set("liar", std::string((1 << 24) + 1, 'x'));
  CHECK(error_in(w) ==
        "model.gguf: liar: expected a text of at most 16777216 bytes, found 16777217");
}

TEST_CASE("gguf: arrays of arrays are skipped, to a depth") {
  const auto nested = [](int depth) {
    std::string payload;
    for (int i = 1; i < depth; ++i) payload += GgufWriter::array_start(GgufWriter::kArray, 1);
    payload += GgufWriter::array_start(GgufWriter::kU8, 2) + "ab";
    GgufWriter w = small();
    w.set_raw("nested", GgufWriter::kArray, payload);
    return error_in(w);
  };
  CHECK(nested(2) == "");
  CHECK(nested(4) == "");
  CHECK(nested(5) == "model.gguf: nested: expected arrays nested at most 4 deep, found more");
  CHECK(nested(100000).find("nested: expected arrays nested at most 4 deep") != std::string::npos);
}

TEST_CASE("gguf: a value that its type does not have is an error") {
  GgufWriter w = small();
  w.set_raw("odd", 13, "");
  CHECK(error_in(w) == "model.gguf: odd: value type: expected 0 to 12, found 13");
  w.set_raw("odd", GgufWriter::kBool, "\2");
  CHECK(error_in(w) == "model.gguf: odd: expected a bool of 0 or 1, found 2");
  w = small();
  w.set("", std::uint32_t{1});
  CHECK(error_in(w) == "model.gguf: metadata key: expected a text, found an empty one");
}

TEST_CASE("gguf: a key or a tensor that stands twice is an error") {
  GgufWriter w = small();
  w.entries.push_back(w.entries[1]);
  CHECK(error_in(w) == "model.gguf: a.number: expected the key once, found it twice");
  w = small();
  w.tensors.push_back(w.tensors[0]);
  CHECK(error_in(w) == "model.gguf: tensor norm: expected the name once, found it twice");
}

TEST_CASE("gguf: names from the file are shortened and escaped in messages") {
  GgufWriter w = small();
  w.tensors[0].name = "\x1b[2J\n" + std::string(100, 'x');
  w.tensors[0].type = 10;
  CHECK(error_in(w) == "model.gguf: tensor \\x1b[2J\\x0a" + std::string(55, 'x') +
                           "...: type: expected one of " + dtype_names() + ", found Q2_K");
}

TEST_CASE("gguf: tensor types that are not read are named") {
  CHECK(dtype_names() == "F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K, Q6_K");
  const auto found = [](std::uint32_t type) {
    GgufWriter w = small();
    w.tensor("matrix").type = type;
    return error_in(w);
  };
  const std::string start =
      "model.gguf: tensor matrix: type: expected one of " + dtype_names() + ", found ";
  CHECK(found(10) == start + "Q2_K");
  CHECK(found(15) == start + "Q8_K");
  CHECK(found(26) == start + "I32");
  CHECK(found(39) == start + "MXFP4");
  CHECK(found(4) == start + "number 4");
  CHECK(found(0xffffffff) == start + "number 4294967295");
}

TEST_CASE("gguf: shapes that no matrix has are errors") {
  const auto found = [](std::vector<std::uint64_t> dims) {
    GgufWriter w = small();
    w.tensor("matrix").dims = std::move(dims);
    return error_in(w);
  };
  const std::string start = "model.gguf: tensor matrix: ";
  const std::uint64_t huge = std::uint64_t{1} << 62;
  CHECK(found({32, 3, 1, 1}) == "");
  CHECK(found({}) == start + "dimensions: expected 1 to 4, found 0");
  CHECK(found({32, 3, 1, 1, 1}) == start + "dimensions: expected 1 to 4, found 5");
  CHECK(found({32, 3, 2}) ==
        start + "shape: expected a vector or a matrix, found size 2 in dimension 3");
  CHECK(found({0, 3}) == start + "shape: expected sizes of 1 to 9223372036854775807, found 0");
  CHECK(found({32, 0}) == start + "shape: expected sizes of 1 to 9223372036854775807, found 0");
  CHECK(found({~std::uint64_t{0} - 31, 1}).find("shape: expected sizes of 1 to") !=
        std::string::npos);  // -32
  CHECK(found({33, 3}) == start + "shape: expected a multiple of 32 columns in Q4_0, found 33");
  for (const auto& dims : {std::vector{huge, huge},
                           {huge, std::uint64_t{2}},
                           {huge * 2 - 32, std::uint64_t{1}},
                           {std::uint64_t{32}, huge},
                           {std::uint64_t{1} << 32, std::uint64_t{1} << 32}}) {
    CHECK(found(dims).find("matrix: shape: expected what fits the file of ") != std::string::npos);
  }
}

TEST_CASE("gguf: offsets must be aligned, inside the file, and must not overlap") {
  const auto found = [](std::uint64_t offset) {
    GgufWriter w = small();
    w.tensor("matrix").offset = offset;
    return error_in(w);
  };
  CHECK(found(128) == "");  // where it is
  CHECK(found(129) == "model.gguf: tensor matrix: offset: expected a multiple of 32, found 129");
  CHECK(found(96) ==
        "model.gguf: tensor matrix: offset: expected at least 128, the end of norm, found 96");
  GgufWriter w = small();
  w.tensor("last").offset = 160;
  CHECK(error_in(w) ==
        "model.gguf: tensor last: offset: expected at least 182, the end of matrix, found 160");
  for (const std::uint64_t far :
       {std::uint64_t{4096}, std::uint64_t{1} << 63, ~std::uint64_t{31}}) {
    CHECK(found(far) == join("model.gguf: tensor matrix: data: expected 54 bytes at offset ", far,
                             " of the data, found only 208 bytes of data in the file"));
  }
}

TEST_CASE("gguf: general.alignment is honoured and must be a power of two") {
  GgufWriter w = small();
  w.alignment = 1024;
  w.set("general.alignment", std::uint32_t{1024});
  const auto held = exact(w.bytes());
  const Gguf gguf(held, "model.gguf");
  CHECK(gguf.find_tensor("matrix")->data == held.data() + 2048);
  CHECK(gguf.find_tensor("matrix")->data[0] == std::byte{2});
  for (const std::uint32_t bad : {0u, 1u, 24u, 0x80000000u}) {
    w.set("general.alignment", bad);
    CHECK(error_in(w) == join("model.gguf: general.alignment: expected a power of two from 8 to "
                              "1048576, found ",
                              bad));
  }
  w.set("general.alignment", "32");
  CHECK(error_in(w) == "model.gguf: general.alignment: expected an integer, found a string");
}

TEST_CASE("gguf: any change of a byte of the header loads or is an Error") {
  TinyModel tiny = make_tiny_model({.type = DType::kQ4_0,
                                    .dim = 32,
                                    .n_layers = 1,
                                    .n_heads = 2,
                                    .n_kv_heads = 1,
                                    .ffn_dim = 32,
                                    .vocab_size = 259,
                                    .tied = true});
  GgufWriter w = tiny_gguf(tiny);
  for (const char* key : {"tokens", "token_type", "merges"}) w.erase(join("tokenizer.ggml.", key));
  const std::size_t header = w.header().size();
  auto bytes = exact(w.bytes());
  int loaded = 0, refused = 0;
  const auto attempt = [&] {
    try {
      const Gguf gguf(bytes, "model.gguf");
      read_gguf_config(gguf);
      for (const Tensor& t : gguf.tensors()) {
        CHECK(t.data >= bytes.data());
        CHECK(t.data + t.bytes() <= bytes.data() + bytes.size());
      }
      ++loaded;
    } catch (const Error&) {
      ++refused;
    }
  };
  for (std::size_t at = 0; at < header; ++at) {
    const std::byte original = bytes[at];
    for (int bit = 0; bit < 8; ++bit) {
      bytes[at] = original ^ std::byte(1 << bit);
      attempt();
    }
    for (const int value : {0, 127, 255}) {
      bytes[at] = std::byte(value);
      attempt();
    }
    bytes[at] = original;
  }
  CHECK(refused > loaded / 4);
  CHECK(loaded > 0);
}
