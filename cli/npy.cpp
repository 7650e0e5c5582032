#include "cli/npy.h"

#include <fcntl.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "device/error.h"

namespace thaw {

static_assert(std::endian::native == std::endian::little);  // "<f4" below

NpyWriter::NpyWriter(std::filesystem::path path, std::int64_t rows, std::int64_t cols)
    : path_(std::move(path)),
      temporary_(join(path_.string(), ".partial-", ::getpid())),
      missing_(rows * cols) {
  std::error_code none;
  const auto kind = std::filesystem::status(path_, none).type();
  require(kind == std::filesystem::file_type::regular ||
              kind == std::filesystem::file_type::not_found ||
              kind == std::filesystem::file_type::none,
          path_.string(), ": expected a regular file or none to write, found ",
          kind == std::filesystem::file_type::directory ? "a directory" : "another kind");
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (fd_ < 0) fail(path_.string(), ": cannot write: ", std::strerror(errno));
  // Magic, version, length of the rest of the header, and a Python dict padded to a multiple of 64.
  std::string dict =
      join("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows, ", ", cols, "), }");
  dict.resize((10 + dict.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  dict += '\n';
  const auto length = static_cast<std::uint16_t>(dict.size());
  const std::string header =
      "\x93NUMPY" +
      std::string{1, 0, static_cast<char>(length & 255), static_cast<char>(length >> 8)} + dict;
  write(header.data(), header.size());
}

NpyWriter::~NpyWriter() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void NpyWriter::append(std::span<const float> values) {
  const auto n = static_cast<std::int64_t>(values.size());
  require(n <= missing_, path_.string(), ": rows: expected ", missing_, " more elements, found ",
          n);
  write(values.data(), values.size_bytes());
  missing_ -= n;
}

void NpyWriter::finish() {
  require(missing_ == 0, path_.string(), ": rows: expected ", missing_, " more elements, found 0");
  const bool closed = ::close(std::exchange(fd_, -1)) == 0;
  if (closed && std::rename(temporary_.c_str(), path_.c_str()) == 0) return;
  const int reason = errno;
  ::unlink(temporary_.c_str());
  fail(path_.string(), ": cannot write: ", std::strerror(reason));
}

void NpyWriter::write(const void* data, std::size_t size) {
  const char* at = static_cast<const char*>(data);
  while (size > 0) {
    const ssize_t n = ::write(fd_, at, size);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) fail(path_.string(), ": cannot write: ", std::strerror(errno));
    at += n;
    size -= static_cast<std::size_t>(n);
  }
}

}  // namespace thaw
