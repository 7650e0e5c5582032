// The tiers of a store in device memory against those in host memory: the same bits.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kvstore/ghost_tier_cuda.h"
#include "kvstore/tiers.h"
#include "tests/error_of.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;

namespace {

KvRope rope_of(int head_dim, bool interleaved) {
  KvRope rope{{}, interleaved};
  for (int i = 0; i < head_dim / 2; ++i)
    rope.inverse_frequencies.push_back(static_cast<float>(std::pow(10000.0, -2.0 * i / head_dim)));
  return rope;
}

// A cold tier and ghosts on both sides, which are given the same tokens.
class BothTiers {
 public:
  BothTiers(const KvShape& shape, const GhostFormat& format, int centre_tokens)
      : shape_(shape),
        pinned_(make_pinned_pages()),
        plain_(make_memory_pages()),
        on_device_(make_device_pages(stream)),
        cold_(*pinned_, shape, false),
        cpu_(*plain_, shape, format, centre_tokens),
        cuda_(*on_device_, shape, format, centre_tokens, stream),
        table_(static_cast<std::size_t>(tier_pages(shape.capacity)), "table"),
        place_(1, "place") {}

  // n tokens: keys around a centre that turns a little, some of them equal, zero or huge.
  void append(int n, std::uint64_t seed) {
    testing::Random random(seed);
    const int first = length_, width = shape_.n_kv_heads * shape_.head_dim;
    cold_.reserve(first + n), cpu_.reserve(first + n), cuda_.reserve(first + n);
    length_ += n;
    const KvRows rows = cold_.rows(0, length_);
    copy_to_device(table_.data(), rows.pages.data(), rows.pages.size(), stream);
    const StepPlace place = {first, length_};
    copy_to_device(place_.data(), &place, 1, stream);
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      for (int t = first; t < length_; ++t) {
        std::vector<float> k = random.normals(width, 1.0f), v = random.normals(width, 0.3f);
        for (int i = 0; i < width; ++i) k[i] += static_cast<float>(i % 7) - 3.0f;
        if (t % 11 == 3) std::fill(k.begin(), k.end(), 0.0f);
        if (t % 13 == 4) std::fill(v.begin(), v.end(), 0.5f);
        if (t % 17 == 5)
          for (float& x : k) x *= 100;
        cold_.write(layer, t, k.data(), v.data());
      }
      cpu_.write(layer, cold_.rows(layer, length_), first, n);
      cuda_.write(layer, device_rows(layer), place_.data(), n);
    }
    stream.synchronize();
  }

  void rewind(int position) { length_ = position, cpu_.cut(position); }

  // Groups, means and units that are not the same.
  int count_differences() {
    int n = 0;
    for (int layer = 0; layer < shape_.n_layers; ++layer) {
      const GhostView cpu = cpu_.view(layer);
      const DeviceGhosts cuda = cuda_.view(layer);
      if (cpu.present() != (length_ >= cuda.centre_tokens)) return -1;
      if (!cpu.present()) continue;
      const std::size_t bytes = cpu.format.group_bytes();
      std::vector<const std::byte*> pages(static_cast<std::size_t>(tier_pages(length_)));
      copy_to_host(pages.data(), cuda.pages, pages.size(), stream);
      for (int head = 0; head < shape_.n_kv_heads; ++head) {
        n += centre_differs(cpu.centres[head], cuda, head);
        for (int g = 0; g * kGhostGroup < length_; ++g) {
          std::vector<std::byte> group(bytes);
          copy_to_host(
              group.data(),
              pages[g / cuda.kPageGroups] + cuda.offset +
                  static_cast<std::size_t>(head * cuda.kPageGroups + g % cuda.kPageGroups) * bytes,
              bytes, stream);
          n += std::memcmp(group.data(), cpu.group(head, g), bytes) != 0;
        }
      }
    }
    return n;
  }

  const CudaGhostTier& cuda() const { return cuda_; }
  const Stream stream;

 private:
  DeviceRows device_rows(int layer) const {
    const KvRows r = cold_.rows(layer, length_);
    return {table_.data(), r.offset, r.value_offset, r.head_stride, r.row_bytes, r.page_shift};
  }

  int centre_differs(const GhostCentre& cpu, const DeviceGhosts& cuda, int head) {
    const auto dim = static_cast<std::size_t>(shape_.head_dim);
    std::vector<float> mean(2 * dim), units(2);
    copy_to_host(mean.data(), cuda.means + head * 2 * dim, 2 * dim, stream);
    copy_to_host(units.data(), cuda.units + head * 2, 2, stream);
    return !std::equal(mean.begin(), mean.begin() + shape_.head_dim, cpu.key_mean) ||
           !std::equal(mean.begin() + shape_.head_dim, mean.end(), cpu.value_mean) ||
           units[0] != cpu.key_unit || units[1] != cpu.value_unit;
  }

  KvShape shape_;
  std::unique_ptr<PageSource> pinned_, plain_, on_device_;
  ColdTier cold_;
  GhostTier cpu_;
  CudaGhostTier cuda_;
  DeviceBuffer<const std::byte*> table_;
  DeviceBuffer<StepPlace> place_;
  int length_ = 0;
};

}  // namespace

TEST_CASE("cuda ghosts: every format and size of head has the bits of the CPU") {
  for (const int head_dim : {8, 64, 80, 112, 256})
    for (const auto& [key_bits, value_bits] : {std::pair{3, 2}, {2, 0}, {4, 4}, {1, 1}}) {
      CAPTURE(head_dim);
      CAPTURE(key_bits);
      const KvShape shape{1, 1, head_dim, 100, KvType::kF16, rope_of(head_dim, key_bits % 2 == 1)};
      BothTiers tiers(shape, {key_bits, value_bits, head_dim}, 9);
      tiers.append(10, 1);
      tiers.append(1, 2);
      CHECK(tiers.count_differences() == 0);
    }
}

TEST_CASE("cuda ghosts: of rows of every type, without RoPE, too") {
  for (const KvType type :
       {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8_0, KvType::kQ4_0}) {
    CAPTURE(kv_type_name(type));
    const KvShape shape{1, 2, 96, 64, type, {}};
    BothTiers tiers(shape, {3, 2, 96}, 8);
    tiers.append(12, 1);
    CHECK(tiers.count_differences() == 0);
  }
}

TEST_CASE("cuda ghosts: the centre is fixed when it is full, and anew after a rewind") {
  const KvShape shape{2, 2, 64, 300, KvType::kF16, rope_of(64, false)};
  BothTiers tiers(shape, {3, 2, 64}, 40);
  tiers.append(38, 1);
  CHECK(tiers.count_differences() == 0);
  tiers.append(1, 2);
  tiers.append(1, 3);  // the one that makes it full, alone
  CHECK(tiers.count_differences() == 0);
  tiers.append(1, 4);
  tiers.append(95, 5);  // into a second page
  CHECK(tiers.count_differences() == 0);
  tiers.rewind(70);
  tiers.append(3, 6);
  CHECK(tiers.count_differences() == 0);
  tiers.rewind(20);
  tiers.append(30, 7);
  CHECK(tiers.count_differences() == 0);
  CHECK(tiers.cuda().bytes() == 2 * 2 * 2 * 4 * 1344);  // pages, layers, heads, groups
}
