// Exact attention of a few query rows over a list of stored rows: the inner part of prefill, of
// decode over every token, over hot rows, and over recalled ones.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/softmax_state.h"
#include "kvstore/kvstore.h"

namespace thaw {

inline constexpr int kExactBlock = 128;  // rows whose keys and values are unpacked at a time

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

// head_dim with the zeros that fill its last tile.
int padded_dim(int head_dim);

// Query rows of one KV head, and the range of rows that they attend.
struct ExactWork {
  const float* q = nullptr;  // row r, head g of the group: q + r * q_stride + g * head_dim
  std::int64_t q_stride = 0;
  int n_tokens = 1;  // query tokens; rows are these times the group, token-major
  int group = 1;     // query heads of the KV head

  const KvRows* rows = nullptr;
  const std::int32_t* list = nullptr;  // null: rows begin .. end; else rows list[begin .. end)
  int head = 0;                        // KV head, as `rows` counts them
  int begin = 0, end = 0;
  int first_visible = 0;  // query token t sees entries below first_visible + t

  float* scores = nullptr;  // where raw scores go, for query tokens from first_scored on; or null
  std::int64_t score_token_stride = 0, score_head_stride = 0;
  int first_scored = 0;
};

// What a thread needs for one ExactWork; kept between calls.
struct ExactScratch {
  std::vector<float> q, keys, keys_t, values, scores;
  void reserve(int n_rows, int head_dim);
};

// states: n_tokens * group; o: as many x padded_dim, zeroed: not yet divided by l.
void attend_exactly(SoftmaxState* states, float* o, const ExactWork& work, KvType type,
                    int head_dim, ExactScratch& scratch);

// Adds n scores to a state: scores become e^(s - m), 0 those of -infinity, and o (dim) is rescaled
// to the new maximum.
void absorb_scores(SoftmaxState& state, float* o, float* scores, int n, int dim);

}  // namespace thaw
