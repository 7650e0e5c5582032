// device/kernel.cuh: formats, tensor cores, asynchronous copies.
#include <doctest/doctest.h>

#include <cmath>
#include <vector>

#include "device/cuda.h"
#include "device/half.h"
#include "device/kernel.cuh"
#include "tests/simt/crash.h"
#include "tests/simt/simt.h"

using namespace thaw;
using simt::contains;
using simt::output_of;

namespace {

// d (16 x 8) = a (16 x 16) b^T (b: 8 x 16). One warp; fragments are read from memory one by one.
template <class T>
__global__ void multiply(float* d, const T* a, const T* b) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  std::uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) memcpy(&fa[i], a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8, 4);
  for (int i = 0; i < 2; ++i) memcpy(&fb[i], b + g * 16 + 2 * t + i * 8, 4);
  float sum[4] = {};
  mma_16x8x16<T>(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// The same by load_matrices: a as it is, and b from its transpose (16 x 8).
template <class T>
__global__ void multiply_by_rows(float* d, const T* a, const T* b) {
  __shared__ __align__(16) T sa[16 * 16];
  __shared__ __align__(16) T sb[16 * 8];
  const int lane = lane_index(), g = lane / 4, t = lane % 4;
  for (int i = lane; i < 16 * 16; i += kWarp) sa[i] = a[i];
  for (int i = lane; i < 16 * 8; i += kWarp) sb[i] = b[i % 8 * 16 + i / 8];
  __syncwarp();  // both are complete
  std::uint32_t fa[4], fb[4];
  load_matrices(fa, sa + lane % 16 * 16 + lane / 16 * 8);
  load_matrices<true>(fb, sb + lane % 16 * 8);
  float sum[4] = {};
  mma_16x8x16<T>(sum, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

template <class T>
void check_product(void (*kernel)(float*, const T*, const T*)) {
  std::vector<T> a(16 * 16), b(8 * 16);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i * 7 % 11) - 5.0f;
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<float>(i * 5 % 13) - 6.0f;
  const Stream stream;
  DeviceBuffer<T> da(a.size(), "a"), db(b.size(), "b");
  DeviceBuffer<float> dd(16 * 8, "d");
  std::vector<float> d(16 * 8);
  copy_to_device(da.data(), a.data(), a.size(), stream);
  copy_to_device(db.data(), b.data(), b.size(), stream);
  launch("multiply", kernel, 1, 32, 0, stream, dd.data(), da.data(), db.data());
  copy_to_host(d.data(), dd.data(), d.size(), stream);
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      float expected = 0;
      for (int k = 0; k < 16; ++k) expected += float{a[r * 16 + k]} * float{b[c * 16 + k]};
      CHECK(d[r * 8 + c] == expected);
    }
  }
}

// d (16 x 8) = a (16 x 32) b^T (b: 8 x 32).
__global__ void multiply_integers(int* d, const std::int8_t* a, const std::int8_t* b) {
  const int g = lane_index() / 4, t = lane_index() % 4;
  std::uint32_t fa[4], fb[2];
  for (int i = 0; i < 4; ++i) memcpy(&fa[i], a + (g + i % 2 * 8) * 32 + 4 * t + i / 2 * 16, 4);
  for (int i = 0; i < 2; ++i) memcpy(&fb[i], b + g * 32 + 4 * t + i * 16, 4);
  int sum[4] = {1, 1, 1, 1};
  mma_16x8x32(sum, fa, fb);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sum[i];
}

// out[i] = x[i] by way of shared memory, four floats a thread; the second half is not read.
__global__ void copy_async(float* out, const float* x, bool wait) {
  float* tile = dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x) * 4;
  tile[i] = -1;
  cp_async_16(tile + i, x + i, threadIdx.x < blockDim.x / 2);
  cp_async_commit();
  if (wait) cp_async_wait<0>();
  __syncthreads();  // other threads' copies have arrived, too
  const int other = static_cast<int>(blockDim.x) * 4 - 4 - i;
  for (int j = 0; j < 4; ++j) out[other + j] = tile[other + j];
}

// Two groups on their way: waiting for all but one lands the older.
__global__ void copy_two_groups(float* out, const float* x) {
  float* tile = dynamic_shared<float>();
  cp_async_16_once(tile, x, true), cp_async_commit();
  cp_async_16(tile + 4, x + 4), cp_async_commit();
  cp_async_wait<1>();
  out[0] = tile[0], out[1] = tile[4];
  cp_async_wait<0>();
  out[2] = tile[4];
}

__global__ void formats(float* out, std::uint32_t* bits, const float* x) {
  const int i = static_cast<int>(threadIdx.x);
  bits[2 * i] = pack2<__half>(x[i], -x[i]);
  bits[2 * i + 1] = pack2<__nv_bfloat16>(x[i], -x[i]);
  out[2 * i] = unpack2<__half>(bits[2 * i]).x;
  out[2 * i + 1] = unpack2<__nv_bfloat16>(bits[2 * i + 1]).y;
}

