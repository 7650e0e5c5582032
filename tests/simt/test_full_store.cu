// The store in device memory against the one in host memory: the same bits, and the same rules.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "kvstore/device_view.h"
#include "kvstore/full_store_cuda.h"
#include "tests/error_of.h"
#include "tests/simt/simt.h"
#include "tests/step_order.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;

namespace {

constexpr KvType kTypes[] = {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8_0,
                             KvType::kQ4_0};

// Sanitizers are slow, and see what is wrong in any size.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
constexpr int kHeadDims[] = {96};
#else
constexpr int kHeadDims[] = {64, 80, 96};
#endif

KvOptions full_options() {
  KvOptions o;
  o.policy.policy = Policy::kFull;
  return o;
}

// Numbers with ties, zeros of both signs, and what f16 rounds to a subnormal or to infinity.
std::vector<float> odd_numbers(std::int64_t n, std::uint64_t seed) {
  testing::Random random(seed);
  std::vector<float> x = random.normals(n, 1.5f);
  for (std::size_t i = 0; i < x.size(); ++i) {
    if (i % 97 == 5) x[i] = 1e-6f * x[i];
    if (i % 89 == 7) x[i] = 7.0f;
    if (i % 89 == 9) x[i] = -7.0f;
    if (i % 320 < 64 && i % 640 < 320) x[i] = i % 2 == 0 ? 0.0f : -0.0f;
    if (i % 501 == 13) x[i] = 65519.0f;
  }
  return x;
}

// Copies a row out of the store's pages.
__global__ void read_row(std::byte* out, DeviceRows rows, int head, int row, bool value, int n) {
  const std::byte* from = value ? rows.value(head, row) : rows.key(head, row);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += 32) out[i] = from[i];
}

std::vector<std::byte> row_of(const KvStore& store, int layer, int head, int row, bool value,
                              const Stream& stream) {
  const std::size_t n = kv_row_bytes(store.shape().type, store.shape().head_dim);
  const DeviceBuffer<std::byte> device(n, "row");
  launch("read_row", read_row, 1, 32, 0, stream, device.data(), store.view(layer).device->rows,
         head, row, value, static_cast<int>(n));
  std::vector<std::byte> host(n);
  copy_to_host(host.data(), device.data(), n, stream);
  return host;
}

// Blocks of 32 with infinity, with NaN, of nothing but NaN, and of what divides to infinity.
std::vector<float> no_numbers() {
  testing::Random random(6);
  std::vector<float> x = random.normals(8 * 32, 1.5f);
  x[3] = INFINITY, x[32 + 4] = -INFINITY, x[32 + 9] = INFINITY, x[2 * 32 + 5] = NAN;
  for (int i = 0; i < 32; ++i) {
    x[3 * 32 + i] = NAN;
    for (int block = 4; block < 8; ++block)
      x[block * 32 + i] = static_cast<float>(i % 3 - 1) * (block == 4   ? 1e-45f
                                                           : block == 5 ? -3e-44f
                                                                        : 1e-40f);
  }
  x[6 * 32 + 1] = NAN, x[7 * 32] = 1e-38f;
  return x;
}

// The same tokens into both stores, every layer; attention is left out.
void step(KvStore& store, KvStore* other, int n, Phase phase, std::uint64_t seed,
          const Stream& stream) {
  const KvShape& s = store.shape();
  store.begin(n, phase);
  if (other) other->begin(n, phase);
  for (int layer = 0; layer < s.n_layers; ++layer) {
    const std::int64_t size = std::int64_t{n} * s.n_kv_heads * s.head_dim;
    const auto k = odd_numbers(size, seed + layer), v = odd_numbers(size, seed + 100 + layer);
    const DeviceBuffer<float> dk(k.size(), "k"), dv(v.size(), "v");
    copy_to_device(dk.data(), k.data(), k.size(), stream);
    copy_to_device(dv.data(), v.data(), v.size(), stream);
    store.append(layer, dk.data(), dv.data(), n);
    store.settle(layer, {});
    if (other) other->append(layer, k.data(), v.data(), n), other->settle(layer, {});
    stream.synchronize();
  }
}

}  // namespace

TEST_CASE("cuda store: the bits of every type are those of the store in host memory") {
  for (const KvType type : kTypes)
    for (const int head_dim : kHeadDims) {
      if (head_dim == 80 && (type == KvType::kQ8_0 || type == KvType::kQ4_0)) continue;
      CAPTURE(kv_type_name(type));
      CAPTURE(head_dim);
      const Stream stream;
      const KvShape shape{2, 3, head_dim, 300, type};
      const auto cuda = make_cuda_kv_store(shape, full_options(), stream);
      const auto cpu = make_kv_store(shape, full_options());
      step(*cuda, cpu.get(), 130, Phase::kPrefill, 1, stream);
      step(*cuda, cpu.get(), 1, Phase::kDecode, 2, stream);
      std::vector<std::byte> expected(131 * 6 * kv_row_bytes(type, head_dim)), found(expected);
      cpu->read(1, 0, 131, expected.data()), cuda->read(1, 0, 131, found.data());
      CHECK(found == expected);
      const std::size_t skipped = 5 * 6 * kv_row_bytes(type, head_dim);
      cuda->read(1, 5, 125, found.data());  // from the middle of a page to that of another
      CHECK(std::memcmp(found.data(), expected.data() + skipped, 25 * skipped) == 0);
    }
}

