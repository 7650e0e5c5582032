// A tiny model on disk for tests of the command line, made once.
#pragma once

#include <string>

#include "tests/tiny_files.h"

namespace thaw::testing {

class TinyCli {
 public:
  static TinyCli& get() {
    static TinyCli files;
    return files;
  }
  std::string path(const std::string& name) const { return (directory_.path() / name).string(); }
  std::string model() const { return path("tiny.gguf"); }

 private:
  TinyCli() { write_file(model(), tiny_gguf(make_tiny_model()).bytes()); }
  TemporaryDirectory directory_;
};

}  // namespace thaw::testing
