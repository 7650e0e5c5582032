// The softmax of a set of scores, in a form that can be joined with another set's: the type that
// split decode, tiles of prefill and tiers of memory all reduce to, shared by host and device.
#pragma once

#include <cmath>
#include <limits>

namespace thaw {

// For scores s_j and values v_j of a set: m = max s_j, l = sum e^(s_j - m), and the two sums that
// are still to be divided by l: o = sum e^(s_j - m) v_j (kept by the caller), and ps = sum e^(s_j -
// m) s_j. (Milakov and Gimelshein, 1805.02867; the merge as in FlashAttention, 2205.14135.)
struct SoftmaxState {
  float m = -std::numeric_limits<float>::infinity();
  float l = 0;
  float ps = 0;

  // H = -sum p ln p = ln l + m - sum(p s), in nats, of the set's distribution.
  float entropy() const { return std::log(l) + m - ps / l; }
};

// a = a joined with b, over n elements of o. Associative up to rounding, so a fixed order of merges
// gives fixed bits. The empty state is neutral.
inline void merge(SoftmaxState& a, float* o_a, const SoftmaxState& b, const float* o_b, int n) {
  if (b.l == 0) return;
  const float m = a.m > b.m ? a.m : b.m;
  const float less = std::exp(a.m < b.m ? a.m - b.m : b.m - a.m);
  const float scale_a = a.m < b.m ? less : 1.0f, scale_b = a.m < b.m ? 1.0f : less;
  a = {m, a.l * scale_a + b.l * scale_b, a.ps * scale_a + b.ps * scale_b};
  for (int i = 0; i < n; ++i) o_a[i] = o_a[i] * scale_a + o_b[i] * scale_b;
}

}  // namespace thaw
