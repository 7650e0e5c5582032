// softmax(q K^T / sqrt(head_dim)) V over a KV store, causal, grouped-query; and what the policy
// needs to know of it: who was attended, and how spread the attention was.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "device/thread_pool.h"
#include "kvstore/kvstore.h"

namespace thaw {

// By-products of one attend() call, over the rows that were asked for.
struct AttentionStats {
  // Mean over the asked rows and all query heads of the probability of each token: kv_len, sums
  // to 1.
  std::vector<float> probability;
  // Mean over heads of H = ln l + m - sum(p s), in nats, one per asked row, oldest first.
  std::vector<float> entropy;
};

class Attention {
 public:
  virtual ~Attention() = default;

  // o, q: T x (n_heads * head_dim), f32, o must not alias q. The T rows are the last T tokens of
  // the layer's view, so row t sees tokens 0 .. kv_len - T + t. When `stats` is not null it is
  // filled for the last stats_rows rows (1 <= stats_rows <= T).
  virtual void attend(float* o, const float* q, int n_rows, int n_heads, const KvView& kv,
                      AttentionStats* stats = nullptr, int stats_rows = 1) = 0;
};

// Keeps a reference to `pool`. Results do not depend on its size.
std::unique_ptr<Attention> make_cpu_attention(ThreadPool& pool);

}  // namespace thaw