TEST_CASE("cuda store: blocks of what is no number have the bits of the store in host memory") {
  for (const KvType type : {KvType::kQ8_0, KvType::kQ4_0}) {
    CAPTURE(kv_type_name(type));
    const Stream stream;
    const KvShape shape{1, 1, 256, 8, type};
    const auto cuda = make_cuda_kv_store(shape, full_options(), stream);
    const auto cpu = make_kv_store(shape, full_options());
    const std::vector<float> x = no_numbers();
    const DeviceBuffer<float> dx(x.size(), "x");
    copy_to_device(dx.data(), x.data(), x.size(), stream);
    cuda->begin(1, Phase::kPrefill), cpu->begin(1, Phase::kPrefill);
    cuda->append(0, dx.data(), dx.data(), 1), cpu->append(0, x.data(), x.data(), 1);
    const std::vector<std::byte> row = row_of(*cuda, 0, 0, 0, false, stream);
    const std::byte* expected = cpu->view(0).cold.key(0, 0);
    for (std::size_t i = 0; i < row.size(); ++i) {
      CAPTURE(i);
      CHECK(std::to_integer<int>(row[i]) == std::to_integer<int>(expected[i]));
    }
  }
}

TEST_CASE("cuda store: calls that are out of order are refused, and a rewind begins anew") {
  const Stream stream;
  const DeviceBuffer<float> x(3 * 64, "x");
  fill_device(x.data(), 0, x.bytes(), stream);
  KvOptions options = full_options();
  options.check = true;
  const auto kv = make_cuda_kv_store({2, 1, 64, 40, KvType::kF16}, options, stream);
  testing::check_step_order(*kv, x.data());
}

TEST_CASE("cuda store: lengths, rewinds, counters and bytes are those of the CPU") {
  const Stream stream;
  const KvShape shape{2, 1, 64, 300, KvType::kF16};
  KvOptions options = full_options();
  options.check = true;
  const auto cuda = make_cuda_kv_store(shape, options, stream);
  const auto cpu = make_kv_store(shape, options);
  step(*cuda, cpu.get(), 200, Phase::kPrefill, 1, stream);
  cuda->rewind(150), cpu->rewind(150);
  for (int i = 0; i < 3; ++i) step(*cuda, cpu.get(), 1, Phase::kDecode, 9, stream);
  CHECK(cuda->length() == 153);
  CHECK(cuda->view(1).kv_len == 153);
  CHECK(cuda->usage().full == cpu->usage().full);
  CHECK(cuda->usage().resident == cpu->usage().resident);
  CHECK(cuda->counters().steps == 3);
  CHECK(cuda->counters().attended == cpu->counters().attended);
  CHECK(cuda->counters().visible == cpu->counters().visible);
  CHECK(cuda->counters().cold_bytes_visible == cpu->counters().cold_bytes_visible);
  CHECK(cuda->stats_rows(5) == 0);
  cuda->check();
  cuda->clear();
  CHECK(cuda->length() == 0);
  CHECK(cuda->counters().steps == 0);
}

TEST_CASE("cuda store: a graph of an append serves every step") {
  const Stream stream;
  const KvShape shape{1, 1, 64, 300, KvType::kF32};
  const auto store = make_cuda_kv_store(shape, full_options(), stream);
  const DeviceBuffer<float> x(64, "x");
  const auto fill = [&](float value) {
    copy_to_device(x.data(), std::vector<float>(64, value).data(), 64, stream);
  };
  store->begin(1, Phase::kDecode);
  const auto pass = [&] { store->append(0, x.data(), x.data(), 1), store->settle(0, {}); };
  const Graph graph(stream, pass);
  store->rewind(0);
  for (int token = 0; token < 130; ++token) {
    fill(static_cast<float>(token));
    store->begin(1, Phase::kDecode);
    graph.launch(stream);
    stream.synchronize();
    // What the host counts is not in the graph: a second append of the same token.
    pass();
  }
  for (const int token : {0, 100, 129}) {
    float first;
    std::memcpy(&first, row_of(*store, 0, 0, token, true, stream).data(), 4);
    CHECK(first == static_cast<float>(token));
  }
}

TEST_CASE("cuda store: what does not fit is refused, and nothing is changed") {
  const Stream stream;
  const KvShape shape{2, 1, 64, 300, KvType::kF16};  // a page: 128 x 512 bytes
  const auto store = make_cuda_kv_store(shape, full_options(), stream);
  step(*store, nullptr, 100, Phase::kPrefill, 1, stream);
  CHECK(error_of([&] { store->begin(201, Phase::kPrefill); }) ==
        "KV store: expected at most 300 tokens, found 301");
  CHECK(error_of([&] { store->begin(2, Phase::kDecode); }) ==
        "KV store: decode: expected 1 token, found 2");
  simt::set_memory((std::size_t{1} << 30) - device_facts().free_memory + 70000);
  const std::string refused = error_of([&] { store->begin(190, Phase::kPrefill); });
  CHECK(refused.starts_with("KV store: out of device memory: asked for 0 MiB"));
  CHECK(refused.ends_with("290 tokens were asked for, 256 would fit"));
  CHECK(store->length() == 100);
  CHECK(store->usage().hot == 128 * 512);
  simt::set_memory(std::size_t{1} << 30);
  step(*store, nullptr, 190, Phase::kPrefill, 1, stream);
  store->check();
  CHECK(store->length() == 290);

  CHECK(error_of([&] {
          make_cuda_kv_store({2, 1, 64, 0}, full_options(), stream);
        }).starts_with("KV store: expected positive sizes"));
}
