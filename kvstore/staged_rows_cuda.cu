#include <algorithm>
#include <cstdio>

#include "device/error.h"
#include "kvstore/staged_rows_cuda.h"

namespace thaw {
namespace {

constexpr int kGrowth = 4096;  // tokens: memory is taken for so many at a time

std::size_t table_bytes(int n_pages) {
  constexpr std::size_t kAligned = 256;
  return (2 * static_cast<std::size_t>(n_pages) * sizeof(void*) + kAligned - 1) / kAligned *
         kAligned;
}

}  // namespace

std::size_t CudaStagedRows::layer_bytes() const {
  return static_cast<std::size_t>(shape_.n_kv_heads) * cold_.rows(0).head_stride;
}

std::byte* CudaStagedRows::page(int layer, int index) const {
  return memory_.data() + table_bytes(n_pages_) +
         (static_cast<std::size_t>(layer % 2) * n_pages_ + index) * layer_bytes();
}

void CudaStagedRows::take_memory(int n_pages) {
  release();
  memory_ = DeviceBuffer<std::byte>(table_bytes(n_pages) + 2 * n_pages * layer_bytes(),
                                    "a prompt's rows");
  n_pages_ = n_pages;
  fill_device(memory_.data(), 0, memory_.bytes(), stream_);
  std::vector<const std::byte*> table;
  for (int buffer = 0; buffer < 2; ++buffer)
    for (int i = 0; i < n_pages; ++i) table.push_back(page(buffer, i));
  copy_to_device(reinterpret_cast<const std::byte**>(memory_.data()), table.data(), table.size(),
                 stream_);
}

bool CudaStagedRows::begin(int first, int kv_len) {
  first_ = first, kv_len_ = kv_len;
  std::fill(std::begin(in_buffer_), std::end(in_buffer_), -1);
  if (tier_pages(kv_len) > n_pages_) {
    const int room = (kv_len + kGrowth - 1) / kGrowth * kGrowth;
    try {
      take_memory(tier_pages(std::min(room, shape_.capacity)));
    } catch (const Error& error) {
      if (n_pages_ > 0) throw;  // memory was there
      if (!has_warned_)
        std::fprintf(stderr, "thaw: %s; prompts read earlier tokens over the bus, many times\n",
                     error.what());
      has_warned_ = true;
      return false;
    }
  }
  ready_.record(stream_);
  side_.wait(ready_);  // the tables are there, and nobody reads the buffers any more
  copy_in(0);
  return true;
}

void CudaStagedRows::copy_in(int layer) {
  const KvRows from = cold_.host().rows(layer, first_);
  for (int i = 0; i < tier_pages(first_); ++i)
    copy_to_device(page(layer, i), from.pages[static_cast<std::size_t>(i)] + from.offset,
                   layer_bytes(), side_);
  fetched_[layer % 2].record(side_);
  in_buffer_[layer % 2] = layer;
}

void CudaStagedRows::fetch(int layer) {
  require(in_buffer_[layer % 2] == layer, "KV store: layer ", layer, ": not the next of a step");
  stream_.wait(fetched_[layer % 2]);
}

void CudaStagedRows::save(int layer) {
  ready_.record(stream_);
  side_.wait(ready_);  // the new rows are there, and the layer before is done with its buffer
  if (layer + 1 < shape_.n_layers) copy_in(layer + 1);
  const KvRows to = cold_.host().rows(layer, kv_len_);
  for (int i = first_ / kTierTokens; i < tier_pages(kv_len_); ++i)
    copy_to_host(const_cast<std::byte*>(to.pages[static_cast<std::size_t>(i)]) + to.offset,
                 page(layer, i), layer_bytes(), side_);
  saved_.record(side_);
  is_saving_ = true;
}

DeviceRows CudaStagedRows::rows(int layer) const {
  DeviceRows rows = cold_.rows(layer);
  rows.pages = reinterpret_cast<const std::byte* const*>(memory_.data()) + layer % 2 * n_pages_;
  rows.offset = 0;
  return rows;
}

}  // namespace thaw
