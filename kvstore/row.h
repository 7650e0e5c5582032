// One key or value of one head as it is stored.
#pragma once

#include <cmath>
#include <cstddef>

#include "device/host_device.h"
#include "kvstore/kvstore.h"

namespace thaw {

// q8_0 and q4_0: blocks of 32 numbers with one f16 scale d, as in GGUF: x = d q with q of 8 bits,
// d = max|x| / 127, and of 4 bits, d = (x of largest magnitude) / -8.
void store_row(std::byte* out, const float* in, int n, KvType type);
void load_row(float* out, const std::byte* in, int n, KvType type);

// Of a number of a block, inverse = 1 / d: q of q8_0, as queries of ghosts have it, too; q + 8 of
// q4_0. 0 where x * inverse is infinite or NaN.
THAW_HOST_DEVICE inline int q8_0_code(float x, float inverse) {
  const float code = rintf(x * inverse);
  return static_cast<int>(fabsf(code) < 128 ? code : 0.0f);
}
THAW_HOST_DEVICE inline int q4_0_code(float x, float inverse) {
  const float code = fmaf(x, inverse, 8.5f);
  return !(fabsf(code) < 17) ? 0 : code < 16 ? static_cast<int>(code) : 15;
}

}  // namespace thaw
