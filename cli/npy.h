// Writes matrices of f32 as NumPy .npy files (format version 1.0, numpy.lib.format).
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>

namespace thaw {

// The file appears under its name only when it is complete: rows go to a temporary file beside it,
// which finish() renames and the destructor otherwise removes.
class NpyWriter {
 public:
  // Throws Error when the temporary file cannot be made.
  NpyWriter(std::filesystem::path path, std::int64_t rows, std::int64_t cols);
  ~NpyWriter();
  NpyWriter(const NpyWriter&) = delete;
  NpyWriter& operator=(const NpyWriter&) = delete;

  // Whole rows, in order. Throws Error when they are too many or cannot be written.
  void append(std::span<const float> values);
  // Throws Error unless all rows were appended.
  void finish();

  std::int64_t missing() const { return missing_; }  // elements still to be appended

 private:
  void write(const void* data, std::size_t size);

  std::filesystem::path path_, temporary_;
  std::int64_t missing_;
  int fd_ = -1;
};

}  // namespace thaw
