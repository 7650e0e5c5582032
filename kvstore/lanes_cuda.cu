#include <algorithm>
#include <cstring>

#include "device/error.h"
#include "device/kernel.cuh"
#include "kvstore/lanes_cuda.h"
#include "kvstore/tiers.h"

namespace thaw {
namespace {

constexpr int kRowStep = 64;  // room for rows is a multiple of it
constexpr int kThreads = 128;

// Computes  to = from, of which a lane has `room` and had `had` elements
// Grid      lanes
// Block     kThreads
// Shared    none
// Bytes     reads and writes what there was
template <class T>
__global__ void widen(T* to, const T* from, int room, int had) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const auto lane = static_cast<std::int64_t>(blockIdx.x);
  for (int i = static_cast<int>(threadIdx.x); i < had; i += kThreads)
    to[lane * room + i] = from[lane * had + i];
}

// A buffer of n_lanes x room with what stood in the old one, lane by lane.
template <class T>
DeviceBuffer<T> widened(const DeviceBuffer<T>& old, int n_lanes, int room, int had,
                        const Stream& stream) {
  DeviceBuffer<T> buffer(static_cast<std::size_t>(n_lanes) * room, "hot tokens");
  // The next time, rows are copied that no token has.
  fill_device(buffer.data(), 0, buffer.bytes(), stream);
  if (had > 0)
    launch_overlapping("widen", widen<T>, static_cast<unsigned>(n_lanes), kThreads, 0, stream,
                       buffer.data(), old.data(), room, had);
  return buffer;
}

template <class T>
DeviceBuffer<T> zeros(std::size_t n, const Stream& stream) {
  DeviceBuffer<T> buffer(n, "KV store");
  fill_device(buffer.data(), 0, buffer.bytes(), stream);
  return buffer;
}

std::int64_t pages_of(int rows) { return (rows + kHotPageRows - 1) / kHotPageRows; }

}  // namespace

CudaLanes::CudaLanes(PageSource& source, const KvShape& shape, const PolicyParams& params,
                     int lane_heads, const DeviceRows& cold, std::int64_t max_pages,
                     const Stream& stream)
    : shape_(shape),
      stream_(stream),
      n_lanes_(shape.n_layers * (shape.n_kv_heads / lane_heads)),
      arena_(source, 2 * kv_row_bytes(shape.type, shape.head_dim) * lane_heads, max_pages),
      token_pages_(source, static_cast<std::size_t>(n_lanes_) * kTierTokens * kTokenStateBytes,
                   static_cast<std::size_t>(tier_pages(shape.capacity)), "KV store"),
      pages_(static_cast<std::size_t>(n_lanes_)) {
  lanes_.params = params;
  lanes_.lane_heads = lane_heads;
  lanes_.lanes_per_layer = shape.n_kv_heads / lane_heads;
  lanes_.mask_words = (shape.capacity + kWarp - 1) / kWarp;
  lanes_.kv_row = kv_row_bytes(shape.type, shape.head_dim);
  lanes_.cold = cold;
  lanes_.hot.value_offset = lanes_.kv_row;
  lanes_.hot.row_bytes = 2 * lanes_.kv_row;
  lanes_.hot.head_stride = kHotPageRows * 2 * lanes_.kv_row;
  lanes_.hot.page_shift = kHotPageShift;
  const auto lanes = static_cast<std::size_t>(n_lanes_);
  const std::size_t words = lanes * lanes_.mask_words;
  n_rows_ = zeros<std::int32_t>(lanes, stream);
  masks_ = zeros<std::uint32_t>(2 * words, stream);
  states_ = DeviceBuffer<LaneState>(lanes, "KV store");
  const std::vector<LaneState> states(lanes, LaneState{0, 1, 0, 0, {}, 0});
  copy_to_device(states_.data(), states.data(), lanes, stream);
  reports_ = PinnedBuffer<LaneReport>(lanes, "KV store");
  std::fill_n(reports_.data(), lanes, LaneReport{});
  lanes_.n_rows = n_rows_.data();
  lanes_.mask = masks_.data(), lanes_.chosen = masks_.data() + words;
  lanes_.token_pages = token_pages_.on_device();
  lanes_.states = states_.data(), lanes_.reports = reports_.data();
  make_statistics();
  reserve_rows(1);
}

