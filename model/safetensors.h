// Reader of safetensors files (huggingface/safetensors, README "Format"): 8 bytes length of the
// header, the header in JSON, then the data.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/tensor.h"

namespace thaw {

class Safetensors {
 public:
  // Checks the header of `bytes`, which must outlive this and start at a multiple of 8. `source` is
  // the file's name in messages. Throws Error.
  Safetensors(std::span<const std::byte> bytes, const std::string& source);

  const std::string& source() const { return source_; }
  bool has(std::string_view name) const { return entries_.find(name) != entries_.end(); }
  std::vector<std::string> names() const;

  // The tensor `name`, which has() it. Throws Error unless it is a vector or a matrix of F32, F16
  // or BF16. Other tensors may stand in the file as long as nobody asks for them.
  Tensor tensor(std::string_view name) const;

 private:
  struct Entry {
    std::string dtype;
    std::vector<std::uint64_t> shape;
    std::uint64_t begin = 0;  // of its bytes, from the start of the data
    std::uint64_t end = 0;
  };
  void check_overlap() const;

  std::string source_;
  std::span<const std::byte> data_;
  std::map<std::string, Entry, std::less<>> entries_;
};

}  // namespace thaw
