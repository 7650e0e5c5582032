// Looks for NaN and infinity among the weights of a model.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model.h"

namespace thaw {

struct NonFinite {
  std::string tensor;
  std::int64_t first = 0;  // index of the first such element, row-major
  std::int64_t count = 0;
};

// Reads every weight; one entry for each tensor with an element that is NaN or infinite, scales of
// quantised blocks included.
std::vector<NonFinite> find_non_finite(const Model& model);

}  // namespace thaw
