// Builds the bytes of a safetensors file, and lies about them where a test asks for it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "device/error.h"
#include "tests/gguf_writer.h"

namespace thaw::testing {

class SafetensorsWriter {
 public:
  struct TensorSpec {
    std::string name;
    std::string dtype;                // "F32", ...
    std::vector<std::int64_t> shape;  // outermost (rows) first
    std::string data;
    std::optional<std::pair<std::int64_t, std::int64_t>> offsets = {};  // instead of the true ones
  };

  std::vector<TensorSpec> tensors;
  std::optional<std::string> header;           // instead of the true one
  std::optional<std::uint64_t> header_length;  // instead of the true one

  std::string bytes() const {
    std::string text = header.value_or(true_header());
    text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the data is aligned
    std::string out;
    put(out, header_length.value_or(text.size()));
    out += text;
    for (const TensorSpec& spec : tensors) out += spec.data;
    return out;
  }

  std::string true_header() const {
    std::string out = R"({"__metadata__":{"format":"pt"})";
    std::int64_t at = 0;
    for (const TensorSpec& spec : tensors) {
      const auto end = at + static_cast<std::int64_t>(spec.data.size());
      const auto [first, last] = spec.offsets.value_or(std::pair(at, end));
      std::string shape;
      for (const std::int64_t size : spec.shape) {
        shape += join(shape.empty() ? "" : ",", size);
      }
      out += join(",\"", spec.name, "\":{\"dtype\":\"", spec.dtype, "\",\"shape\":[", shape,
                  "],\"data_offsets\":[", first, ",", last, "]}");
      at = end;
    }
    return out + "}";
  }
};

}  // namespace thaw::testing