// Their probabilities are at least epsilon, and add up to 1, rounding aside.
int CudaLanes::most_recalled(float epsilon) const {
  if (lanes_.params.policy != Policy::kThaw || lanes_.params.ghost_key_bits == 0) return 0;
  if (!(epsilon > 1.0f / static_cast<float>(shape_.capacity))) return shape_.capacity;
  return std::min(shape_.capacity, static_cast<int>(1.001f / epsilon) + 1);
}

void CudaLanes::make_statistics() {
  const auto lanes = static_cast<std::size_t>(n_lanes_);
  entropy_ = zeros<float>(lanes, stream_), ghost_mass_ = zeros<float>(lanes, stream_);
  decode_.entropy = entropy_.data(), decode_.ghost_mass = ghost_mass_.data();
  exact_entropy_ = zeros<float>(static_cast<std::size_t>(per_layer()), stream_);
  exact_.entropy = exact_entropy_.data();
  decode_.recalled_room = most_recalled(lanes_.params.epsilon * kLeastRecall);
  if (decode_.recalled_room == 0) return;
  const std::size_t room = lanes * static_cast<std::size_t>(decode_.recalled_room);
  n_recalled_ = zeros<std::int32_t>(lanes, stream_);
  recalled_ = zeros<std::int32_t>(room, stream_);
  recalled_probability_ = zeros<float>(room, stream_);
  decode_.n_recalled = n_recalled_.data(), decode_.recalled = recalled_.data();
  decode_.recalled_probability = recalled_probability_.data();
}

void CudaLanes::reserve_tokens(int n_tokens) {
  token_pages_.reserve(static_cast<std::size_t>(tier_pages(n_tokens)), stream_);
}

void CudaLanes::reserve_statistics(int n_tokens) {
  if (n_tokens <= exact_.stride) return;
  const int stride = std::min(std::max(n_tokens, exact_.stride * 3 / 2), shape_.capacity);
  const std::size_t n = static_cast<std::size_t>(per_layer()) * stride;
  DeviceBuffer<float> probability(n, "statistics"), relevance;
  if (lanes_.params.policy == Policy::kAsr) relevance = DeviceBuffer<float>(n, "statistics");
  exact_probability_ = std::move(probability), exact_relevance_ = std::move(relevance);
  exact_.stride = stride;
  exact_.probability = exact_probability_.data(), exact_.relevance = exact_relevance_.data();
}

void CudaLanes::reserve_rows(int n_rows) {
  const int had = lanes_.room;
  if (n_rows <= had) return;
  const int room = (std::max(n_rows, had * 3 / 2) + kRowStep - 1) / kRowStep * kRowStep;
  const bool asr = lanes_.params.policy == Policy::kAsr;
  auto tokens = widened(tokens_, n_lanes_, room, had, stream_);
  auto from = widened(from_, n_lanes_, room, had, stream_);
  const std::size_t n = static_cast<std::size_t>(n_lanes_) * room;
  DeviceBuffer<Sleeper> asleep;
  if (asr) asleep = widened(asleep_, n_lanes_, room, had, stream_);
  DeviceBuffer<std::int32_t> waking(asr ? n : 0, "hot tokens");
  DeviceBuffer<float> probability(n, "hot tokens"), relevance(asr ? n : 0, "hot tokens");
  const int lane_pages = room / kHotPageRows;
  const std::size_t entries = static_cast<std::size_t>(n_lanes_) * lane_pages;
  DeviceBuffer<const std::byte*> table(entries, "hot tokens");
  PinnedBuffer<const std::byte*> host_table(entries, "hot tokens");
  std::fill_n(host_table.data(), entries, nullptr);
  for (std::size_t lane = 0; lane < pages_.size(); ++lane)
    std::copy(pages_[lane].begin(), pages_[lane].end(), host_table.data() + lane * lane_pages);
  copy_to_device(table.data(), host_table.data(), entries, stream_);
  stream_.synchronize();  // share_pages() may write the host's table
  tokens_ = std::move(tokens), from_ = std::move(from), asleep_ = std::move(asleep);
  waking_ = std::move(waking), probability_ = std::move(probability);
  relevance_ = std::move(relevance);
  table_ = std::move(table), host_table_ = std::move(host_table);
  lanes_.room = decode_.stride = room;
  lanes_.tokens = tokens_.data(), lanes_.from = from_.data();
  lanes_.asleep = asleep_.data(), lanes_.waking = waking_.data();
  lanes_.hot.pages = table_.data(), lanes_.lane_pages = lane_pages;
  decode_.probability = probability_.data(), decode_.relevance = relevance_.data();
  lanes_.stats = decode_;
}

