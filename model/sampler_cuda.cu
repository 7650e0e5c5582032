// Sampling in three kernels. Every filter keeps a prefix of the tokens in their order, most
// probable first, and a draw is a place in that order, so all there is to find are places, by count
// (top-k) or by weight (top-p, the draw). A histogram over distances from the largest logit says
// which bin each is in; the tokens of those few bins are then listed and put in order.
//
// A token's weight is its probability as a multiple of 2^-40 of the largest one: sums of integers
// are the same in any order.
#include "device/kernel.cuh"
#include "model/sampler_cuda.h"
#include "model/survey_cuda.cuh"

namespace thaw {
namespace {

constexpr int kBinsPerNat = 64, kBins = 28 * kBinsPerNat;  // e^-28 < 2^-40
constexpr int kMaxListed = 1024;
constexpr int kBorders = 4;
constexpr float kOne = 0x1p40f;
static_assert(kBins % kSampleThreads == 0);

// How to draw: SamplerOptions, and u of the draw.
struct Rules {
  float temperature;
  int top_k;
  float top_p, min_p;
  double u;

  __device__ Weight least_weight() const { return static_cast<Weight>(ceil(double{min_p} * kOne)); }
  __device__ Weight until_top_p(Weight sum) const {
    return static_cast<Weight>(ceil(double{top_p} * static_cast<double>(sum)));
  }
  __device__ Weight place(Weight sum) const {
    const auto at = static_cast<Weight>(u * static_cast<double>(sum));
    return at < sum ? at : sum - 1;
  }
};

// Bins from `first` to `last` hold a border; one that is not there has first = kBins.
struct Borders {
  int first[kBorders], last[kBorders];
  Weight total, certain;  // of all tokens; of those that no filter can reach

  __device__ bool has(int bin) const {
    bool found = false;
    for (int i = 0; i < kBorders; ++i) found |= bin >= first[i] && bin <= last[i];
    return found;
  }
};

// What is passed from kernel to kernel. Zeros at first; counts are zeros again after each draw.
struct Room {
  DeviceChoice choice;
  float largest;
  unsigned arrived, n_listed;
  Borders borders;
  unsigned count[kBins];
  Weight weight[kBins];
  unsigned count_until[kBins];  // of this bin and those before it
  Weight weight_until[kBins];
  int listed[kMaxListed];
};

// Computes  x = logits with penalties, of the tokens that were seen
// Grid      n_seen / kSampleThreads, rounded up
// Block     kSampleThreads; a token each
// Shared    none
// Bytes     reads and writes 4 for each token
__global__ void penalize(float* x, const Sampler::Seen* seen, int n_seen, int n_vocab, float repeat,
                         float presence, float frequency) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int i = static_cast<int>(blockIdx.x) * kSampleThreads + static_cast<int>(threadIdx.x);
  if (i >= n_seen || seen[i].token >= n_vocab) return;
  float& at = x[seen[i].token];
  at = penalized(at, seen[i].count, repeat, presence, frequency);
}

// Computes  the entropy of softmax(logits); of the first n_vocab choices the largest, of the lowest
//           id, and its lead; whether all are finite
// Grid      n / kSlice, rounded up; the last block to arrive joins what all have found
// Block     kSampleThreads; a thread has kPerThread logits
// Shared    that of block_reduce, and 16 bytes a warp, twice
// Bytes     reads logits, and choices where they are others
__global__ void survey_logits(Room* room, Slice* slices, const float* logits, const float* choices,
                              int n, int n_vocab) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const Slice mine = survey(logits, choices, n, n_vocab);
  if (threadIdx.x == 0) slices[blockIdx.x] = mine;
  if (!last_to_arrive(&room->arrived, gridDim.x)) return;
  const Slice all = join_slices(slices, static_cast<int>(gridDim.x));
  if (threadIdx.x != 0) return;
  const float largest = choices[id_of(all.first)];
  room->largest = largest;
  room->choice = {all.m == kInfinity ? DeviceChoice::kNotFinite : DeviceChoice::kChosen,
                  id_of(all.first), 0,
                  all.second != 0 ? largest - choices[id_of(all.second)] : kInfinity,
                  logf(all.l) - all.lx / all.l};
}

// A choice's weight, and where it has one its bin.
struct Weighed {
  Weight weight;
  int bin;

