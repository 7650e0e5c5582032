// Reader of GGUF v2 and v3 files (ggml documentation, gguf.md): metadata and tensor views, mapped.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "device/mapped_file.h"
#include "model/tensor.h"

namespace thaw {

// A metadata value. Integers of every width are widened to 64 bits (arrays of bool too), floats to
// double; strings point into the mapped file. Arrays of arrays are skipped over and not kept.
using GgufValue =
    std::variant<std::uint64_t, std::int64_t, double, bool, std::string_view,
                 std::vector<std::int64_t>, std::vector<double>, std::vector<std::string_view>>;

class Gguf {
 public:
  // Maps and checks the file: magic, version, every count, length, name, type, shape and offset.
  // Throws Error naming the file, the field, what was expected and what was found.
  explicit Gguf(const std::filesystem::path& path);
  // The same for bytes in memory, which must outlive this and start at a multiple of 8; `name`
  // stands for the path in messages.
  Gguf(std::span<const std::byte> bytes, const std::string& name);

  const std::filesystem::path& path() const { return path_; }
  int version() const { return version_; }
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<Tensor>& tensors() const { return tensors_; }  // in file order
  const Tensor* find_tensor(std::string_view name) const;          // null when absent

  bool has(std::string_view key) const;
  // Typed access. Without a fallback a missing key is an error; a wrong type always is one.
  std::int64_t integer(std::string_view key) const;
  std::int64_t integer(std::string_view key, std::int64_t fallback) const;
  double real(std::string_view key) const;
  double real(std::string_view key, double fallback) const;
  bool boolean(std::string_view key, bool fallback) const;
  std::string_view string(std::string_view key) const;
  std::string_view string(std::string_view key, std::string_view fallback) const;
  const std::vector<std::string_view>& strings(std::string_view key) const;
  const std::vector<std::int64_t>& integers(std::string_view key) const;
  const std::vector<double>& reals(std::string_view key) const;

 private:
  void parse(std::span<const std::byte> bytes);
  const GgufValue& value(std::string_view key) const;
  template <class T>
  const T& get(std::string_view key, std::string_view wanted) const;

  MappedFile file_;
  std::filesystem::path path_;
  int version_ = 0;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<Tensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> index_;  // of `tensors_` by name
};

}  // namespace thaw