void CudaLanes::reserve_pages(std::span<const int> rows) {
  std::int64_t more = 0;
  for (std::size_t lane = 0; lane < pages_.size(); ++lane)
    more += pages_of(rows[lane]) - std::ssize(pages_[lane]);
  if (more > 0) arena_.reserve(more);
}

void CudaLanes::share_pages(std::span<const int> rows) {
  bool changed = false;
  for (std::size_t lane = 0; lane < pages_.size(); ++lane) {
    for (; std::ssize(pages_[lane]) > pages_of(rows[lane]); changed = true) {
      arena_.give(pages_[lane].back());
      pages_[lane].pop_back();
    }
  }
  for (std::size_t lane = 0; lane < pages_.size(); ++lane) {
    for (; std::ssize(pages_[lane]) < pages_of(rows[lane]); changed = true) {
      std::byte* page = arena_.take();
      require(page != nullptr, "KV store: a lane needs more pages than are promised");
      host_table_.data()[lane * lanes_.lane_pages + pages_[lane].size()] = page;
      pages_[lane].push_back(page);
    }
  }
  if (!changed) return;
  copy_to_device(table_.data(), static_cast<const std::byte* const*>(host_table_.data()),
                 table_.size(), stream_);
}

DeviceHot CudaLanes::hot(int layer) const {
  const std::int64_t first = std::int64_t{layer} * per_layer();
  DeviceHot hot;
  hot.n_lanes = per_layer();
  hot.lane_heads = lanes_.lane_heads;
  hot.room = lanes_.room;
  hot.mask_words = lanes_.mask_words;
  hot.rows = lanes_.hot;
  hot.rows.pages += first * lanes_.lane_pages;
  hot.lane_pages = lanes_.lane_pages;
  hot.n_rows = lanes_.n_rows + first;
  hot.tokens = lanes_.tokens + first * lanes_.room;
  hot.mask = lanes_.mask + first * lanes_.mask_words;
  return hot;
}

DeviceStats CudaLanes::decode_stats(int layer) const {
  const std::int64_t first = std::int64_t{layer} * per_layer();
  DeviceStats stats = decode_;
  stats.probability += first * stats.stride;
  if (stats.relevance) stats.relevance += first * stats.stride;
  stats.entropy += first, stats.ghost_mass += first;
  if (stats.recalled_room == 0) return stats;
  stats.n_recalled += first;
  stats.recalled += first * stats.recalled_room;
  stats.recalled_probability += first * stats.recalled_room;
  return stats;
}

DeviceStats CudaLanes::exact_stats() const { return exact_; }

std::int64_t CudaLanes::bookkeeping_bytes() const {
  const auto all = [](const auto&... buffers) { return (buffers.bytes() + ...); };
  return static_cast<std::int64_t>(all(table_, n_rows_, tokens_, from_, waking_, n_recalled_,
                                       recalled_, masks_, asleep_, states_, probability_,
                                       relevance_, entropy_, ghost_mass_, recalled_probability_,
                                       exact_probability_, exact_relevance_, exact_entropy_)) +
         token_pages_.bytes() + token_pages_.table_bytes();
}

