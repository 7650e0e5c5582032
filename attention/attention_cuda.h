// Exact attention on the GPU.
#pragma once

#include <memory>

#include "attention/attention.h"
#include "device/cuda.h"

namespace thaw {

// Attention as in attention/attention.h, queued on `stream`: o and q in device memory, and a view
// that has `device`. No statistics and no lanes: stats_rows must be 0. head_dim: a multiple of 8,
// at most 256.
//
// Up to 8 rows, everything is f32: a row errs as f32 sums do. More rows of f16, bf16, q8_0 and q4_0
// stores with a head_dim of at most 128 go through tensor cores: queries and probabilities are
// rounded to f16, of bf16 stores to bf16.
//
// The order of all sums is fixed by the shape and the device's number of multiprocessors, so the
// bits do not depend on timing. Memory grows with the most rows x heads of a call; calls of a shape
// that has been run before allocate nothing and can be recorded in a graph, which then serves every
// kv_len.
std::unique_ptr<Attention> make_cuda_attention(const Stream& stream);

}  // namespace thaw
