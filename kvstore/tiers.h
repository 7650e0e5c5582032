// Where exact tokens and ghosts stand: pages of kTierTokens tokens, all layers together, taken as
// the context grows.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "device/thread_pool.h"
#include "kvstore/ghost.h"
#include "kvstore/kvstore.h"
#include "kvstore/pages.h"

namespace thaw {

class ColdTier {
 public:
  // hashed: keep a hash of each key and value, for check().
  ColdTier(PageSource& source, const KvShape& shape, bool hashed);

  void reserve(int n_tokens);  // throws Error, with nothing lost, when memory is refused
  int room() const { return static_cast<int>(pages_.size()) * kTierTokens; }  // tokens
  // k, v: n_kv_heads x head_dim.
  void write(int layer, int token, const float* k, const float* v);
  void wrote(int layer, int token);  // the same was written by somebody else, through rows()
  KvRows rows(int layer, int n_rows) const;
  std::int64_t bytes() const;
  // Throws Error when a bit of tokens [first, last) has changed since write().
  void check(int first, int last) const;

 private:
  std::uint64_t hash(int layer, int head, int token) const;

  PageSource& source_;
  KvShape shape_;
  std::size_t kv_row_;  // bytes of one key of one head
  bool hashed_;
  std::vector<std::byte*> pages_;
  std::vector<std::uint64_t> hashes_;  // token x layer x head
};

class GhostTier {
 public:
  // pool: who writes; null: the caller alone.
  GhostTier(PageSource& source, const KvShape& shape, const GhostFormat& format, int centre_tokens,
            ThreadPool* pool = nullptr);

  int centre_tokens() const { return centre_tokens_; }
  bool has_centre(int layer) const { return has_centre_[static_cast<std::size_t>(layer)] != 0; }
  void reserve(int n_tokens);
  // Tokens [first, first + n) are in `cold` now: writes their ghosts; once the first centre_tokens
  // are there, fixes the centre by them and catches up.
  void write(int layer, const KvRows& cold, int first, int n);
  // The same of one token in every layer at once; all have a centre.
  void write_newest(const ColdTier& cold, int token);
  void cut(int position);  // without its first tokens a layer has no centre
  GhostView view(int layer) const;
  std::int64_t bytes() const;
  std::int64_t bookkeeping_bytes() const;
  // Throws Error when a ghost of tokens [first, last) is not that of its token.
  void check(int layer, const KvRows& cold, int first, int last) const;

 private:
  void fix_centre(int layer, const KvRows& cold);
  float fix_mean(float* mean, const KvRows& cold, int head, bool value) const;
  void write_some(int layer, int head, const KvRows& cold, int first, int last, bool is_whole);
  void write_one(std::byte* group, int layer, int head, const KvRows& cold, int token,
                 float* carry) const;
  void rebuild_carry(float* carry, int layer, int head, const KvRows& cold, int token) const;
  std::size_t page_bytes() const;

  template <class Body>
  void run(std::int64_t n_tasks, const Body& body) {
    if (pool_) return pool_->run(n_tasks, [&](std::int64_t task, int) { body(task); });
    for (std::int64_t task = 0; task < n_tasks; ++task) body(task);
  }

  PageSource& source_;
  KvShape shape_;
  GhostFormat format_;
  int centre_tokens_;
  GhostRope rope_;
  std::vector<std::byte*> pages_;
  std::vector<float> means_;          // layer x head x {key, value} x head_dim
  std::vector<GhostCentre> centres_;  // layer x head; they point into means_
  std::vector<char> has_centre_;      // per layer
  std::vector<float> carries_;        // layer x head x head_dim, see write_ghost()
  std::vector<int> carried_to_;       // per layer: the token that its carries are for
  ThreadPool* pool_;
};

}  // namespace thaw