std::vector<float> run_copy_async(bool wait) {
  const Stream stream;
  PinnedBuffer<float> x(256, "x");
  DeviceBuffer<float> dx(256, "x"), out(256, "out");
  std::vector<float> got(256);
  for (int i = 0; i < 256; ++i) x.data()[i] = static_cast<float>(i);
  copy_to_device(dx.data(), x.data(), 256, stream);
  launch("copy_async", copy_async, 1, 64, 1024, stream, out.data(), dx.data(), wait);
  copy_to_host(got.data(), out.data(), 256, stream);
  return got;
}

}  // namespace

TEST_CASE("kernel.cuh: mma_16x8x16 and load_matrices are a plain product") {
  check_product<__half>(multiply<__half>);
  check_product<__nv_bfloat16>(multiply<__nv_bfloat16>);
  check_product<__half>(multiply_by_rows<__half>);
  check_product<__nv_bfloat16>(multiply_by_rows<__nv_bfloat16>);
}

TEST_CASE("kernel.cuh: mma_16x8x32 is a plain product") {
  std::vector<std::int8_t> a(16 * 32), b(8 * 32);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<std::int8_t>(i * 37 % 255);
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<std::int8_t>(i * 53 % 251);
  const Stream stream;
  DeviceBuffer<std::int8_t> da(a.size(), "a"), db(b.size(), "b");
  DeviceBuffer<int> dd(16 * 8, "d");
  std::vector<int> d(16 * 8);
  copy_to_device(da.data(), a.data(), a.size(), stream);
  copy_to_device(db.data(), b.data(), b.size(), stream);
  launch("multiply", multiply_integers, 1, 32, 0, stream, dd.data(), da.data(), db.data());
  copy_to_host(d.data(), dd.data(), d.size(), stream);
  for (int r = 0; r < 16; ++r) {
    for (int c = 0; c < 8; ++c) {
      int expected = 1;
      for (int k = 0; k < 32; ++k) expected += a[r * 32 + k] * b[c * 32 + k];
      CHECK(d[r * 8 + c] == expected);
    }
  }
}

TEST_CASE("crash copies never waited for" * doctest::skip()) { run_copy_async(false); }

TEST_CASE("kernel.cuh: asynchronous copies land when they are waited for") {
  simt::counts().clear();
  const std::vector<float> got = run_copy_async(true);
  CHECK(simt::counts()["copy_async"].bytes == 512);
  for (int i = 0; i < 256; ++i) CHECK(got[i] == (i < 128 ? static_cast<float>(i) : 0.0f));
  CHECK(contains(output_of("crash copies never waited for"), "never waited for"));

  const Stream stream;
  DeviceBuffer<float> x(8, "x"), out(3, "out");
  const std::vector<float> host = {1, 2, 3, 4, 5, 6, 7, 8};
  std::vector<float> groups(3);
  copy_to_device(x.data(), host.data(), 8, stream);
  launch("copy_two_groups", copy_two_groups, 1, 1, 32, stream, out.data(), x.data());
  copy_to_host(groups.data(), out.data(), 3, stream);
  CHECK(groups[0] == 1);
  CHECK(std::isnan(groups[1]));  // still on its way
  CHECK(groups[2] == 5);
}

TEST_CASE("kernel.cuh: 16-bit formats round as the host's") {
  const std::vector<float> x = {0, 1.5f, 3.14159f, 65519, 1e-7f, 0.1f, INFINITY, 1e30f};
  const int n = static_cast<int>(x.size());
  const Stream stream;
  DeviceBuffer<float> dx(x.size(), "x"), dout(2 * x.size(), "out");
  DeviceBuffer<std::uint32_t> dbits(2 * x.size(), "bits");
  std::vector<float> out(2 * x.size());
  std::vector<std::uint32_t> bits(2 * x.size());
  copy_to_device(dx.data(), x.data(), x.size(), stream);
  launch("formats", formats, 1, n, 0, stream, dout.data(), dbits.data(), dx.data());
  copy_to_host(out.data(), dout.data(), out.size(), stream);
  copy_to_host(bits.data(), dbits.data(), bits.size(), stream);
  for (int i = 0; i < n; ++i) {
    CHECK((bits[2 * i] & 0xffffu) == f32_to_f16(x[i]));
    CHECK((bits[2 * i + 1] >> 16) == f32_to_bf16(-x[i]));
    CHECK(out[2 * i] == f16_to_f32(f32_to_f16(x[i])));
    CHECK(out[2 * i + 1] == bf16_to_f32(f32_to_bf16(-x[i])));
  }
}
