// The memory of lanes on the device: hot rows in pages that lanes borrow, what is kept a row, a
// token and a lane, and the buffers that attention writes. The host says how much, between steps;
// the kernels of kvstore/residency_cuda.h say who.
#pragma once

#include <span>
#include <vector>

#include "kvstore/kvstore.h"
#include "kvstore/lane.h"
#include "kvstore/pages_cuda.h"
#include "kvstore/residency_cuda.h"

namespace thaw {

// A lane as it stands, for those who check it.
struct LaneSnapshot {
  std::vector<std::int32_t> tokens, from;  // a row
  std::vector<std::uint32_t> mask;         // by token
  std::vector<float> score;                // a token, and so the next three
  std::vector<std::int32_t> stamp;
  std::vector<std::uint16_t> hits, timer;
  std::vector<Sleeper> asleep;
  std::vector<std::byte> rows;  // head x row x {key, value}; of rows in kInCold unspecified
};

class CudaLanes {
 public:
  // cold: of layer 0. max_pages: the promise. Keeps references.
  CudaLanes(PageSource& source, const KvShape& shape, const PolicyParams& params, int lane_heads,
            const DeviceRows& cold, std::int64_t max_pages, const Stream& stream);

  int n_lanes() const { return n_lanes_; }
  int per_layer() const { return lanes_.lanes_per_layer; }
  const LaneReport& report(int lane) const { return reports_.data()[lane]; }
  int most_recalled(float epsilon) const;  // tokens of a step

  // Room for the state of that many tokens; for statistics of all of them; for that many rows in
  // every lane. Throw Error, with nothing changed, when memory is refused. What grows moves:
  // hot() and the statistics are others then.
  void reserve_tokens(int n_tokens);
  void reserve_statistics(int n_tokens);
  void reserve_rows(int n_rows);
  // Pages for rows[i] rows of lane i, each i: reserve_pages() takes what is missing, and throws
  // Error, with nothing changed, when memory is refused. share_pages() then gives every lane as
  // many, and no more, for work that is queued later; what a lane gives back must hold nothing by
  // then, and the stream must have been waited for since the last call.
  void reserve_pages(std::span<const int> rows);
  void share_pages(std::span<const int> rows);

  LaneWork work(const DeviceMoment* now, const std::int32_t* bounds) const {
    return {lanes_, n_lanes_, now, bounds, stream_};
  }
  DeviceHot hot(int layer) const;
  DeviceStats decode_stats(int layer) const;
  DeviceStats exact_stats() const;  // of one layer at a time
  const DeviceLanes& all() const { return lanes_; }

  std::int64_t hot_bytes() const { return arena_.bytes(); }
  std::int64_t bookkeeping_bytes() const;
  // These two wait for the stream.
  std::vector<float> scores(int kv_len) const;  // lane x kv_len
  LaneSnapshot snapshot(int lane, int kv_len) const;
  // Throws Error when pages in use and free ones are not all there are.
  void check_pages() const;

 private:
  void make_statistics();
  void read_rows(LaneSnapshot& to, int lane) const;

  const KvShape& shape_;
  const Stream& stream_;
  int n_lanes_;
  HotArena arena_;
  PageTable token_pages_;
  std::vector<std::vector<std::byte*>> pages_;  // a lane
  DeviceBuffer<const std::byte*> table_;        // of the pages: lane x lane_pages
  PinnedBuffer<const std::byte*> host_table_;   // the same
  DeviceBuffer<std::int32_t> n_rows_, tokens_, from_, waking_, n_recalled_, recalled_;
  DeviceBuffer<std::uint32_t> masks_;  // hot, then chosen
  DeviceBuffer<Sleeper> asleep_;
  DeviceBuffer<LaneState> states_;
  PinnedBuffer<LaneReport> reports_;
  DeviceBuffer<float> probability_, relevance_, entropy_, ghost_mass_, recalled_probability_;
  DeviceBuffer<float> exact_probability_, exact_relevance_, exact_entropy_;
  DeviceLanes lanes_ = {};
  DeviceStats decode_, exact_;
};

}  // namespace thaw
