// A file mapped read-only into memory; unmapped on destruction. Move-only.
//
// A file that another program cuts short, or that sits on a failing disk, cannot be read through
// its map: the kernel then sends SIGBUS. report_lost_files() makes of it a message and exit code 1.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace thaw {

class MappedFile {
 public:
  MappedFile() = default;
  // Maps the whole file. An empty file maps to an empty span.
  // Throws Error("PATH: reason") when it is missing, unreadable, a directory, or cannot be mapped.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;

  const std::filesystem::path& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// For a program's start. What is not on disk yet is lost, as after any signal that ends a program.
void report_lost_files();

}  // namespace thaw