void CudaLanes::read_rows(LaneSnapshot& to, int lane) const {
  const std::size_t page = kHotPageRows * 2 * lanes_.kv_row * lanes_.lane_heads;
  const auto& pages = pages_[static_cast<std::size_t>(lane)];
  std::vector<std::byte> all(pages.size() * page);
  for (std::size_t i = 0; i < pages.size(); ++i)
    copy_to_host(all.data() + i * page, pages[i], page, stream_);
  const std::size_t row_bytes = lanes_.hot.row_bytes;
  for (int head = 0; head < lanes_.lane_heads; ++head)
    for (std::size_t row = 0; row < to.tokens.size(); ++row) {
      const std::size_t at = row / kHotPageRows * page + head * lanes_.hot.head_stride +
                             row % kHotPageRows * row_bytes;
      const bool exists = at + row_bytes <= all.size();
      to.rows.resize(to.rows.size() + row_bytes);
      if (exists) std::memcpy(&to.rows[to.rows.size() - row_bytes], &all[at], row_bytes);
    }
}

LaneSnapshot CudaLanes::snapshot(int lane, int kv_len) const {
  LaneSnapshot out;
  std::int32_t n_rows = 0;
  LaneState state;
  copy_to_host(&n_rows, lanes_.n_rows + lane, 1, stream_);
  copy_to_host(&state, lanes_.states + lane, 1, stream_);
  const auto read = [&](auto& to, const auto* all, int stride, int n) {
    to.resize(static_cast<std::size_t>(n));
    copy_to_host(to.data(), all + static_cast<std::int64_t>(lane) * stride, to.size(), stream_);
  };
  read(out.tokens, lanes_.tokens, lanes_.room, n_rows);
  read(out.from, lanes_.from, lanes_.room, n_rows);
  read(out.mask, lanes_.mask, lanes_.mask_words, (kv_len + kWarp - 1) / kWarp);
  if (lanes_.asleep) read(out.asleep, lanes_.asleep, lanes_.room, state.n_asleep);
  const auto n = static_cast<std::size_t>(tier_pages(kv_len)) * kTierTokens;
  out.score.resize(n), out.stamp.resize(n), out.hits.resize(n), out.timer.resize(n);
  for (std::size_t t = 0; t < n; t += kTierTokens) {
    const std::byte* page = token_pages_.on_host()[t / kTierTokens] +
                            static_cast<std::size_t>(lane) * kTierTokens * kTokenStateBytes;
    const auto* scores = reinterpret_cast<const float*>(page);
    const auto* stamps = reinterpret_cast<const std::int32_t*>(scores + kTierTokens);
    const auto* hits = reinterpret_cast<const std::uint16_t*>(stamps + kTierTokens);
    copy_to_host(&out.score[t], scores, kTierTokens, stream_);
    copy_to_host(&out.stamp[t], stamps, kTierTokens, stream_);
    copy_to_host(&out.hits[t], hits, kTierTokens, stream_);
    copy_to_host(&out.timer[t], hits + kTierTokens, kTierTokens, stream_);
  }
  read_rows(out, lane);
  return out;
}

std::vector<float> CudaLanes::scores(int kv_len) const {
  const auto n = static_cast<std::size_t>(kv_len);
  std::vector<float> all(static_cast<std::size_t>(n_lanes_) * n);
  std::vector<std::byte> page(token_pages_.page_bytes());
  for (std::size_t t = 0; t < n; t += kTierTokens) {
    copy_to_host(page.data(), token_pages_.on_host()[t / kTierTokens], page.size(), stream_);
    const std::size_t bytes = std::min<std::size_t>(kTierTokens, n - t) * sizeof(float);
    for (std::size_t lane = 0; lane < static_cast<std::size_t>(n_lanes_); ++lane)
      std::memcpy(&all[lane * n + t], &page[lane * kTierTokens * kTokenStateBytes], bytes);
  }
  return all;
}

void CudaLanes::check_pages() const {
  std::int64_t lent = 0;
  for (const auto& pages : pages_) lent += std::ssize(pages);
  require(lent + arena_.free_pages() == arena_.pages(), "KV check: ", arena_.pages(),
          " hot pages, but ", lent, " in use and ", arena_.free_pages(), " free");
}

}  // namespace thaw
