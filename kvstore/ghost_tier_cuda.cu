#include <algorithm>
#include <vector>

#include "device/error.h"
#include "device/kernel.cuh"
#include "kvstore/ghost_cuda.cuh"
#include "kvstore/ghost_tier_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {
namespace {

constexpr int kMostBlocks = 64;  // groups of a head that are written at a time

// Computes  the centres of a layer's heads, if the step's tokens make centre_tokens full
// Grid      k/v heads
// Block     kGhostThreads; a thread has two numbers of a head
// Shared    none
// Bytes     reads centre_tokens keys and values twice, writes their means
template <KvType kType>
__global__ void fix_centres(GhostJob job) {
  __shared__ double squares[2 * GhostQuery::kMaxDim];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int n = job.ghosts.centre_tokens;
  if (job.place->first >= n || job.place->kv_len < n) return;
  fix_centre<kType>(job, static_cast<int>(blockIdx.x), squares);
}

// Computes  the ghosts of a step's tokens, and of all before them if those had no centre yet
// Grid      groups of 32 tokens, in turns x k/v heads x layers
// Block     kGhostThreads; a warp has the keys or the values of a chain, one after the other. Two a
//           multiprocessor leave registers for all that is the same for each token; three spill.
// Shared    a group, and a mean a warp
// Bytes     reads keys and values and the groups that they go into, writes those groups, and reads
//           and writes a carry a head
template <KvType kType>
__global__ void __launch_bounds__(kGhostThreads, 2) write_ghosts(GhostJob of_first) {
  const GhostJob job = of_first.of_layer(static_cast<int>(blockIdx.z));
  __shared__ double squares[2 * GhostQuery::kMaxDim];
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int head = static_cast<int>(blockIdx.y), end = job.place->kv_len;
  const GhostFormat& f = job.ghosts.format;
  int first = job.place->first;
  if (end < job.ghosts.centre_tokens) return;
  if (first < job.ghosts.centre_tokens) {
    if (job.fixes_centre) fix_centre<kType>(job, head, squares);
    first = 0;
  }
  const int n_words = static_cast<int>(f.group_bytes() / 4);
  auto* group = dynamic_shared<std::uint32_t>();
  float* mean = reinterpret_cast<float*>(group + n_words) + warp_index() * f.head_dim;
  for (int g = first / kGhostGroup + static_cast<int>(blockIdx.x); g * kGhostGroup < end;
       g += static_cast<int>(gridDim.x)) {
    auto* stored =
        reinterpret_cast<std::uint32_t*>(const_cast<std::byte*>(job.ghosts.group(head, g)));
    for (int i = static_cast<int>(threadIdx.x); i < n_words; i += kGhostThreads)
      group[i] = stored[i];
    __syncthreads();  // what stands in the group so far is there
    const int begin = max(first, g * kGhostGroup), last = min(end, (g + 1) * kGhostGroup);
    const int first_chain = begin / kChainTokens,
              n_chains = (last - 1) / kChainTokens + 1 - first_chain;
    for (int task = warp_index(); task < 2 * n_chains; task += kGhostThreads / kWarp) {
      const int chain = (first_chain + task / 2) * kChainTokens;
      const int from = max(begin, chain), to = min(last, chain + kChainTokens);
      if (task % 2 == 0)
        write_keys<kType>(job, group, mean, head, from, to, end);
      else if (f.value_bits > 0)
        write_values<kType>(job, group, reinterpret_cast<const std::byte*>(stored), mean, head,
                            from, to, end);
    }
    __syncthreads();  // all codes and scales are in the group
    for (int i = static_cast<int>(threadIdx.x); i < n_words; i += kGhostThreads)
      stored[i] = group[i];  // a thread's words are its own when the next group is loaded, too
  }
}

}  // namespace

CudaGhostTier::CudaGhostTier(PageSource& source, const KvShape& shape, const GhostFormat& format,
                             int centre_tokens, const Stream& stream)
    : shape_(shape),
      format_(format),
      centre_tokens_(centre_tokens),
      stream_(stream),
      pages_(source,
             static_cast<std::size_t>(shape.n_layers) * shape.n_kv_heads *
                 (kTierTokens / kGhostGroup) * format.group_bytes(),
             static_cast<std::size_t>(format.present() ? tier_pages(shape.capacity) : 0),
             "ghosts") {
  if (!format.present()) return;
  const std::size_t heads = static_cast<std::size_t>(shape.n_layers) * shape.n_kv_heads;
  means_ = DeviceBuffer<float>(heads * 2 * shape.head_dim, "ghosts");
  units_ = DeviceBuffer<float>(heads * 2, "ghosts");
  // Attention also loads both where there is no centre yet, to have them early.
  fill_device(means_.data(), 0, means_.bytes(), stream_);
  fill_device(units_.data(), 0, units_.bytes(), stream_);
  carries_ = DeviceBuffer<float>(heads * shape.head_dim, "ghosts");
  carried_to_ = DeviceBuffer<int>(heads, "ghosts");
  fill_device(carried_to_.data(), 0, carried_to_.bytes(), stream_);
  send_tables(GhostRope(shape.rope, shape.head_dim), shape.capacity);
}

