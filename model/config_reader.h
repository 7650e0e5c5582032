// Config from what model files say.
#pragma once

#include <string>
#include <string_view>

#include "model/config.h"
#include "model/gguf.h"

namespace thaw {

// From the "llama.*" metadata of a GGUF file and its rope_freqs.weight. Throws Error.
Config read_gguf_config(const Gguf& gguf);

// From the text of a Hugging Face config.json, named `source` in messages. Throws Error.
Config read_hf_config(std::string_view text, const std::string& source);

}  // namespace thaw
