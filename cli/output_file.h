// Files that commands write.
#pragma once

#include <sys/types.h>

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>

namespace thaw {

// The file appears under its name only when it is complete: what is written goes to a file without
// a name, which is gone with the process, however that ends, and which finish() gives its name.
// Where the file system has no such files, it has a name of its own until then. A link is followed:
// the file that it names is the one that is written.
class OutputFile {
 public:
  // mode: what may be done with it, less the process's umask. Throws Error when the path names
  // something that is no regular file, or no file can be made where it leads.
  explicit OutputFile(std::filesystem::path path, mode_t mode = 0666);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view bytes);  // throws Error when it cannot
  void finish();                       // throws Error when the file cannot be completed

  const std::filesystem::path& path() const { return path_; }

 private:
  [[noreturn]] void fail_to_write(int reason) const;
  // Hands make() names beside the target that nothing has, until one is not taken meanwhile; it
  // returns less than 0 and sets errno where it fails.
  int make_temporary(const std::function<int(const char*)>& make);

  std::filesystem::path path_, target_;  // as given, and where it leads
  std::string temporary_;                // "" while the file has no name
  int fd_ = -1;
};

// Throws UsageError when the paths of two flags lead to the same file. "" and "-" lead to none.
void require_two_files(const std::string& flag, const std::string& path, const std::string& other,
                       const std::string& other_path);

}  // namespace thaw
