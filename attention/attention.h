// softmax(q K^T / sqrt(head_dim)) V over a KV store, causal, grouped-query; and what the policy
// needs to know of it: who was attended, and how spread the attention was.
#pragma once

#include <memory>

#include "device/thread_pool.h"
#include "kvstore/kvstore.h"

namespace thaw {

class Attention {
 public:
  virtual ~Attention() = default;

  // o, q: T x (n_heads * head_dim), f32, o must not alias q. The T rows are the last T tokens of
  // the layer's view, so row t sees tokens 0 .. kv_len - T + t.
  //
  // A view without lanes: every token is read exactly, and `stats` is filled for the last
  // stats_rows rows (0 <= stats_rows <= T; 0 leaves it without lanes).
  // A view with lanes (T = 1): hot tokens are read exactly. Where there are ghosts, all frozen
  // tokens answer with theirs; those whose estimated probability, mean over the query heads of
  // their lane, is at least `recall` are read exactly from the cold tier instead. One softmax over
  // all. `stats` is always filled.
  virtual void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
                      AttentionStats& stats, int stats_rows) = 0;
};

// Keeps a reference to `pool`. Results do not depend on its size.
std::unique_ptr<Attention> make_cpu_attention(ThreadPool& pool);

}  // namespace thaw
