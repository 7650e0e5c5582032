#include "kvstore/residency_seed_cuda.cuh"
#include "kvstore/residency_wake_cuda.cuh"

namespace thaw {
namespace {

// What every kernel here is given.
struct LaneCall {
  DeviceLanes lanes;
  const DeviceMoment* now;
  const std::int32_t* bounds;  // a layer

  __device__ LaneBlock block(int lane, LaneShared& shared) const {
    return LaneBlock(lanes, lane, *now, bounds[lane / lanes.lanes_per_layer], shared,
                     dynamic_shared<std::uint32_t>());
  }
};

// Computes  scores, entropy, and of asr tau, from statistics of every token
// Grid      lanes of the layer
// Block     kLaneThreads
// Shared    a bit a row of a lane, as all kernels here
// Bytes     reads the statistics, reads and writes the scores
__global__ void learn_lanes(LaneCall call, int layer, DeviceStats stats, int n_rows) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane_of_layer = static_cast<int>(blockIdx.x);
  LaneBlock block = call.block(layer * call.lanes.lanes_per_layer + lane_of_layer, shared);
  block.learn(stats, lane_of_layer, n_rows);
  block.store();  // no row is touched: a graph may be older than where they are now
}

// Computes  which tokens should be hot as decoding begins, and how many
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     reads the scores, up to ten times when more tokens qualify than fit
__global__ void choose_rows(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  call.block(static_cast<int>(blockIdx.x), shared).choose();
}

// Computes  rows of the chosen tokens, and of no others; what moved is copied
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     reads the mask, hits and timers of the chosen; copies rows that move
__global__ void seed_lanes(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.seed();
  block.finish();
}

// Computes  rows without those of the lowest rank, so that one more fits the bound
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     reads the scores of hot tokens up to eight times; copies rows that move
__global__ void make_room_in_lanes(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.make_room(1);
  block.finish();
}

// Computes  hot copies of tokens that became hot, and a row for the newest token
// Grid      lanes
// Block     kLaneThreads; a warp copies a row
// Shared    as above
// Bytes     reads those tokens' keys and values in the cold tier, writes as many
__global__ void place_rows(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.place();
  block.store();  // every kernel that moves rows has copied them
}

// Computes  who is hot after a step, from what attention reported; what moved is copied
// Grid      lanes of all layers
// Block     kLaneThreads
// Shared    as above
// Bytes     reads statistics, reads and writes scores, hits and timers of hot and recalled tokens
__global__ void settle_lanes(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.settle();
  block.finish();
}

// Computes  lanes without rows of the tokens from `position` on
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     copies rows that move
__global__ void drop_rows(LaneCall call, int position) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.drop(position);
  block.finish();
}

// Computes  lanes without the tokens from `position` on, with what must be hot then
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     writes the state of tokens position to length; copies rows that move
__global__ void cut_lanes(LaneCall call, int position, int length) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.cut(position, length);
  block.finish();
}

// Computes  whom a rung of recovery wakes, and how many rows there will be
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     reads the stamps twice, or who sleeps
__global__ void choose_woken_rows(LaneCall call, Rung rung) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  call.block(static_cast<int>(blockIdx.x), shared).choose_woken(rung);
}

// Computes  rows for those, and timers
// Grid      lanes
// Block     kLaneThreads; one thread does all: it is rare
// Shared    as above
// Bytes     reads who was chosen and who sleeps, writes rows and timers
__global__ void wake_lanes(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  LaneBlock block = call.block(static_cast<int>(blockIdx.x), shared);
  block.wake_chosen();
  block.store();
}

// Computes  hits and timers of 0, and sleepers with one step to go
// Grid      lanes
// Block     kLaneThreads
// Shared    as above
// Bytes     writes hits and timers of every token
__global__ void forget_history(LaneCall call) {
  __shared__ LaneShared shared;
  wait_for_previous_kernel();
  let_next_kernel_start();
  call.block(static_cast<int>(blockIdx.x), shared).forget();
}

template <class... Params, class... Args>
void launch_lanes(const LaneWork& work, const char* name, void (*kernel)(LaneCall, Params...),
                  int n_lanes, Args... args) {
  launch_overlapping(name, kernel, static_cast<unsigned>(n_lanes), kLaneThreads,
                     static_cast<std::size_t>(work.lanes.room / 8), work.stream,
                     LaneCall{work.lanes, work.now, work.bounds}, args...);
}

}  // namespace

void LaneWork::learn(int layer, const DeviceStats& stats, int n_rows) const {
  launch_lanes(*this, "learn", learn_lanes, lanes.lanes_per_layer, layer, stats, n_rows);
}
void LaneWork::choose() const { launch_lanes(*this, "choose", choose_rows, n_lanes); }
void LaneWork::seed() const { launch_lanes(*this, "seed", seed_lanes, n_lanes); }
void LaneWork::make_room() const { launch_lanes(*this, "make room", make_room_in_lanes, n_lanes); }
void LaneWork::place() const { launch_lanes(*this, "place", place_rows, n_lanes); }
void LaneWork::settle() const { launch_lanes(*this, "settle", settle_lanes, n_lanes); }
void LaneWork::drop(int position) const {
  launch_lanes(*this, "drop", drop_rows, n_lanes, position);
}
void LaneWork::cut(int position, int length) const {
  launch_lanes(*this, "cut", cut_lanes, n_lanes, position, length);
}
void LaneWork::choose_woken(Rung rung) const {
  launch_lanes(*this, "choose woken", choose_woken_rows, n_lanes, rung);
}
void LaneWork::wake() const { launch_lanes(*this, "wake", wake_lanes, n_lanes); }
void LaneWork::forget() const { launch_lanes(*this, "forget", forget_history, n_lanes); }

}  // namespace thaw
