#include "kvstore/tiers.h"

#include <algorithm>

#include "device/error.h"
#include "kvstore/ghost_code.h"
#include "kvstore/row.h"

namespace thaw {

ColdTier::ColdTier(PageSource& source, const KvShape& shape, bool hashed)
    : source_(source),
      shape_(shape),
      kv_row_(kv_row_bytes(shape.type, shape.head_dim)),
      hashed_(hashed) {}

std::int64_t ColdTier::bytes() const {
  return std::ssize(pages_) * kTierTokens * shape_.bytes_per_token();
}

void ColdTier::reserve(int n_tokens) {
  const auto pages = static_cast<std::size_t>(tier_pages(n_tokens));
  pages_.reserve(pages);
  if (hashed_)
    hashes_.resize(pages * kTierTokens * static_cast<std::size_t>(shape_.n_layers) *
                   shape_.n_kv_heads);
  while (pages_.size() < pages)
    pages_.push_back(source_.take(kTierTokens * static_cast<std::size_t>(shape_.bytes_per_token()),
                                  "the cold tier"));
}

// A page: layer, then head, then the keys of its tokens, then their values.
KvRows ColdTier::rows(int layer, int n_rows) const {
  KvRows rows;
  rows.pages = {pages_.data(), pages_.size()};
  rows.row_bytes = kv_row_;
  rows.value_offset = kTierTokens * kv_row_;
  rows.head_stride = 2 * kTierTokens * kv_row_;
  rows.offset = static_cast<std::size_t>(layer) * shape_.n_kv_heads * rows.head_stride;
  rows.page_shift = kTierShift;
  rows.n_rows = n_rows;
  return rows;
}

void ColdTier::write(int layer, int token, const float* k, const float* v) {
  const KvRows to = rows(layer, token + 1);
  for (int head = 0; head < shape_.n_kv_heads; ++head) {
    std::byte* key = const_cast<std::byte*>(to.key(head, token));
    store_row(key, k + head * shape_.head_dim, shape_.head_dim, shape_.type);
    store_row(key + to.value_offset, v + head * shape_.head_dim, shape_.head_dim, shape_.type);
  }
  wrote(layer, token);
}

void ColdTier::wrote(int layer, int token) {
  if (!hashed_) return;
  const std::size_t first =
      (static_cast<std::size_t>(token) * shape_.n_layers + layer) * shape_.n_kv_heads;
  for (int head = 0; head < shape_.n_kv_heads; ++head)
    hashes_[first + head] = hash(layer, head, token);
}

// FNV-1a of the bytes.
std::uint64_t ColdTier::hash(int layer, int head, int token) const {
  const KvRows from = rows(layer, token + 1);
  std::uint64_t h = 0xcbf29ce484222325;
  for (const std::byte* row : {from.key(head, token), from.value(head, token)})
    for (std::size_t i = 0; i < kv_row_; ++i)
      h = (h ^ std::to_integer<std::uint64_t>(row[i])) * 0x100000001b3;
  return h;
}

void ColdTier::check(int first, int last) const {
  std::size_t at = static_cast<std::size_t>(first) * shape_.n_layers * shape_.n_kv_heads;
  for (int token = first; hashed_ && token < last; ++token)
    for (int layer = 0; layer < shape_.n_layers; ++layer)
      for (int head = 0; head < shape_.n_kv_heads; ++head)
        require(hashes_[at++] == hash(layer, head, token), "KV check: layer ", layer, ", head ",
                head, ": the cold copy of token ", token, " is not what was appended");
}

GhostTier::GhostTier(PageSource& source, const KvShape& shape, const GhostFormat& format,
                     int centre_tokens, ThreadPool* pool)
    : source_(source),
      shape_(shape),
      format_(format),
      centre_tokens_(centre_tokens),
      rope_(shape.rope, shape.head_dim),
      means_(format.present() ? std::size_t{2} * shape.n_layers * shape.n_kv_heads * shape.head_dim
                              : 0),
      centres_(static_cast<std::size_t>(shape.n_layers) * shape.n_kv_heads),
      has_centre_(static_cast<std::size_t>(shape.n_layers)),
      carries_(means_.size() / 2),
      carried_to_(static_cast<std::size_t>(shape.n_layers)),
      pool_(pool) {}

std::size_t GhostTier::page_bytes() const {
  return static_cast<std::size_t>(shape_.n_layers) * shape_.n_kv_heads *
         (kTierTokens / kGhostGroup) * format_.group_bytes();
}

std::int64_t GhostTier::bytes() const {
  return std::ssize(pages_) * static_cast<std::int64_t>(page_bytes());
}

std::int64_t GhostTier::bookkeeping_bytes() const {
  return rope_.bytes() + std::ssize(carries_) * static_cast<std::int64_t>(sizeof(float));
}

void GhostTier::reserve(int n_tokens) {
  if (!format_.present()) return;
  const auto pages = static_cast<std::size_t>(tier_pages(n_tokens));
  pages_.reserve(pages);
  rope_.grow(n_tokens);
  while (pages_.size() < pages) pages_.push_back(source_.take(page_bytes(), "ghosts"));
}

GhostView GhostTier::view(int layer) const {
  GhostView view;
  view.format = format_;
  if (!format_.present() || !has_centre_[static_cast<std::size_t>(layer)]) return view;
  const std::size_t heads = static_cast<std::size_t>(shape_.n_kv_heads);
  view.pages = {pages_.data(), pages_.size()};
  view.page_groups = kTierTokens / kGhostGroup;
  view.offset = static_cast<std::size_t>(layer) * heads * view.page_groups * format_.group_bytes();
  view.rope = &rope_;
  view.centres = std::span(centres_).subspan(static_cast<std::size_t>(layer) * heads, heads);
  return view;
}

// mean: of the first tokens' keys, turned back to position 0, or values of a head. Returns the root
// mean square of what is left of them without it.
float GhostTier::fix_mean(float* mean, const KvRows& cold, int head, bool value) const {
  const int dim = shape_.head_dim;
  std::vector<float> row(static_cast<std::size_t>(dim));
  const auto read = [&](int t) {
    load_row(row.data(), value ? cold.value(head, t) : cold.key(head, t), dim, shape_.type);
    if (!value) rope_.turn_back(row.data(), row.data(), t);
  };
  std::fill_n(mean, dim, 0.0f);
  for (int t = 0; t < centre_tokens_; ++t) {
    read(t);
    for (int i = 0; i < dim; ++i) mean[i] += row[i] / static_cast<float>(centre_tokens_);
  }
  std::vector<double> squares(static_cast<std::size_t>(dim));  // a dimension
  for (int t = 0; t < centre_tokens_; ++t) {
    read(t);
    for (int i = 0; i < dim; ++i) {
      const double rest = row[i] - mean[i];
      squares[i] += rest * rest;
    }
  }
  return rms_of(squares.data(), centre_tokens_, dim);
}

void GhostTier::fix_centre(int layer, const KvRows& cold) {
  for (int head = 0; head < shape_.n_kv_heads; ++head) {
    const std::size_t at = static_cast<std::size_t>(layer) * shape_.n_kv_heads + head;
    float* key_mean = means_.data() + at * 2 * shape_.head_dim;
    float* value_mean = key_mean + shape_.head_dim;
    centres_[at] = {key_mean, value_mean,
                    ghost_step(format_.key_bits) * fix_mean(key_mean, cold, head, false),
                    ghost_step(format_.value_bits) * fix_mean(value_mean, cold, head, true)};
  }
  has_centre_[static_cast<std::size_t>(layer)] = 1;
}

void GhostTier::write_one(std::byte* group, int layer, int head, const KvRows& cold, int token,
                          float* carry) const {
  const int dim = shape_.head_dim;
  float k[GhostQuery::kMaxDim], v[GhostQuery::kMaxDim], mean[GhostQuery::kMaxDim];
  load_row(k, cold.key(head, token), dim, shape_.type);
  load_row(v, cold.value(head, token), dim, shape_.type);
  GhostCentre centre = centres_[static_cast<std::size_t>(layer) * shape_.n_kv_heads + head];
  rope_.turn(mean, centre.key_mean, token);
  centre.key_mean = mean;
  write_ghost(group, format_, token % kGhostGroup, k, v, centre, carry);
}

// From the tokens before `token` of its chain and their ghosts.
void GhostTier::rebuild_carry(float* carry, int layer, int head, const KvRows& cold,
                              int token) const {
  float v[GhostQuery::kMaxDim];
  const std::size_t at = static_cast<std::size_t>(layer) * shape_.n_kv_heads + head;
  for (int t = token / kChainTokens * kChainTokens; t < token; ++t) {
    load_row(v, cold.value(head, t), shape_.head_dim, shape_.type);
    carry_ghost(carry, view(layer).group(head, t / kGhostGroup), format_, t % kGhostGroup, v,
                centres_[at]);
  }
}

// Tokens [first, last) of one group and head. is_whole: of a step that has no others, and so the
// carry that the step before left is nobody else's to write.
void GhostTier::write_some(int layer, int head, const KvRows& cold, int first, int last,
                           bool is_whole) {
  const GhostView ghosts = view(layer);
  const std::size_t at = static_cast<std::size_t>(layer) * shape_.n_kv_heads + head;
  float* left = carries_.data() + at * shape_.head_dim;
  float carry[GhostQuery::kMaxDim] = {};
  if (is_whole && carried_to_[static_cast<std::size_t>(layer)] == first)
    std::copy_n(left, shape_.head_dim, carry);
  else
    rebuild_carry(carry, layer, head, cold, first);
  for (int token = first; token < last; ++token)
    write_one(const_cast<std::byte*>(ghosts.group(head, token / kGhostGroup)), layer, head, cold,
              token, carry);
  if (last == cold.n_rows) std::copy_n(carry, shape_.head_dim, left);
}

void GhostTier::write(int layer, const KvRows& cold, int first, int n) {
  if (!format_.present() || first + n < centre_tokens_) return;
  if (!has_centre(layer)) {
    fix_centre(layer, cold);
    n += first;
    first = 0;
  }
  const int first_group = first / kGhostGroup, end = first + n;
  const int n_groups = (end - 1) / kGhostGroup - first_group + 1;
  run(shape_.n_kv_heads * n_groups, [&](std::int64_t task) {
    const int begin = (first_group + static_cast<int>(task) % n_groups) * kGhostGroup;
    write_some(layer, static_cast<int>(task) / n_groups, cold, std::max(first, begin),
               std::min(end, begin + kGhostGroup), n == 1);
  });
  carried_to_[static_cast<std::size_t>(layer)] = end;
}

void GhostTier::write_newest(const ColdTier& cold, int token) {
  const int n_heads = shape_.n_kv_heads;
  run(shape_.n_layers * n_heads, [&](std::int64_t task) {
    const int layer = static_cast<int>(task) / n_heads;
    write_some(layer, static_cast<int>(task) % n_heads, cold.rows(layer, token + 1), token,
               token + 1, true);
  });
  std::fill(carried_to_.begin(), carried_to_.end(), token + 1);
}

void GhostTier::cut(int position) {
  if (position < centre_tokens_) std::fill(has_centre_.begin(), has_centre_.end(), char{0});
}

void GhostTier::check(int layer, const KvRows& cold, int first, int last) const {
  const GhostView ghosts = view(layer);
  if (!ghosts.present()) return;
  std::vector<std::byte> group(format_.group_bytes());
  float carry[GhostQuery::kMaxDim] = {};
  for (int head = 0; head < shape_.n_kv_heads; ++head) {
    rebuild_carry(carry, layer, head, cold, first);
    for (int token = first; token < last; ++token) {
      const std::byte* is = ghosts.group(head, token / kGhostGroup);
      std::copy_n(is, group.size(), group.begin());
      write_one(group.data(), layer, head, cold, token, carry);
      require(std::equal(group.begin(), group.end(), is), "KV check: layer ", layer, ", head ",
              head, ": the ghost of token ", token, " is not that of its key and value");
    }
  }
}

}  // namespace thaw
