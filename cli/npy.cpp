#include "cli/npy.h"

#include <bit>
#include <string>
#include <utility>

#include "device/error.h"

namespace thaw {

static_assert(std::endian::native == std::endian::little);  // "<f4" below

NpyWriter::NpyWriter(std::filesystem::path path, std::int64_t rows, std::int64_t cols)
    : file_(std::move(path)), missing_(rows * cols) {
  // Magic, version, length of the rest of the header, and a Python dict padded to a multiple of 64.
  std::string dict =
      join("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows, ", ", cols, "), }");
  dict.resize((10 + dict.size() + 1 + 63) / 64 * 64 - 10 - 1, ' ');
  dict += '\n';
  const auto length = static_cast<std::uint16_t>(dict.size());
  file_.write("\x93NUMPY" +
              std::string{1, 0, static_cast<char>(length & 255), static_cast<char>(length >> 8)} +
              dict);
}

void NpyWriter::append(std::span<const float> values) {
  const auto n = static_cast<std::int64_t>(values.size());
  require(n <= missing_, file_.path().string(), ": rows: expected ", missing_,
          " more elements, found ", n);
  file_.write({reinterpret_cast<const char*>(values.data()), values.size_bytes()});
  missing_ -= n;
}

void NpyWriter::finish() {
  require(missing_ == 0, file_.path().string(), ": rows: expected ", missing_,
          " more elements, found 0");
  file_.finish();
}

}  // namespace thaw
