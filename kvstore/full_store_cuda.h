// The store on the GPU: under --policy full, every token in device memory, attended exactly.
#pragma once

#include <memory>

#include "device/cuda.h"
#include "kvstore/kvstore.h"

namespace thaw {

// A store as in kvstore/kvstore.h, with pages of 128 tokens in device memory, laid out as those of
// the cold tier on the CPU and with the same bits (NaN aside). append() takes k and v in device
// memory and queues one kernel on `stream`; views are read by work on the same stream.
//
// begin() takes pages, and its error says how many tokens would still fit. Between begin() and the
// last append() nothing is allocated, and what is queued reads the step's place from device memory:
// a graph can record append(), and then serves every step of as many tokens.
//
// Under the policies that freeze: make_cuda_tiered_store() (kvstore/tiered_store_cuda.h). Throws
// Error for --cold-file.
std::unique_ptr<KvStore> make_cuda_kv_store(const KvShape& shape, const KvOptions& options,
                                            const Stream& stream);

}  // namespace thaw
