// Any bytes as a GGUF file: parsed, its config read, every tensor's first and last byte touched.
#include <cstddef>
#include <cstdint>
#include <span>

#include "device/error.h"
#include "model/config_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const thaw::Gguf gguf(std::as_bytes(std::span(data, size)), "fuzz.gguf");
    volatile std::byte sink{};
    for (const thaw::Tensor& t : gguf.tensors()) {
      sink = t.data[0];
      sink = t.data[t.bytes() - 1];
    }
    thaw::read_gguf_config(gguf);
  } catch (const thaw::Error&) {
  }
  return 0;
}
