// Where a tokenizer comes from: the metadata of a GGUF file, or the files of a directory.
#pragma once

#include <filesystem>

#include "model/gguf.h"
#include "model/model.h"
#include "tokenizer/tokenizer.h"

namespace thaw {

// From "tokenizer.ggml.*". Throws Error naming file, key, expected and found.
TokenizerSpec tokenizer_spec(const Gguf& gguf);

// From a .gguf file (a vocabulary without tensors is enough), a tokenizer.json, a tiktoken
// tokenizer.model, or a directory with one of the last two. What a file is, its bytes say.
Tokenizer load_tokenizer(const std::filesystem::path& path);

// The tokenizer of a loaded model. Rows of the embedding beyond the vocabulary (padding) become
// tokens without text; a vocabulary larger than the embedding is an Error.
Tokenizer load_tokenizer(const Model& model);

}  // namespace thaw
