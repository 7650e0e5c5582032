// A freeze map as one HTML page that needs no network and no other file.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cli/freeze_map.h"
#include "cli/output_file.h"

namespace thaw {

// The head of the page. All texts are UTF-8 and may be anything.
struct PageHead {
  struct Figure {
    std::string name, value, note;
  };
  std::string model;
  std::vector<std::pair<std::string, std::string>> parameters;  // of the policy, to begin with it
  std::vector<Figure> figures;
  int prompt_tokens = 0;
};

// texts: of the tokens (cli/token_text.h), at least as many as the map has seen. Writes all of the
// page; finish() is the caller's.
void write_page(OutputFile& file, const PageHead& head, const FreezeMap& map,
                std::span<const std::string> texts);

}  // namespace thaw
