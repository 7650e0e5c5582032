// Any text as a Hugging Face config.json; what is accepted must give finite frequencies.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "device/error.h"
#include "model/config_reader.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const std::string_view text(reinterpret_cast<const char*>(data), size);
    const thaw::Config config = thaw::read_hf_config(text, "config.json");
    for (const float frequency : thaw::rope_inverse_frequencies(config)) {
      if (!std::isfinite(frequency) || frequency < 0) std::abort();
    }
  } catch (const thaw::Error&) {
  }
  return 0;
}
