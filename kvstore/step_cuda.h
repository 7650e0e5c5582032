// What kernels of a store in device memory read of the running step.
#pragma once

#include <cstdint>

namespace thaw {

// Where a step's tokens stand, in device memory.
struct StepPlace {
  std::int32_t first;   // the first of them
  std::int32_t kv_len;  // behind the last
};

// And what decisions about residency need to know of the moment.
struct DeviceMoment : StepPlace {
  std::int32_t step;        // decode steps since the store was made or cleared
  std::int32_t can_freeze;  // 0 while frozen tokens would have no ghosts yet
  float epsilon;            // thaw: PolicyParams::epsilon, or less during recovery
};

}  // namespace thaw
