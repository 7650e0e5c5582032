// Writes matrices of f32 as NumPy .npy files (format version 1.0, numpy.lib.format).
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>

#include "cli/output_file.h"

namespace thaw {

// The file appears under its name only when it is complete.
class NpyWriter {
 public:
  NpyWriter(std::filesystem::path path, std::int64_t rows, std::int64_t cols);

  // Whole rows, in order. Throws Error when they are too many or cannot be written.
  void append(std::span<const float> values);
  // Throws Error unless all rows were appended.
  void finish();

 private:
  OutputFile file_;
  std::int64_t missing_;  // elements still to be appended
};

}  // namespace thaw
