// Saves a tiny model as the files that users have: a GGUF, or a Hugging Face directory.
#pragma once

#include <filesystem>
#include <map>
#include <string>

#include "tests/gguf_writer.h"
#include "tests/tiny_model.h"

namespace thaw::testing {

// A directory that is removed with everything in it on destruction.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

void write_file(const std::filesystem::path& path, const std::string& bytes);
std::string read_file(const std::filesystem::path& path);  // "" when it cannot be read

// The rows of wq or wk, reordered head by head from one pairing of RoPE to the other. Row 2i + h of
// kInterleaved is row i + h * head_dim / 2 of kHalves (h = 0, 1).
std::string repair_rows(const Tensor& tensor, int head_dim, RopePairing from, RopePairing to);

// `tiny` as a GGUF file. Matrices keep their format. With a byte-level BPE tokenizer of vocab_size
// tokens (at least 259): 256 bytes, a few merges, <|endoftext|>, <|im_start|> (bos), <|im_end|>
// (eos), then unused ones; the ChatML template; pre-tokenizer "smollm".
GgufWriter tiny_gguf(const TinyModel& tiny);

// `tiny` as the files of a Hugging Face directory, by name: config.json, model.safetensors (or
// n_shards files and their index), tokenizer.json (the same tokenizer), tokenizer_config.json.
// Quantised matrices become F32. rope_factors must be empty or all the same (linear scaling).
using Files = std::map<std::string, std::string>;
Files tiny_hf(const TinyModel& tiny, int n_shards = 1);

void save(const std::filesystem::path& directory, const Files& files);

}  // namespace thaw::testing
