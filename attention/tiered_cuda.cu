#include <algorithm>
#include <cmath>

#include "attention/answers_cuda.cuh"
#include "attention/finish_cuda.cuh"
#include "attention/tiered_cuda.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kBlocksPerMultiprocessor = 4;  // that ghosts aim at

dim3 grid_of(const TieredProblem& p, int n_splits) {
  return dim3(static_cast<unsigned>(p.n_kv_heads), static_cast<unsigned>(n_splits),
              static_cast<unsigned>(p.n_chunks()));
}

std::size_t words(int n) { return static_cast<std::size_t>(n) * 4; }

void check_tiers(const KvView& kv) {
  const DeviceHot& hot = kv.device->hot;
  const GhostFormat& f = kv.device->ghosts.format;
  require(hot.lane_heads >= 1 && hot.n_lanes * hot.lane_heads == kv.n_kv_heads,
          "attend: lanes: expected ", kv.n_kv_heads, " heads in all, found ", hot.n_lanes, " x ",
          hot.lane_heads);
  require(hot.mask_words * kGhostGroup >= kv.kv_len, "attend: hot mask: expected room for ",
          kv.kv_len, " tokens, found ", hot.mask_words * kGhostGroup);
  if (!f.present()) return;
  require(f.head_dim == kv.head_dim, "attend: ghosts: expected head_dim ", kv.head_dim, ", found ",
          f.head_dim);
  require(f.key_bits <= 4 && (f.value_bits <= 2 || f.value_bits == 4) && f.value_bits >= 0,
          "attend: ghosts: expected keys of 1 to 4 bits and values of 0, 1, 2 or 4, found ",
          f.key_bits, " and ", f.value_bits);
}

}  // namespace

void CudaTieredDecode::take_memory(TieredProblem& p, const KvView& kv) {
  const DeviceHot& hot = p.kv.hot;
  const GhostFormat& f = p.kv.ghosts.format;
  const int n_blocks = kBlocksPerMultiprocessor * n_multiprocessors_;
  const int n_splits = std::max(1, n_blocks / (p.n_kv_heads * p.n_chunks()));
  p.hot = {nullptr, std::min(n_splits, kMaxRowSplits), kv.head_dim};
  p.scored = {nullptr, std::min(n_splits, kMaxGhostSplits), 0};
  p.recalled = {nullptr, p.scored.n_splits, kv.head_dim};
  p.answered = {nullptr, p.scored.n_splits, f.value_bits > 0 ? f.padded_dim() : 0};
  constexpr int kSpanWords = GhostRope::kSpan / kGhostGroup;
  const int n_spans = (hot.mask_words + kSpanWords - 1) / kSpanWords;
  p.ghost_stride = n_spans * GhostRope::kSpan;
  const int most_spans = (n_spans + p.scored.n_splits - 1) / p.scored.n_splits;
  p.recalled_stride = std::min(p.kv.stats.recalled_room, most_spans * GhostRope::kSpan);

  const bool ghosts = f.present();
  if (ghosts) p.n_teams = AnswerLayout::n_teams(f);
  const std::int64_t heads = p.n_heads;
  const std::int64_t lists = std::int64_t{p.n_kv_heads} * p.n_chunks() * p.scored.n_splits;
  const std::int64_t sizes[] = {
      heads * hot.room,
      p.hot.size(p.n_heads),
      ghosts ? heads * p.ghost_stride : 0,
      ghosts ? p.scored.size(p.n_heads) : 0,
      ghosts ? p.answered.size(p.n_heads) : 0,
      ghosts ? p.recalled.size(p.n_heads) : 0,
      ghosts ? heads * p.scored.n_splits * p.recalled_stride : 0,
      ghosts ? lists * p.recalled_stride : 0,
      ghosts ? lists : 0,
      ghosts ? heads : 0,
  };
  float* at[std::size(sizes)];
  std::int64_t all = 0;
  for (const std::int64_t n : sizes) all += (n + 3) / 4 * 4;
  at[0] = numbers_.reserve(all);
  for (std::size_t i = 1; i < std::size(sizes); ++i) at[i] = at[i - 1] + (sizes[i - 1] + 3) / 4 * 4;
  p.hot_scores = at[0], p.hot.all = at[1];
  p.ghost_scores = at[2], p.scored.all = at[3], p.answered.all = at[4];
  p.recalled.all = at[5], p.recalled_scores = at[6];
  p.recalled_tokens = reinterpret_cast<std::int32_t*>(at[7]);
  p.n_recalled = reinterpret_cast<std::int32_t*>(at[8]);
  p.ghost_noise = at[9];
}

void CudaTieredDecode::attend_tiers(const TieredProblem& p, KvType type, const GhostFormat& f) {
  const int rows = RowTileLayout(p.head_dim).total;
  const auto score = [&](auto kernel) {
    const int ghosts = GhostQueryLayout(f, p.kv.ghosts.rope.n_fast).total;
    launch_overlapping("score_tiers", kernel, grid_of(p, p.hot.n_splits + p.scored.n_splits),
                       kTiledThreads, words(std::max(rows, ghosts)), stream_, p);
  };
  const auto answer = [&](auto kernel) {
    const int ghosts = AnswerLayout(f, p.lane_queries()).total;
    launch_overlapping("answer_frozen", kernel, grid_of(p, p.scored.n_splits), kTiledThreads,
                       words(std::max(rows, ghosts)), stream_, p);
  };
  with_kv_type(type, [&](auto known) {
    constexpr KvType kType = decltype(known)::value;
    if (f.key_bits == 1) score(score_tiers<kType, 1>);
    if (f.key_bits == 2) score(score_tiers<kType, 2>);
    if (f.key_bits == 3) score(score_tiers<kType, 3>);
    if (f.key_bits == 4) score(score_tiers<kType, 4>);
    if (f.value_bits == 0) answer(answer_frozen<kType, 0>);
    if (f.value_bits == 1) answer(answer_frozen<kType, 1>);
    if (f.value_bits == 2) answer(answer_frozen<kType, 2>);
    if (f.value_bits == 4) answer(answer_frozen<kType, 4>);
  });
}

void CudaTieredDecode::finish(const TieredProblem& p) {
  const int n_blocks = p.n_heads + p.n_lanes() * kStatsBlocks;
  launch_overlapping("finish_decode", finish_decode, static_cast<unsigned>(n_blocks), kTiledThreads,
                     words(FinishLayout(p).total), stream_, p);
}

void CudaTieredDecode::attend(float* o, const float* q, int n_heads, const KvView& kv) {
  check_tiers(kv);
  TieredProblem p = {};
  p.o = o, p.q = q, p.kv = *kv.device;
  p.n_rows = 1, p.n_heads = n_heads, p.group = n_heads / kv.n_kv_heads;
  p.head_dim = kv.head_dim, p.n_kv_heads = kv.n_kv_heads;
  p.scale = score_scale(kv.head_dim);
  take_memory(p, kv);
  if (p.kv.ghosts.format.present())
    attend_tiers(p, kv.type, p.kv.ghosts.format);
  else
    with_kv_type(kv.type, [&](auto known) {
      launch_overlapping("attend_hot", attend_hot<decltype(known)::value>,
                         grid_of(p, p.hot.n_splits), kTiledThreads,
                         words(RowTileLayout(p.head_dim).total), stream_, p);
    });
  finish(p);
}

}  // namespace thaw