  __device__ Weighed(float x, float largest, float temperature) {
    const float distance = (largest - x) / temperature;
    weight = static_cast<Weight>(expf(-distance) * kOne);
    bin = weight > 0 ? static_cast<int>(distance * kBinsPerNat) : 0;
  }
};

// The sum of x over this thread and those before it, and below it; every thread of the block calls,
// once in a kernel for each `of_warp`.
template <class T>
__device__ T sum_until(T x, T (&of_warp)[kSampleThreads / kWarp]) {
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const T before = __shfl_up_sync(kAllLanes, x, step);
    if (lane_index() >= step) x += before;
  }
  if (lane_index() == kWarp - 1) of_warp[warp_index()] = x;
  __syncthreads();  // of_warp is complete
  for (int warp = 0; warp < warp_index(); ++warp) x += of_warp[warp];
  return x;
}

// The first bin up to which there are `least` at least; kBins if there is none.
template <class T>
__device__ int first_with(const T* until, T least) {
  int low = 0, high = kBins;
  while (low < high) {
    const int middle = (low + high) / 2;
    until[middle] < least ? low = middle + 1 : high = middle;
  }
  return low;
}

__device__ Weight until_bin(const Weight* until, int bin) {  // of the bins before it
  return bin > 0 ? until[min(bin, kBins) - 1] : 0;
}

// Where the filters and the draw fall, as far as sums over whole bins tell.
__device__ Borders find_borders(const unsigned* count_until, const Weight* until, const Rules& r) {
  Borders b;
  for (int i = 0; i < kBorders; ++i) b.first[i] = b.last[i] = kBins;
  b.total = until[kBins - 1];
  Weight least = b.total, most = b.total;  // of what top-k leaves
  if (r.top_k > 0 && static_cast<unsigned>(r.top_k) < count_until[kBins - 1]) {
    b.first[0] = b.last[0] = first_with(count_until, static_cast<unsigned>(r.top_k));
    least = until_bin(until, b.first[0]), most = until[b.first[0]];
  }
  if (r.top_p < 1) {
    b.first[1] = first_with(until, max(r.until_top_p(least), Weight{1}));
    b.last[1] = first_with(until, r.until_top_p(most));
  }
  const float reach = r.min_p > 0 ? -logf(r.min_p) * kBinsPerNat : kBins;
  if (reach < kBins - 1) {  // rounding may put it into the next bin
    b.first[2] = max(static_cast<int>(reach) - 1, 0);
    b.last[2] = static_cast<int>(reach) + 1;
  }
  const int first = min(min(b.first[0], b.first[1]), b.first[2]);
  const int last = min(min(b.last[0], b.last[1]), b.last[2]);
  b.certain = until_bin(until, first);
  b.first[3] = first_with(until, b.certain > 0 ? r.place(b.certain) + 1 : Weight{1});
  b.last[3] = first_with(until, r.place(until_bin(until, last + 1)) + 1);
  return b;
}

// Computes  the histogram of the choices' weights, its sums from the first bin on, and the borders
// Grid      n_vocab / kSlice, rounded up; the last block to arrive does all but count
// Block     kSampleThreads; a thread has kPerThread choices, then kBins / kSampleThreads bins
// Shared    12 bytes a bin
// Bytes     reads choices; adds 12 bytes for each
__global__ void count_weights(Room* room, const float* choices, int n_vocab, Rules rules) {
  __shared__ unsigned count_until[kBins], counts_of_warp[kSampleThreads / kWarp];
  __shared__ Weight weight_until[kBins], weights_of_warp[kSampleThreads / kWarp];
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (room->choice.outcome != DeviceChoice::kChosen) return;
  for (int j = 0; j < kPerThread; ++j) {
    if (index_of(j) >= n_vocab) continue;
    const Weighed w(choices[index_of(j)], room->largest, rules.temperature);
    if (w.weight == 0) continue;
    atomicAdd(&room->count[w.bin], 1u);  // all blocks count
    atomicAdd(&room->weight[w.bin], w.weight);
  }
  if (!last_to_arrive(&room->arrived, gridDim.x)) return;
  constexpr int kMine = kBins / kSampleThreads;
  const int first = static_cast<int>(threadIdx.x) * kMine;
  unsigned count = 0;
  Weight weight = 0;
  for (int bin = first; bin < first + kMine; ++bin) {
    count_until[bin] = count += __ldcg(&room->count[bin]);
    weight_until[bin] = weight += __ldcg(&room->weight[bin]);
    room->count[bin] = 0, room->weight[bin] = 0;
  }
  const unsigned count_before = sum_until(count, counts_of_warp) - count;
  const Weight weight_before = sum_until(weight, weights_of_warp) - weight;
  for (int bin = first; bin < first + kMine; ++bin) {
    room->count_until[bin] = count_until[bin] += count_before;
    room->weight_until[bin] = weight_until[bin] += weight_before;
  }
  __syncthreads();  // all sums are there
  if (threadIdx.x == 0) room->borders = find_borders(count_until, weight_until, rules);
}