// The host's tables, for every token that there will be: angles are those of the CPU.
void CudaGhostTier::send_tables(const GhostRope& host, int capacity) {
  GhostRope rope = host;
  rope.grow(capacity);
  const GhostRope::Tables from = rope.tables();
  std::vector<DeviceRope::Pair> pairs;
  for (const GhostRope::Pair& p : from.pairs) pairs.push_back({p.first, p.second});
  pairs_ = DeviceBuffer<DeviceRope::Pair>(pairs.size(), "ghosts");
  copy_to_device(pairs_.data(), pairs.data(), pairs.size(), stream_);
  std::vector<float> all;
  for (const auto& table : {from.middle, from.within, from.cubic})
    all.insert(all.end(), table.begin(), table.end());
  tables_ = DeviceBuffer<float>(all.size(), "ghosts");
  copy_to_device(tables_.data(), all.data(), all.size(), stream_);
  const std::vector<std::uint16_t> rows = SplitRope::of(from);
  rows_ = DeviceBuffer<std::uint16_t>(rows.size(), "ghosts");
  copy_to_device(rows_.data(), rows.data(), rows.size(), stream_);
  rope_.n_fast = from.n_fast;
  rope_.pairs = pairs_.data();
  rope_.middle = tables_.data();
  rope_.within = rope_.middle + from.middle.size();
  rope_.cubic = rope_.within + from.within.size();
  rope_.rows = rows_.data();
}

void CudaGhostTier::reserve(int n_tokens) {
  if (present()) pages_.reserve(static_cast<std::size_t>(tier_pages(n_tokens)), stream_);
}

DeviceGhosts CudaGhostTier::view(int layer) const {
  DeviceGhosts view;
  view.format = format_;
  if (!present()) return view;
  const std::size_t first_head = static_cast<std::size_t>(layer) * shape_.n_kv_heads;
  view.centre_tokens = centre_tokens_;
  view.pages = pages_.on_device();
  view.offset = first_head * view.kPageGroups * format_.group_bytes();
  view.means = means_.data() + first_head * 2 * shape_.head_dim;
  view.units = units_.data() + first_head * 2;
  view.rope = rope_;
  return view;
}

GhostJob CudaGhostTier::job_of(int layer, const DeviceRows& cold, const StepPlace* place,
                               int n) const {
  const DeviceGhosts ghosts = view(layer);
  const std::size_t first_head = static_cast<std::size_t>(layer) * shape_.n_kv_heads;
  return {ghosts,
          const_cast<float*>(ghosts.means),
          const_cast<float*>(ghosts.units),
          carries_.data() + first_head * shape_.head_dim,
          carried_to_.data() + first_head,
          cold,
          place,
          n == 1};
}

void CudaGhostTier::launch_write(const GhostJob& job, int n_blocks, int n_layers) {
  const dim3 grid(static_cast<unsigned>(n_blocks), static_cast<unsigned>(shape_.n_kv_heads),
                  static_cast<unsigned>(n_layers));
  const std::size_t shared = format_.group_bytes() + kGhostThreads / kWarp * sizeof(float) *
                                                         static_cast<std::size_t>(shape_.head_dim);
  with_kv_type(shape_.type, [&](auto type) {
    launch_overlapping("ghosts", write_ghosts<decltype(type)::value>, grid, kGhostThreads, shared,
                       stream_, job);
  });
}

void CudaGhostTier::write(int layer, const DeviceRows& cold, const StepPlace* place, int n) {
  if (!present()) return;
  const GhostJob job = job_of(layer, cold, place, n);
  if (n > 1)
    with_kv_type(shape_.type, [&](auto type) {
      launch_overlapping("centre", fix_centres<decltype(type)::value>,
                         static_cast<unsigned>(shape_.n_kv_heads), kGhostThreads, 0, stream_, job);
    });
  // A first step that fills the centre writes more groups than its own tokens': blocks take turns.
  const int groups = (n + kGhostGroup - 1) / kGhostGroup + 1;
  launch_write(job, n == 1 ? 1 : std::min(groups, kMostBlocks), 1);
}

void CudaGhostTier::write_newest(const DeviceRows& cold, std::size_t cold_layer,
                                 const DeviceHot& hot, const StepPlace* place) {
  if (!present()) return;
  GhostJob job = job_of(0, cold, place, 1);
  job.n_heads = shape_.n_kv_heads, job.cold_layer = cold_layer, job.hot = hot;
  launch_write(job, 1, shape_.n_layers);
}

std::int64_t CudaGhostTier::bookkeeping_bytes() const {
  return static_cast<std::int64_t>(means_.bytes() + units_.bytes() + carries_.bytes() +
                                   carried_to_.bytes() + pairs_.bytes() + tables_.bytes() +
                                   rows_.bytes()) +
         pages_.table_bytes();
}

}  // namespace thaw
