// The exact rows of a context that is too short to freeze (KvOptions::freeze_from): in device
// memory, where attention reads them as it does under --policy full. The cold tier gets each page
// when it is full, by a copy beside the next step, and the rest when somebody needs it.
#pragma once

#include "device/cuda.h"
#include "kvstore/cold_tier_cuda.h"
#include "kvstore/exact_tier_cuda.h"

namespace thaw {

class CudaAwakeRows {
 public:
  // Keeps references. Rows are written and read by work on `stream`.
  CudaAwakeRows(const CudaColdTier& cold, const KvShape& shape, const Stream& stream)
      : cold_(cold), rows_(shape, stream), stream_(stream) {}

  // Opens a step of tokens first .. kv_len, for which the cold tier has room; it also has the
  // earlier ones, if they are not here. Throws Error, with nothing changed, when memory is refused.
  void begin(int first, int kv_len);
  // The cold tier has tokens 0 .. n_tokens, which are here; waits.
  void save(int n_tokens);
  // Tokens at `position` and after it will be written anew, once copies that read them are done.
  void cut(int position);
  void release();  // gives the memory back, after save(); waits

  const CudaExactTier& tier() const { return rows_; }

 private:
  void copy_pages(int first, int last);  // to the cold tier, on the side stream

  const CudaColdTier& cold_;
  CudaExactTier rows_;
  const Stream& stream_;
  Stream side_;
  Event ready_;           // what the one stream waits for on the other
  bool is_here_ = false;  // memory was not given back
  int n_saved_ = 0;       // tokens that the cold tier has, or will when copies are done
};

}  // namespace thaw
