// Ghosts: low-bit copies of keys and values with which frozen tokens still answer. The format, how
// a token becomes one, and what attention computes from them.
//
// A key k of a KV head becomes x = R (k - mu), with mu the mean of the first keys of its head,
// turned by RoPE as k is (kvstore/ghost_rope.h), and R a random rotation, which makes every
// coordinate alike (QuIP, 2307.13304; QuaRot, 2404.00456).
// With sigma = rms(x), x is rounded to b bits on a uniform grid of step(b) sigma, the best for a
// Gaussian (Max, 1960): code u in [0, 2^b), y = step (u - 2^(b-1) + 1/2). One scale a token is
// kept, in 8 bits: step |x|^2 / <x,y>, so that the ghost is unbiased over rotations (RaBitQ,
// 2405.12497). For keys that makes the estimate of q.k right on average; of values many are added,
// and then errors cancel, but a bias would not. Then
//   q.k  ~ q.mu + (R q) . k^,   k^ = scale (u - 2^(b-1) + 1/2),
// and the sum of p v of many tokens is rotated back once.
//
// What rounding loses of a value, the next ones make up for: instead of x_t is rounded
//   y_t = x_t + beta sum over the tokens s before t in its chain of 8 of (x_s - ghost of s),
// as in error diffusion (Floyd and Steinberg, 1976). Attention weights neighbours alike, and so
// errors that cancel among them cancel in its sum.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "kvstore/ghost_rope.h"
#include "kvstore/policy.h"

namespace thaw {

inline constexpr int kGhostGroup = 32;  // tokens whose codes are interleaved
inline constexpr int kTierShift = 7;
inline constexpr int kTierTokens = 1 << kTierShift;  // of a page of a tier
constexpr int tier_pages(int n_tokens) { return (n_tokens + kTierTokens - 1) / kTierTokens; }
inline constexpr int kChainTokens = 8;     // of a group, whose values' errors are fed back
inline constexpr int kCentreTokens = 128;  // tokens whose mean is mu; all are hot until then

// x = R x for one head, in place: signs that are fixed for all heads, then Hadamard transforms of
// the powers of two that head_dim is the sum of, largest first. R is orthogonal.
void rotate(float* x, int head_dim);
void rotate_back(float* x, int head_dim);  // x = R^T x

// What the ghosts of a head are relative to: the mean of its first keys and values, and the unit of
// their scales, 2^b-grid step times the root mean square of x over those tokens.
struct GhostCentre {
  const float* key_mean = nullptr;  // head_dim, as of position 0
  const float* value_mean = nullptr;
  float key_unit = 0, value_unit = 0;
};

// Layout of a group of 32 tokens of one head: key codes, value codes, 32 key scales, 32 value
// scales. Codes stand as in code_place(); a scale is a byte, 0 or unit 2^(e - 4) (1 + m / 32) with
// e in its upper 3 bits and m in its lower 5: within 1.6 %, an eighth of what 3 bits cost.
struct GhostFormat {
  int key_bits = 0;    // 0 (no ghosts), 1, 2, 3, 4
  int value_bits = 0;  // 0 (values are taken to be their mean), 1, 2, 4
  int head_dim = 0;

  THAW_HOST_DEVICE bool present() const { return key_bits > 0; }
  THAW_HOST_DEVICE int padded_dim() const { return (head_dim + 15) / 16 * 16; }
  THAW_HOST_DEVICE std::size_t key_bytes() const {
    return std::size_t{4} * padded_dim() * key_bits;
  }
  THAW_HOST_DEVICE std::size_t value_bytes() const {
    return std::size_t{4} * padded_dim() * value_bits;
  }
  THAW_HOST_DEVICE std::size_t scale_bytes() const { return kGhostGroup; }
  THAW_HOST_DEVICE std::size_t group_bytes() const {
    return present() ? key_bytes() + value_bytes() + scale_bytes() * (value_bits > 0 ? 2 : 1) : 0;
  }
  bool operator==(const GhostFormat&) const = default;
};

// The ghosts of one layer, and what they are centred on.
struct GhostView {
  GhostFormat format;
  std::span<const std::byte* const> pages;  // page_groups groups a head each
  std::size_t offset = 0;                   // bytes from a page's start to the layer's head 0
  int page_groups = 1;
  std::span<const GhostCentre> centres;  // per KV head; empty while there are none
  const GhostRope* rope = nullptr;       // how centres turn

  bool present() const { return format.present() && !centres.empty(); }
  const std::byte* group(int head, int index) const {
    return pages[static_cast<std::size_t>(index / page_groups)] + offset +
           (static_cast<std::size_t>(head) * page_groups + index % page_groups) *
               format.group_bytes();
  }
};

// Writes the ghost of token i (0 .. 31) of a group, over whatever stood there. k, v: one head;
// centre.key_mean turned to the token's position. carry: head_dim floats, what rounding lost of the
// values of the tokens before i in its chain; then of i, too.
void write_ghost(std::byte* group, const GhostFormat& format, int i, const float* k, const float* v,
                 const GhostCentre& centre, float* carry);
// The same of `carry`, where the ghost is written already.
void carry_ghost(float* carry, const std::byte* group, const GhostFormat& format, int i,
                 const float* v, const GhostCentre& centre);

// What a ghost stands for, before the mean is added: head_dim floats in rotated space. The
// definition that the kernels below are tested against.
void read_ghost_key(float* out, const std::byte* group, const GhostFormat& format, int i,
                    const GhostCentre& centre);
void read_ghost_value(float* out, const std::byte* group, const GhostFormat& format, int i,
                      const GhostCentre& centre);

// A query of one head, ready for ghosts: rotated and rounded to 8 bits, which adds under 1 % to a
// ghost's own error.
struct GhostQuery {
  static constexpr int kMaxDim = 256;
  std::uint32_t pairs[kMaxDim / 2];  // two int8 in the low half, the same again in the high half
  float scale = 0;                   // of the codes
  float offset = 0;                  // -(2^(b-1) - 1/2) * sum of the codes
  float noise = 0;  // standard deviation of scores over key_unit, of a token with usual key scales
  float along[kMaxDim / 2], across[kMaxDim / 2];  // what q.mu is made of, see GhostRope::prepare()
};
// q: head_dim, already divided by sqrt(head_dim); key_mean: of its KV head, at position 0.
void prepare_query(GhostQuery& out, const float* q, const float* key_mean, const GhostRope& rope,
                   const GhostFormat& format);

// scores[h * stride + j] += q_h . (k_j - mu_j) for the 32 tokens of a group, h < n_queries.
void score_ghosts(float* scores, std::size_t stride, const GhostQuery* q, int n_queries,
                  const std::byte* group, const GhostFormat& format, float key_unit);

// out[h * stride + i] += sum over j of weights[h * weight_stride + j] v_j[i], in rotated space,
// padded_dim() floats a query. Weights are >= 0; those of a group are rounded to 8 bits of the
// largest.
void sum_ghosts(float* out, std::size_t stride, const float* weights, std::size_t weight_stride,
                int n_queries, const std::byte* group, const GhostFormat& format, float value_unit);

// out[i] = what scale byte i stands for, over its unit; 32 of them.
void widen_scales(float* out, const std::byte* scales);

}  // namespace thaw
