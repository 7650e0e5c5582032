// Any bytes as a safetensors file: every tensor in it asked for, its first and last byte touched.
#include <cstddef>
#include <cstdint>
#include <span>

#include "device/error.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const thaw::Safetensors file(std::as_bytes(std::span(data, size)), "fuzz.safetensors");
    volatile std::byte sink{};
    for (const std::string& name : file.names()) {
      try {
        const thaw::Tensor t = file.tensor(name);
        sink = t.data[0];
        sink = t.data[t.bytes() - 1];
      } catch (const thaw::Error&) {
      }
    }
  } catch (const thaw::Error&) {
  }
  return 0;
}
