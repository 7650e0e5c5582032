// How well a row of logits predicts the next token, alone and beside another row.
#pragma once

#include <cstdint>
#include <span>

#include "device/thread_pool.h"

namespace thaw {

// -log softmax(logits)[target], in nats.
double negative_log_likelihood(std::span<const float> logits, std::int32_t target);

struct Divergence {
  double nll = 0;         // negative_log_likelihood(other, target)
  double kl = 0;          // KL(full || other) = sum of p_full (log p_full - log p_other), nats
  bool same_top = false;  // both rank the same token first
};

// Sums in f64, in pieces whose order does not depend on the number of threads.
Divergence compare_rows(ThreadPool& pool, std::span<const float> full,
                        std::span<const float> other, std::int32_t target);

}  // namespace thaw
