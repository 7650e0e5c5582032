#include <algorithm>
#include <cmath>

#include "attention/answers_cuda.cuh"
#include "attention/finish_cuda.cuh"
#include "attention/tiered_cuda.h"
#include "device/error.h"

namespace thaw {
namespace {

constexpr int kBlocksPerMultiprocessor = 3;  // that ghosts aim at

int n_chunks(const TieredProblem& p) { return (p.group + kTiledQueries - 1) / kTiledQueries; }

dim3 grid_of(const TieredProblem& p, int n_splits) {
  return dim3(static_cast<unsigned>(n_splits), static_cast<unsigned>(p.n_kv_heads),
              static_cast<unsigned>(n_chunks(p)));
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
  const int n_splits = std::max(1, n_blocks / (p.n_kv_heads * n_chunks(p)));
  const int n_row_splits = std::min(n_splits, kMaxRowSplits);
  const int n_ghost_splits = std::min(n_splits, kMaxGhostSplits);
  const std::int64_t heads = p.n_heads;
  p.hot = {nullptr, hot.room, {nullptr, n_row_splits, kv.head_dim}};
  p.recalled = {nullptr, p.kv.stats.recalled_room, p.hot.parts};
  p.scored = {nullptr, n_ghost_splits, 0};
  p.answered = {nullptr, n_ghost_splits, f.value_bits > 0 ? f.padded_dim() : 0};
  constexpr int kSpanWords = GhostRope::kSpan / kGhostGroup;
  p.ghost_stride = (hot.mask_words + kSpanWords - 1) / kSpanWords * GhostRope::kSpan;

  const bool ghosts = f.present();
  const std::int64_t sizes[] = {
      heads * p.hot.stride,
      p.hot.parts.size(p.n_heads),
      ghosts ? heads * p.ghost_stride : 0,
      ghosts ? p.scored.size(p.n_heads) : 0,
      ghosts ? p.answered.size(p.n_heads) : 0,
      ghosts ? heads * p.recalled.stride : 0,
      ghosts ? p.recalled.parts.size(p.n_heads) : 0,
      ghosts ? std::int64_t{hot.n_lanes} * (p.ghost_stride / kGhostGroup) : 0,
  };
  float* at[std::size(sizes)];
  std::int64_t all = 0;
  for (const std::int64_t n : sizes) all += (n + 3) / 4 * 4;
  at[0] = numbers_.reserve(all);
  for (std::size_t i = 1; i < std::size(sizes); ++i) at[i] = at[i - 1] + (sizes[i - 1] + 3) / 4 * 4;
  p.hot.scores = at[0], p.hot.parts.all = at[1];
  p.ghost_scores = at[2], p.scored.all = at[3], p.answered.all = at[4];
  p.recalled.scores = at[5], p.recalled.parts.all = at[6];
  p.recalled_mask = reinterpret_cast<std::uint32_t*>(at[7]);
  p.n_gathered = counts_.reserve_zeros(hot.n_lanes, stream_);
}

void CudaTieredDecode::attend_rows_of(const TieredProblem& p, KvType type, bool recalled) {
  const int n_splits = recalled ? p.recalled.parts.n_splits : p.hot.parts.n_splits;
  with_kv_type(type, [&](auto known) {
    launch_overlapping(recalled ? "attend_recalled" : "attend_hot",
                       attend_rows<decltype(known)::value>, grid_of(p, n_splits), kTiledThreads,
                       words(RowTileLayout(p.head_dim).total), stream_, p, recalled);
  });
}

void CudaTieredDecode::ask_ghosts(const TieredProblem& p, const GhostFormat& f) {
  const int n_splits = p.scored.n_splits;
  const auto score = [&](auto kernel) {
    launch_overlapping("score_ghosts", kernel, grid_of(p, n_splits), kTiledThreads,
                       words(GhostQueryLayout(f, p.kv.ghosts.rope.n_fast).total), stream_, p);
  };
  const auto answer = [&](auto kernel) {
    launch_overlapping("answer_ghosts", kernel, grid_of(p, n_splits), kTiledThreads,
                       words(AnswerLayout(f, p.kv.hot.lane_heads * p.group).total), stream_, p);
  };
  if (f.key_bits == 1) score(score_ghosts<1>);
  if (f.key_bits == 2) score(score_ghosts<2>);
  if (f.key_bits == 3) score(score_ghosts<3>);
  if (f.key_bits == 4) score(score_ghosts<4>);
  if (f.value_bits == 0) answer(answer_ghosts<0>);
  if (f.value_bits == 1) answer(answer_ghosts<1>);
  if (f.value_bits == 2) answer(answer_ghosts<2>);
  if (f.value_bits == 4) answer(answer_ghosts<4>);
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
  attend_rows_of(p, kv.type, false);
  if (p.kv.ghosts.format.present()) {
    ask_ghosts(p, p.kv.ghosts.format);
    attend_rows_of(p, kv.type, true);
  }
  finish(p);
}

}  // namespace thaw
