#include "cli/output_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "device/error.h"

namespace thaw {
namespace {

namespace fs = std::filesystem;

constexpr int kMostLinks = 40;  // as the kernel follows

// Where the path leads, past links, also to a file that is not there yet.
fs::path followed(fs::path path) {
  std::error_code none;
  for (int i = 0; i < kMostLinks && fs::is_symlink(path, none); ++i) {
    const fs::path link = fs::read_symlink(path, none);
    path = path.parent_path() / link;
  }
  return path;
}

fs::path directory_of(const fs::path& file) {
  return file.has_parent_path() ? file.parent_path() : ".";
}

// By which a file that is open, but has no name, can be given one.
std::string name_of(int fd) { return join("/proc/self/fd/", fd); }

}  // namespace

OutputFile::OutputFile(fs::path path, mode_t mode)
    : path_(std::move(path)), target_(followed(path_)) {
  require(!path_.empty(), "expected a file to write, found an empty path");
  std::error_code reason;
  const fs::file_type kind = fs::status(target_, reason).type();
  if (kind == fs::file_type::none) fail_to_write(reason.value());
  require(kind == fs::file_type::regular || kind == fs::file_type::not_found, path_.string(),
          ": expected a regular file or none to write, found ",
          kind == fs::file_type::directory ? "a directory" : "another kind");
  fd_ = ::open(directory_of(target_).c_str(), O_WRONLY | O_TMPFILE | O_CLOEXEC, mode);
  if (fd_ >= 0 && ::access(name_of(fd_).c_str(), F_OK) != 0) ::close(std::exchange(fd_, -1));
  if (fd_ < 0) {
    fd_ = make_temporary([mode](const char* name) {
      return ::open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    });
  }
  if (fd_ < 0) fail_to_write(errno);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void OutputFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail_to_write(errno);
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

void OutputFile::finish() {
  if (temporary_.empty() && make_temporary([&](const char* name) {
                              return ::linkat(AT_FDCWD, name_of(fd_).c_str(), AT_FDCWD, name,
                                              AT_SYMLINK_FOLLOW);
                            }) < 0)
    fail_to_write(errno);
  if (::close(std::exchange(fd_, -1)) != 0) fail_to_write(errno);
  if (std::rename(temporary_.c_str(), target_.c_str()) != 0) fail_to_write(errno);
  temporary_.clear();
}

void OutputFile::fail_to_write(int reason) const {
  fail(path_.string(), ": cannot write: ", std::strerror(reason));
}

int OutputFile::make_temporary(const std::function<int(const char*)>& make) {
  std::random_device random;
  for (;;) {
    const std::string name = directory_of(target_) / join(".thaw-", random(), "-", random());
    const int made = make(name.c_str());
    if (made >= 0) temporary_ = name;
    if (made >= 0 || errno != EEXIST) return made;
  }
}

void require_two_files(const std::string& flag, const std::string& path, const std::string& other,
                       const std::string& other_path) {
  if (path == "-" || other_path == "-") return;
  std::error_code none;
  const fs::path a = fs::weakly_canonical(followed(path), none);
  const fs::path b = fs::weakly_canonical(followed(other_path), none);
  if (a == b && !a.empty())
    throw UsageError(
        join(flag, " and ", other, ": expected two files, found ", printable(path), " for both"));
}

}  // namespace thaw
