// The store on the GPU under a policy that freezes: every token exactly in pinned host memory, hot
// rows and ghosts in device memory.
#pragma once

#include <memory>

#include "device/cuda.h"
#include "kvstore/kvstore.h"

namespace thaw {

// A store as in kvstore/kvstore.h. Its tiers have the bits of the CPU's, and on the same statistics
// the same tokens are hot in the same rows, step by step (kvstore/residency_cuda.h).
//
// append() takes k and v in device memory. Attention reads KvView::device and writes its statistics
// where that says (kvstore/device_view.h); what settle() is given is not read. All work is queued
// on `stream`. begin() waits for the step before, takes memory, and opens rows; from then on until
// the last settle() nothing is allocated or waited for, and what is queued reads the step's place
// from device memory: a graph of a decode step serves every later one with the same views.
//
// A context too short to freeze (KvOptions::freeze_from) is in device memory, whole, as under
// --policy full (kvstore/awake_rows_cuda.h). Where memory for it is refused, stderr says so, and
// freezing begins there.
//
// Prompts: of a longer one, a step of more than 8 tokens works on copies of two layers' exact rows
// in device memory (kvstore/staged_rows_cuda.h), which usage().bookkeeping counts and the next
// decode step gives back; its tokens are in the cold tier when the step is done. Where memory for
// them is refused, stderr says so, and kernels read the cold tier over the bus.
//
// counters(), ghost_mass() and reset() wait for the stream, too; reset() throws Error when memory
// is refused for the rows of those that it wakes. A recorder is told of a step when the next one
// begins or counters() is called; one that wants events must be there from the first token on,
// record() throws Error otherwise, and makes steps much slower (kvstore/shadow_lanes_cuda.h).
//
// Throws Error for --policy full, --cold-file, and a head_dim that is no multiple of 8 up to 256.
std::unique_ptr<KvStore> make_cuda_tiered_store(const KvShape& shape, const KvOptions& options,
                                                const Stream& stream);

}  // namespace thaw
