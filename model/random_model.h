// Models that stand in no file: the shape of a known one, with seeded random weights. What they
// write means nothing, and costs what the known one costs: for measurements of speed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "device/thread_pool.h"
#include "model/model.h"

namespace thaw {

struct ModelShape {
  const char* name;
  Config config;
};

// tiny (for tests), 135m (SmolLM2), 1b and 8b (LLaMA 3).
const std::vector<ModelShape>& model_shapes();

// A model of that shape with all matrices in `type`, or in kQ8_0 where rows are no whole blocks of
// it. Elements are independent and of mean about 0 and root mean square 0.02; norms are 1. The same
// bits for a seed on every machine. Throws Error when the shape is unknown or memory is refused.
Model make_random_model(const std::string& shape, DType type, std::uint64_t seed,
                        ThreadPool& pool);

}  // namespace thaw
