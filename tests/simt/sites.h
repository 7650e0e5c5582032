// The sites of calls to the runtime; see tests/simt/include/simt/sites.h.
#pragma once

#include "tests/simt/include/simt/sites.h"

namespace simt {

#ifdef SIMT_RACE
bool skipped(const void* return_address);
// For a function of the runtime, which device/cuda.cu calls: the site is where that was called
// from.
__attribute__((always_inline)) inline bool skipped_by_caller() {
  return skipped(__builtin_return_address(1));
}
#else
inline bool skipped_by_caller() { return false; }
#endif

}  // namespace simt
