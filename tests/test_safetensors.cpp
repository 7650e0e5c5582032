#include <doctest/doctest.h>

#include "model/safetensors.h"
#include "tests/error_of.h"
#include "tests/limited_memory.h"
#include "tests/safetensors_writer.h"

using namespace thaw;
using namespace thaw::testing;

namespace {

SafetensorsWriter small() {
  SafetensorsWriter w;
  w.tensors.push_back({"matrix", "F16", {3, 4}, std::string(24, '\1')});
  w.tensors.push_back({"norm", "F32", {2}, std::string(8, '\2')});
  w.tensors.push_back({"half", "BF16", {2, 2}, std::string(8, '\3')});
  return w;
}

// Opens the file and asks for every tensor in it.
std::string error_in(const std::string& bytes) {
  const auto held = exact(bytes);
  return error_of([&] {
    const Safetensors file(held, "model.safetensors");
    for (const std::string& name : file.names()) file.tensor(name);
  });
}

std::string error_in(const SafetensorsWriter& writer) { return error_in(writer.bytes()); }

std::string error_in_header(const std::string& header) {
  SafetensorsWriter w = small();
  w.header = header;
  return error_in(w);
}

}  // namespace

TEST_CASE("safetensors: tensors are views of what stands in the file") {
  const auto held = exact(small().bytes());
  const Safetensors file(held, "model.safetensors");
  CHECK(file.names() == std::vector<std::string>{"half", "matrix", "norm"});
  CHECK_FALSE(file.has("__metadata__"));
  const Tensor matrix = file.tensor("matrix");
  CHECK(matrix.name == "matrix");
  CHECK(matrix.type == DType::kF16);
  CHECK(matrix.rows == 3);
  CHECK(matrix.cols == 4);
  CHECK(matrix.data[23] == std::byte{1});
  CHECK(matrix.data + 24 == file.tensor("norm").data);
  CHECK(file.tensor("norm").rows == 1);
  CHECK(file.tensor("norm").cols == 2);
  CHECK(file.tensor("half").type == DType::kBF16);
  CHECK(file.tensor("half").data + 8 == held.data() + held.size());
}

TEST_CASE("safetensors: files that are something else are called by name") {
  CHECK(error_in("") == "model.safetensors: expected safetensors, found an empty file");
  CHECK(error_in("<!doctype html>") ==
        "model.safetensors: expected safetensors, found an HTML page (a download that failed?)");
  CHECK(error_in("version https://git-lfs.github.com/spec/v1\n").find("found a git-lfs pointer") !=
        std::string::npos);
  CHECK(error_in("GGUF\3") == "model.safetensors: header length: expected 8 bytes, found 5");
}

TEST_CASE("safetensors: every truncation is an error of one line") {
  const std::string whole = small().bytes();
  CHECK(error_in(whole) == "");
  for (std::size_t n = 0; n < whole.size(); ++n) {
    CAPTURE(n);
    CHECK(error_in(whole.substr(0, n)) != "");
  }
}

TEST_CASE("safetensors: a header length that lies allocates nothing") {
  for (const std::uint64_t lie :
       {std::uint64_t{1} << 30, std::uint64_t{1} << 63, ~std::uint64_t{0}}) {
    SafetensorsWriter w = small();
    w.header_length = lie;
    CHECK(holds_in_64mb([&] {
      return error_in(w) == join("model.safetensors: header length: expected at most the ",
                                 w.bytes().size() - 8, " bytes that follow, found ", lie);
    }));
  }
  SafetensorsWriter w = small();
  w.header_length = 0;
  CHECK(error_in(w) == "model.safetensors: header: expected JSON, found its end after byte 0");
  w.header_length.reset();
  w.header = std::string((16 << 20) + 8, ' ');
  CHECK(error_in(w) ==
        "model.safetensors: header: size: expected at most 16777216 bytes of JSON, found 16777224");
}

TEST_CASE("safetensors: a header that is broken, deep or not what it should be is one line") {
  CHECK(error_in_header("{\"a\":").find(
            "model.safetensors: header: expected JSON, found its end") == 0);
  CHECK(error_in_header("[]") == "model.safetensors: header: expected a JSON object, found array");
  std::string deep;
  while (deep.size() < 1000000) deep += "{\"a\":";
  CHECK(error_in_header(deep) ==
        "model.safetensors: header: JSON nesting: expected at most 64 levels, found more");
  CHECK(error_in_header("{\"a\":3}") ==
        "model.safetensors: tensor a: expected a JSON object, found number");
  CHECK(error_in_header("{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}") ==
        "model.safetensors: tensor a: dtype: expected a string, found none");
  CHECK(error_in_header("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,8]}}") ==
        "model.safetensors: tensor a: shape: expected a list of whole numbers, found none");
  CHECK(error_in_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}") ==
        "model.safetensors: tensor a: data_offsets: expected a list of whole numbers, found none");
  CHECK(error_in_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}") ==
        "model.safetensors: tensor a: data_offsets: expected begin <= end <= 40, found 1 numbers");
  CHECK(error_in_header("{\"a\":{\"dtype\":\"F32\",\"shape\":[2.5],\"data_offsets\":[0,8]}}") ==
        "model.safetensors: tensor a: shape: expected whole numbers, found 2.5");
}

