// The ops on the GPU.
#pragma once

#include <memory>

#include "device/cuda.h"
#include "model/device_weights.h"
#include "model/ops.h"

namespace thaw {

// Ops as in model/ops.h, queued on `stream`, with every activation in device memory, and tokens and
// positions in memory that the device reads: device or pinned. A token outside the vocabulary makes
// a row of NaN.
//
// Up to 8 rows, products are f32 and a graph can record every op: nothing waits and nothing is
// allocated. More rows go through model/gemm_cuda.h, which says how it rounds; buffers grow with
// the largest number of rows. While an observer is set, what it is told is copied to the host
// first.
//
// Sums have a fixed order: the same bits every time. A row's results do not depend on the other
// rows, but on how many there are, in the last bits of what the product's format keeps.
//
// Keeps references to all three; the weights that ops are given are those of `weights`.
std::unique_ptr<Ops> make_cuda_ops(const Config& config, const DeviceWeights& weights,
                                   const Stream& stream);

}  // namespace thaw