// Largest of the block's values; every thread calls. `most` is shared, and 0.
__device__ Weight block_most(Weight value, Weight* most) {
  atomicMax(most, value);  // all threads have one
  __syncthreads();         // all have been compared
  return *most;
}

// The tokens near borders, in order, and what the filters make of them. A listed token: place i.
struct Listed {
  float x[kMaxListed];
  int id[kMaxListed], bin[kMaxListed];
  Weight weight[kMaxListed];
  Weight kept, left;  // by top-k; by all filters

  __device__ bool precedes(int a, int b) const {
    return x[a] != x[b] ? x[a] > x[b] : id[a] < id[b];
  }
  // Weight and number of token i and all before it.
  __device__ void sum_until(int i, int n, const Room& room, Weight& sum, unsigned& count) const {
    sum = bin[i] > 0 ? room.weight_until[bin[i] - 1] : 0;
    count = bin[i] > 0 ? room.count_until[bin[i] - 1] : 0;
    for (int j = 0; j < n; ++j)
      if (bin[j] == bin[i] && !precedes(i, j)) sum += weight[j], ++count;
  }
};

// Where filters and draw fall among the n listed tokens, to which they run; leaves the token in
// room.choice. All threads call.
__device__ void choose(Room& room, Listed& listed, int n, const Rules& rules) {
  constexpr int kMine = kMaxListed / kSampleThreads;
  Weight until[kMine], most = 0;
  unsigned count[kMine];
  const auto mine = [&](int m) { return static_cast<int>(threadIdx.x) + m * kSampleThreads; };
  const auto top_k = [&](unsigned c) {
    return room.borders.first[0] == kBins || c <= static_cast<unsigned>(rules.top_k);
  };
#pragma unroll
  for (int m = 0; m < kMine; ++m) {
    if (mine(m) >= n) continue;
    listed.sum_until(mine(m), n, room, until[m], count[m]);
    if (top_k(count[m])) most = max(most, until[m]);
  }
  const Weight kept =
      block_most(room.borders.first[0] == kBins ? room.borders.total : most, &listed.kept);
  const Weight reached = rules.top_p < 1 ? rules.until_top_p(kept) : kept;
  most = room.borders.certain;
#pragma unroll
  for (int m = 0; m < kMine; ++m) {
    const int i = mine(m);
    if (i < n && top_k(count[m]) && until[m] - listed.weight[i] < reached &&
        listed.weight[i] >= rules.least_weight())
      most = max(most, until[m]);
  }
  const Weight left = block_most(most, &listed.left), place = rules.place(left);
#pragma unroll
  for (int m = 0; m < kMine; ++m) {
    const int i = mine(m);
    if (i >= n || place >= until[m] || place < until[m] - listed.weight[i]) continue;
    room.choice.token = listed.id[i];
    room.choice.drawn = left > static_cast<Weight>(kOne);  // the weight of the first
  }
}

