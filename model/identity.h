// Whether two files hold the same model.
#pragma once

#include <cstdint>

#include "model/model.h"

namespace thaw {

// FNV-1a (Fowler, Noll, Vo) over the sizes, the frequencies of RoPE, the norms, and of every matrix
// its format and 4 KiB from its middle: other weights, or the same in another format, have another
// number, and reading it takes no time.
std::uint64_t identity(const Model& model);

}  // namespace thaw
