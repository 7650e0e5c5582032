// Files that commands write.
#pragma once

#include <filesystem>
#include <string_view>

namespace thaw {

// The file appears under its name only when it is complete: what is written goes to a temporary
// file beside it, which finish() renames and the destructor otherwise removes.
class OutputFile {
 public:
  // Throws Error when the path names something that is no regular file, or the temporary file
  // cannot be made.
  explicit OutputFile(std::filesystem::path path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view bytes);  // throws Error when it cannot
  void finish();                       // throws Error when the file cannot be completed

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_, temporary_;
  int fd_ = -1;
};

}  // namespace thaw
