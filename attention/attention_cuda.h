// Attention on the GPU: exact, and in decode over two tiers.
#pragma once

#include <memory>

#include "attention/attention.h"
#include "device/cuda.h"

namespace thaw {

// Attention as in attention/attention.h, queued on `stream`: o and q in device memory, and a view
// that has `device`, whose tiers and statistics stand in for those of KvView and AttentionStats
// (kvstore/device_view.h): only stats.n_rows is written on the host. head_dim: a multiple of 8, at
// most 256. Any other shape is an Error of the first call, which is a prompt's.
//
// Up to 8 rows, everything is f32: a row errs as f32 sums do. More rows of f16, bf16, q8_0 and q4_0
// stores with a head_dim of at most 128 go through tensor cores: queries and probabilities are
// rounded to f16, of bf16 stores to bf16. Statistics are f32. For ghosts, queries and weights are
// rounded to 8 bits as on the CPU.
//
// The order of all sums is fixed by the shape and the device's number of multiprocessors, so the
// bits do not depend on timing. Memory grows with the most rows x heads of a call, and under a
// policy that freezes with heads x tokens that the hot mask has room for; calls of a shape that has
// been run before allocate nothing and can be recorded in a graph, which then serves every kv_len.
std::unique_ptr<Attention> make_cuda_attention(const Stream& stream);

}  // namespace thaw