// Computes  the token that is drawn
// Grid      n_vocab / kSlice, rounded up; all list tokens, the last block to arrive chooses one
// Block     kSampleThreads; a thread has kPerThread choices, then a share of the listed tokens
// Shared    20 bytes a listed token
// Bytes     reads choices; of each token listed 4 bytes in and out, and the sums of its bin
__global__ void choose_token(Room* room, const float* choices, int n_vocab, Rules rules) {
  __shared__ Listed listed;
  wait_for_previous_kernel();
  let_next_kernel_start();
  if (room->choice.outcome != DeviceChoice::kChosen) return;
  for (int j = 0; j < kPerThread; ++j) {
    const int i = index_of(j);
    if (i >= n_vocab) continue;
    const Weighed w(choices[i], room->largest, rules.temperature);
    if (w.weight == 0 || !room->borders.has(w.bin)) continue;
    const unsigned place = atomicAdd(&room->n_listed, 1u);  // all blocks list
    if (place < kMaxListed) room->listed[place] = i;
  }
  if (!last_to_arrive(&room->arrived, gridDim.x)) return;
  const int n = static_cast<int>(__ldcg(&room->n_listed));
  for (int i = static_cast<int>(threadIdx.x); i < min(n, kMaxListed); i += kSampleThreads) {
    listed.id[i] = __ldcg(&room->listed[i]);
    listed.x[i] = choices[listed.id[i]];
    const Weighed w(listed.x[i], room->largest, rules.temperature);
    listed.weight[i] = w.weight, listed.bin[i] = w.bin;
  }
  if (threadIdx.x == 0) listed.kept = listed.left = 0;
  __syncthreads();  // the list is complete, and everybody knows n
  if (threadIdx.x == 0) {
    room->n_listed = 0;
    if (n > kMaxListed) room->choice.outcome = DeviceChoice::kTooClose;
  }
  if (n <= kMaxListed) choose(*room, listed, n, rules);
}

unsigned blocks_of(int n, int per_block) {
  return static_cast<unsigned>((n + per_block - 1) / per_block);
}

template <class Buffer>
void grow(Buffer& buffer, std::size_t n) {
  if (buffer.size() < n) buffer = {}, buffer = Buffer(n, "sampling");
}

}  // namespace

CudaSampler::CudaSampler(const Stream& stream)
    : stream_(stream), room_(sizeof(Room), "sampling"), choice_(1, "sampling") {
  fill_device(room_.data(), 0, room_.size(), stream);
}

const float* CudaSampler::with_penalties(const float* logits, int n_vocab, const Sampler& sampler) {
  const std::vector<Sampler::Seen> seen = sampler.seen();
  if (seen.empty()) return logits;
  grow(penalized_, n_vocab), grow(seen_, seen.size()), grow(host_seen_, seen.size());
  std::copy(seen.begin(), seen.end(), host_seen_.data());
  copy_to_device(seen_.data(), host_seen_.data(), seen.size(), stream_);
  copy_on_device(penalized_.data(), logits, n_vocab, stream_);
  const SamplerOptions& o = sampler.options();
  const int n_seen = static_cast<int>(seen.size());
  launch_overlapping("penalize", penalize, blocks_of(n_seen, kSampleThreads), kSampleThreads, 0,
                     stream_, penalized_.data(), seen_.data(), n_seen, n_vocab, o.repeat_penalty,
                     o.presence_penalty, o.frequency_penalty);
  return penalized_.data();
}

std::optional<Prediction> CudaSampler::draw(const float* logits, int n, int n_vocab,
                                            Sampler& sampler) {
  const ProfileRange range("sample");
  const float* choices = with_penalties(logits, n_vocab, sampler);
  const unsigned n_blocks = blocks_of(n, kSlice);
  grow(slices_, n_blocks * sizeof(Slice));
  auto* room = reinterpret_cast<Room*>(room_.data());
  launch_overlapping("survey_logits", survey_logits, n_blocks, kSampleThreads, 0, stream_, room,
                     reinterpret_cast<Slice*>(slices_.data()), logits, choices, n, n_vocab);
  const SamplerOptions& o = sampler.options();
  if (o.temperature > 0) {
    const Rules rules{o.temperature, o.top_k, o.top_p, o.min_p, sampler.next_draw()};
    const unsigned n_choices = blocks_of(n_vocab, kSlice);
    launch_overlapping("count_weights", count_weights, n_choices, kSampleThreads, 0, stream_, room,
                       choices, n_vocab, rules);
    launch_overlapping("choose_token", choose_token, n_choices, kSampleThreads, 0, stream_, room,
                       choices, n_vocab, rules);
  }
  copy_to_host(choice_.data(), &room->choice, 1, stream_);
  stream_.synchronize();  // the choice is here
  const DeviceChoice& c = *choice_.data();
  if (c.outcome != DeviceChoice::kChosen) return std::nullopt;
  const float lead = o.temperature > 0 ? kInfinity : c.lead;
  return Prediction{c.token, c.drawn != 0, lead, c.entropy};
}

}  // namespace thaw
