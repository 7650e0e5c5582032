// The ops on the GPU.
#pragma once

#include <memory>

#include "device/cuda.h"
#include "model/device_weights.h"
#include "model/ops.h"

namespace thaw {

// Ops as in model/ops.h, queued on `stream`, with every activation in device memory, and tokens and
// positions in memory that the device reads: device or pinned. Nothing waits for the host, so
// that a graph can record every op, except while an observer is set: what it is told is copied to
// the host first. A token outside the vocabulary makes a row of NaN.
//
// Sums have a fixed order: the same bits every time, on every device. A row's results do not depend
// on the other rows, but may depend in the last bits on how many there are.
//
// Keeps references to all three; the weights that ops are given are those of `weights`.
std::unique_ptr<Ops> make_cuda_ops(const Config& config, const DeviceWeights& weights,
                                   const Stream& stream);

}  // namespace thaw
