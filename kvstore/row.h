// One key or value of one head as it is stored.
#pragma once

#include <cstddef>

#include "kvstore/kvstore.h"

namespace thaw {

// q8_0 and q4_0: blocks of 32 numbers with one f16 scale d, as in GGUF: x = d q with q of 8 bits,
// d = max|x| / 127, and of 4 bits, d = (x of largest magnitude) / -8.
void store_row(std::byte* out, const float* in, int n, KvType type);
void load_row(float* out, const std::byte* in, int n, KvType type);

}  // namespace thaw
