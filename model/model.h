// A loaded model: its configuration, its weights, and the files that own them.
#pragma once

#include <filesystem>
#include <memory>
#include <vector>

#include "device/mapped_file.h"
#include "model/config.h"
#include "model/gguf.h"
#include "model/weights.h"

namespace thaw {

struct Model {
  std::filesystem::path path;          // what the user named: a .gguf file or a directory
  Config config;
  Weights weights;                     // views into the files below
  std::shared_ptr<const Gguf> gguf;    // set when the model is a GGUF file (its tokenizer is in it)
  std::vector<MappedFile> shards;      // the safetensors files of a directory
  std::vector<std::shared_ptr<const std::byte[]>> memory;  // of weights that stand in no file
};

// Loads a .gguf file or a Hugging Face directory (config.json, *.safetensors) as downloaded.
// Every tensor's name, type and shape is demanded. Throws Error.
Model load_model(const std::filesystem::path& path);

}  // namespace thaw
