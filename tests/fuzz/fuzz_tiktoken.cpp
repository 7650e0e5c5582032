// Any bytes as a tiktoken tokenizer.model: a tokenizer or an Error.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "device/error.h"
#include "tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::filesystem::path path =
      std::filesystem::temp_directory_path() / thaw::join("fuzz_", ::getpid(), "_tokenizer.model");
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const thaw::Tokenizer tokenizer(thaw::read_tiktoken(path));
    const auto ids = tokenizer.encode("Hello, \xff world 123", {.add_special = true});
    tokenizer.decode(ids, true);
  } catch (const thaw::Error&) {
  }
  return 0;
}
