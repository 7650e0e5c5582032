// A file mapped read-only into memory; unmapped on destruction. Move-only.
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

}  // namespace thaw