TEST_CASE("safetensors: a tensor that stands twice is an error") {
  SafetensorsWriter w = small();
  w.tensors[1].name = "matrix";
  CHECK(error_in(w) == "model.safetensors: header: matrix: expected the key once, found it twice");
}

TEST_CASE(
    "safetensors: shapes that are zero, negative, overflow or do not fit the bytes are errors") {
  const auto found = [](std::vector<std::int64_t> shape) {
    SafetensorsWriter w = small();
    w.tensors[0].shape = std::move(shape);
    return error_in(w);
  };
  const std::string start = "model.safetensors: tensor matrix: ";
  CHECK(found({0, 4}) == start + "shape: expected sizes of 1 or more, found 0 x 4");
  CHECK(found({-3, 4}) == start + "shape: expected whole numbers, found -3");
  CHECK(found({std::int64_t{1} << 62, 4}) ==
        start + "shape: expected what fits the file, found 4611686018427387904 x 4");
  CHECK(found({3, 5}) == start + "data_offsets: expected 30 bytes for 3 x 5 in F16, found 24");
  CHECK(found({3, 2, 2}) == start + "shape: expected a vector or a matrix, found 3 x 2 x 2");
  CHECK(found({}) == start + "shape: expected a vector or a matrix, found a scalar");
}

TEST_CASE("safetensors: offsets must be ordered, inside the file, aligned, and must not overlap") {
  const auto found = [](std::int64_t begin, std::int64_t end) {
    SafetensorsWriter w = small();
    w.tensors[1].offsets = {begin, end};
    return error_in(w);
  };
  const std::string start = "model.safetensors: tensor norm: data_offsets: expected ";
  CHECK(found(24, 32) == "");  // where it is
  CHECK(found(32, 24) == start + "begin <= end <= 40, found 32 and 24");
  CHECK(found(24, 41) == start + "begin <= end <= 40, found 24 and 41");
  CHECK(found(-8, 0) == start.substr(0, start.size() - 9) + "expected whole numbers, found -8");
  CHECK(found(16, 24) == start + "to begin at 24 or later, the end of matrix, found 16");
  CHECK(found(24, 28) == start + "8 bytes for 2 in F32, found 4");

  SafetensorsWriter w = small();
  w.tensors = {{"a", "F16", {1}, "ab"}, {"b", "F32", {1}, "abcd"}};
  CHECK(
      error_in(w) ==
      "model.safetensors: tensor b: data: expected to begin at a multiple of 4 bytes in the file, "
      "found a remainder of 2");
}

TEST_CASE("safetensors: a type that is not read is an error only for who asks for the tensor") {
  SafetensorsWriter w = small();
  w.tensors[0].dtype = "F8_E4M3";
  CHECK(error_in(w) ==
        "model.safetensors: tensor matrix: dtype: expected F32, F16 or BF16, found F8_E4M3");
  const auto held = exact(w.bytes());
  CHECK(Safetensors(held, "model.safetensors").tensor("norm").cols == 2);
}

TEST_CASE("safetensors: any change of a byte of the header loads or is an Error") {
  auto bytes = exact(small().bytes());
  const std::size_t header = bytes.size() - 40;
  int loaded = 0, refused = 0;
  for (std::size_t at = 0; at < header; ++at) {
    const std::byte original = bytes[at];
    for (int value = 0; value < 256; value += at < 8 ? 1 : 5) {
      bytes[at] = std::byte(value);
      try {
        const Safetensors file(bytes, "model.safetensors");
        for (const std::string& name : file.names()) {
          const Tensor t = file.tensor(name);
          CHECK(t.data >= bytes.data() + 8);
          CHECK(t.data + t.bytes() <= bytes.data() + bytes.size());
        }
        ++loaded;
      } catch (const Error&) {
        ++refused;
      }
    }
    bytes[at] = original;
  }
  CHECK(loaded > 0);
  CHECK(refused > loaded / 4);
}
