// Any bytes as tokenizer.json: a tokenizer or an Error.
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "device/error.h"
#include "tokenizer/chat_template.h"
#include "tokenizer/tokenizer.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const std::filesystem::path path =
      std::filesystem::temp_directory_path() / thaw::join("fuzz_", ::getpid(), "_tokenizer.json");
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const thaw::Tokenizer tokenizer(thaw::read_tokenizer_json(path));
    const std::string text = "Hello, \xff world 123 <|im_start|>";
    const auto ids = tokenizer.encode(text, {.add_special = true, .parse_special = true});
    tokenizer.decode(ids, true);
    const thaw::ChatFormat format = thaw::recognise_chat_format(tokenizer);
    thaw::encode_chat(tokenizer, format, {{"system", text}, {"user", text}});
  } catch (const thaw::Error&) {
  }
  return 0;
}
