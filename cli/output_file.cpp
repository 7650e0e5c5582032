#include "cli/output_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>

#include "device/error.h"

namespace thaw {

OutputFile::OutputFile(std::filesystem::path path)
    : path_(std::move(path)), temporary_(join(path_.string(), ".partial-", ::getpid())) {
  std::error_code none;
  const auto kind = std::filesystem::status(path_, none).type();
  require(kind == std::filesystem::file_type::regular ||
              kind == std::filesystem::file_type::not_found ||
              kind == std::filesystem::file_type::none,
          path_.string(), ": expected a regular file or none to write, found ",
          kind == std::filesystem::file_type::directory ? "a directory" : "another kind");
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path_.string(), ": cannot write: ", std::strerror(errno));
}

OutputFile::~OutputFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void OutputFile::write(std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(fd_, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_.string(), ": cannot write: ", std::strerror(errno));
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
}

void OutputFile::finish() {
  const bool closed = ::close(std::exchange(fd_, -1)) == 0;
  if (closed && std::rename(temporary_.c_str(), path_.c_str()) == 0) return;
  const int reason = errno;
  ::unlink(temporary_.c_str());
  fail(path_.string(), ": cannot write: ", std::strerror(reason));
}

}  // namespace thaw
