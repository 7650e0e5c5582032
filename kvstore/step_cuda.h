// What kernels of a store in device memory read of the running step.
#pragma once

#include <cstdint>

namespace thaw {

// Where a step's tokens stand, in device memory.
struct StepPlace {
  std::int32_t first;   // the first of them
  std::int32_t kv_len;  // behind the last
};

}  // namespace thaw
