// A block and its warps: every facility by a toy kernel, and every misuse by one that must fail.
#include <doctest/doctest.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "device/cuda.h"
#include "device/kernel.cuh"
#include "tests/simt/crash.h"
#include "tests/simt/simt.h"

using namespace thaw;
using simt::contains;
using simt::output_of;

namespace {

// out[block] = sum of row `block` of x.
__global__ void sum_rows(float* out, const float* x, int cols) {
  const int row = static_cast<int>(blockIdx.x);
  float sum = 0;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += x[row * cols + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[row] = sum;
}

// What each lane of one warp gets of the exchanges, lane by lane: out[lane * 12 + i].
__global__ void exchange_all(int* out) {
  const int lane = lane_index();
  int* mine = out + lane * 12;
  mine[0] = __shfl_sync(kAllLanes, lane, 5);
  mine[1] = __shfl_xor_sync(kAllLanes, lane, 3);
  mine[2] = __shfl_down_sync(kAllLanes, lane, 4);
  mine[3] = __shfl_up_sync(kAllLanes, lane, 4);
  mine[4] = __shfl_sync(kAllLanes, lane, 1, 8);
  mine[5] = static_cast<int>(__ballot_sync(kAllLanes, lane % 2));
  mine[6] = __any_sync(kAllLanes, lane == 9) + 2 * __all_sync(kAllLanes, lane >= 0);
  mine[7] = __reduce_add_sync(kAllLanes, lane - 100);
  mine[8] = __reduce_min_sync(kAllLanes, lane - 100);
  mine[9] = static_cast<int>(__reduce_max_sync(kAllLanes, static_cast<unsigned>(-lane - 1)));
  mine[10] = static_cast<int>(__reduce_or_sync(kAllLanes, 1u << lane));
  mine[11] = -1;
  if (lane < 4) mine[11] = __shfl_sync(0xfu, lane, 2);  // a part of the warp
}

__global__ void count_positive(int* out, const float* x) {
  out[threadIdx.x] = __syncthreads_count(x[threadIdx.x] > 0);
}

// Grid: any; adds one for each thread, by way of a shared counter.
__global__ void count_threads(int* total, float* sum) {
  __shared__ int of_block;
  const bool first = threadIdx.x + threadIdx.y + threadIdx.z == 0;
  if (first) of_block = 0;
  __syncthreads();  // of_block is set
  atomicAdd(&of_block, 1);
  __syncthreads();  // of_block is complete
  if (first) atomicAdd(total, of_block);
  atomicAdd(sum, 0.5f);
}

// The last block to end sums what all blocks left: fences order the parts behind the counter.
__global__ void last_block_sums(float* out, float* parts, unsigned* n_done, bool fenced) {
  __shared__ bool last;
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<float>(blockIdx.x);
    if (fenced) __threadfence();  // the part is visible before the count
    last = atomicAdd(n_done, 1u) + 1 == gridDim.x;
    if (fenced) __threadfence();  // the parts are read after the count
  }
  __syncthreads();  // last is set
  if (!last || threadIdx.x > 0) return;
  *out = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) *out += parts[i];
}

// Reads another thread's number, with or without the barrier that makes it wait for it.
__global__ void reverse(float* x, bool barrier) {
  __shared__ float tile[64];
  tile[threadIdx.x] = x[threadIdx.x];
  if (barrier) __syncthreads();  // the tile is full
  x[threadIdx.x] = tile[63 - threadIdx.x];
}

// Twice through the same tile; without the second barrier a fast thread's next number overtakes a
// slow thread's read.
__global__ void reverse_twice(float* x, bool barrier) {
  __shared__ float tile[64];
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = x[threadIdx.x];
    __syncthreads();  // the tile is full
    x[threadIdx.x] = tile[63 - threadIdx.x];
    if (barrier) __syncthreads();  // the tile is read
  }
}

__global__ void read_before_written(float* out) {
  __shared__ float tile[32];
  out[blockIdx.x * 32 + threadIdx.x] = tile[threadIdx.x] + dynamic_shared<float>()[threadIdx.x];
  __syncthreads();  // only then written
  tile[threadIdx.x] = 1, dynamic_shared<float>()[threadIdx.x] = 1;
}

// The last to write wins: a block, or a thread.
__global__ void blocks_race(float* out) {
  __syncthreads();
  if (threadIdx.x == 0) *out = static_cast<float>(blockIdx.x);
}
__global__ void threads_race(float* out) { *out = static_cast<float>(threadIdx.x); }

enum Misuse {
  kDivergent,
  kEnded,
  kLaneMissing,
  kOutsideMask,
  kBeyondShared,
  kBeyondDynamic,
  kBeyond
};

__global__ void misuse(float* x, Misuse how, int i) {
  __shared__ float tile[64];
  tile[threadIdx.x] = 0;
  if (how == kDivergent) {
    if (threadIdx.x < 40)
      __syncthreads();
    else
      __syncthreads();
  }
  if (how == kEnded && threadIdx.x == 40) return;
  if (how == kLaneMissing && threadIdx.x == 33) return;
  if (how == kOutsideMask) x[0] = __shfl_sync(0xfu, x[0], 0);
  if (how == kLaneMissing) x[0] = warp_sum(x[0]);
  if (how == kBeyondShared) *(&tile[0] + i) = 1;
  if (how == kBeyondDynamic) dynamic_shared<float>()[i] = 1;
  if (how == kBeyond && threadIdx.x == 3) x[i] = 1;
  __syncthreads();
  if (threadIdx.x < 64) x[threadIdx.x] = tile[63 - threadIdx.x];
}

void run_misuse(Misuse how, int i = 0) {
  const Stream stream;
  DeviceBuffer<float> x(100, "x");
  launch("misuse", misuse, 2, 64, 32 * sizeof(float), stream, x.data(), how, i);
  stream.synchronize();
}

}  // namespace

TEST_CASE("simt: a block reduction, for any number of warps") {
  constexpr int kRows = 5, kCols = 700;
  const Stream stream;
  PinnedBuffer<float> host(kRows * kCols, "x");
  DeviceBuffer<float> x(kRows * kCols, "x"), out(kRows, "out");
  for (int i = 0; i < kRows * kCols; ++i) host.data()[i] = static_cast<float>(i % 10);
  copy_to_device(x.data(), host.data(), x.size(), stream);
  for (int threads : {32, 64, 256, 1024}) {
    std::vector<float> sums(kRows);
    launch("sum_rows", sum_rows, kRows, threads, 0, stream, out.data(), x.data(), kCols);
    copy_to_host(sums.data(), out.data(), kRows, stream);
    for (float sum : sums) CHECK(sum == 3150.0f);
  }
}

TEST_CASE("simt: exchanges between lanes") {
  const Stream stream;
  DeviceBuffer<int> out(32 * 12, "out");
  std::vector<int> got(32 * 12);
  launch("exchange_all", exchange_all, 1, 32, 0, stream, out.data());
  copy_to_host(got.data(), out.data(), got.size(), stream);
  for (int lane = 0; lane < 32; ++lane) {
    const std::vector<int> expected = {5,
                                       lane ^ 3,
                                       lane < 28 ? lane + 4 : lane,
                                       lane >= 4 ? lane - 4 : lane,
                                       lane / 8 * 8 + 1,
                                       static_cast<int>(0xaaaaaaaau),
                                       3,
                                       31 * 16 - 3200,
                                       -100,
                                       -1,
                                       -1,
                                       lane < 4 ? 2 : -1};
    CHECK(std::vector<int>(got.begin() + lane * 12, got.begin() + lane * 12 + 12) == expected);
  }
}

TEST_CASE("simt: barriers that count, and atomics") {
  const Stream stream;
  DeviceBuffer<float> x(96, "x"), sum(1, "sum");
  DeviceBuffer<int> counts(96, "counts"), total(1, "total");
  std::vector<float> host(96, -1.0f), host_sum(1);
  host[7] = host[90] = 1;
  std::vector<int> got(96);
  copy_to_device(x.data(), host.data(), 96, stream);
  launch("count_positive", count_positive, 1, 96, 0, stream, counts.data(), x.data());
  copy_to_host(got.data(), counts.data(), 96, stream);
  CHECK(got == std::vector<int>(96, 2));

  fill_device(total.data(), 0, 4, stream), fill_device(sum.data(), 0, 4, stream);
  launch("count_threads", count_threads, dim3(3, 2), dim3(8, 4, 2), 0, stream, total.data(),
         sum.data());
  copy_to_host(got.data(), total.data(), 1, stream);
  copy_to_host(host_sum.data(), sum.data(), 1, stream);
  CHECK(got[0] == 6 * 64);
  CHECK(host_sum[0] == 6 * 32.0f);
}

static float sum_by_last_block(bool fenced) {
  const Stream stream;
  DeviceBuffer<float> out(1, "out"), parts(20, "parts");
  DeviceBuffer<unsigned> n_done(1, "n_done");
  float sum = 0;
  fill_device(n_done.data(), 0, 4, stream);
  launch("last_block_sums", last_block_sums, 20, 32, 0, stream, out.data(), parts.data(),
         n_done.data(), fenced);
  copy_to_host(&sum, out.data(), 1, stream);
  return sum;
}
TEST_CASE("simt: fences order what atomics announce") { CHECK(sum_by_last_block(true) == 190.0f); }

TEST_CASE("simt: shared memory that nobody wrote is NaN, in every block") {
  const Stream stream;
  DeviceBuffer<float> out(96, "out");
  for (int run = 0; run < 2; ++run) {
    std::vector<float> got(96);
    launch("read_before_written", read_before_written, 3, 32, 128, stream, out.data());
    copy_to_host(got.data(), out.data(), 96, stream);
    for (float x : got) CHECK(x != x);
  }
}

#ifndef __SANITIZE_THREAD__  // which would rightly report the races
TEST_CASE("simt: a seed fixes the order of blocks and threads") {
  const Stream stream;
  DeviceBuffer<float> out(1, "out");
  const auto winner = [&](int seed, void (*kernel)(float*), int blocks) {
    simt::set_seed(static_cast<std::uint64_t>(seed));
    float last = 0;
    launch("race", kernel, blocks, 64, 0, stream, out.data());
    copy_to_host(&last, out.data(), 1, stream);
    return last;
  };
  CHECK(winner(1, blocks_race, 50) == winner(1, blocks_race, 50));
  CHECK(winner(1, blocks_race, 50) != winner(2, blocks_race, 50));
  CHECK(winner(1, threads_race, 1) == winner(1, threads_race, 1));
  CHECK(winner(1, threads_race, 1) != winner(2, threads_race, 1));
}
#endif

TEST_CASE("crash divergent barrier" * doctest::skip()) { run_misuse(kDivergent); }
TEST_CASE("crash ended thread" * doctest::skip()) { run_misuse(kEnded); }
TEST_CASE("crash missing lane" * doctest::skip()) { run_misuse(kLaneMissing); }
TEST_CASE("crash outside mask" * doctest::skip()) { run_misuse(kOutsideMask); }
TEST_CASE("crash out of bounds" * doctest::skip()) { run_misuse(kBeyond, 1200); }
TEST_CASE("crash beyond dynamic shared" * doctest::skip()) { run_misuse(kBeyondDynamic, 32); }

TEST_CASE("simt: barriers and exchanges that cannot complete end with what is wrong") {
  const std::string divergent = output_of("crash divergent barrier");
  CHECK(contains(divergent, "simt: kernel misuse, block ("));
  CHECK(contains(divergent, "divergent __syncthreads: this thread is at tests/simt/test_block.cu"));
  CHECK(contains(output_of("crash ended thread"), "never completes: thread 40 has ended"));
  CHECK(contains(output_of("crash missing lane"), "never completes: lane 1 has ended"));
  CHECK(contains(output_of("crash outside mask"), "is not in its own mask 0000000f"));
}

#ifndef __SANITIZE_ADDRESS__  // which finds these first, and to the byte
TEST_CASE("simt: accesses far out of bounds end with the buffer and the thread") {
  const std::string out = output_of("crash out of bounds");
  CHECK(contains(out, "thread (3, 0, 0): out of bounds: byte 4800 of a buffer of 400 in device"));
  CHECK(contains(output_of("crash beyond dynamic shared"), "simt: kernel misuse"));
}
#else
TEST_CASE("crash beyond shared array" * doctest::skip()) { run_misuse(kBeyondShared, 64); }
TEST_CASE("crash just out of bounds" * doctest::skip()) { run_misuse(kBeyond, 100); }
TEST_CASE("simt: AddressSanitizer finds accesses out of bounds") {
  const std::string shared = output_of("crash beyond shared array");
  CHECK((shared.find("global-buffer-overflow") != std::string::npos ||
         shared.find("runtime error: store to address") != std::string::npos));  // both look
  CHECK(contains(output_of("crash just out of bounds"), "use-after-poison"));
  CHECK(contains(output_of("crash beyond dynamic shared"), "use-after-poison"));
}
#endif

static std::vector<float> reverse_tile(void (*kernel)(float*, bool), bool barrier) {
  const Stream stream;
  DeviceBuffer<float> x(64, "x");
  std::vector<float> host(64);
  std::iota(host.begin(), host.end(), 0.0f);
  copy_to_device(x.data(), host.data(), 64, stream);
  launch("reverse", kernel, 1, 64, 0, stream, x.data(), barrier);
  copy_to_host(host.data(), x.data(), 64, stream);
  return host;
}
TEST_CASE("simt: a missing barrier gives wrong numbers, too") {
  CHECK(reverse_tile(reverse, true)[5] == 58.0f);
  CHECK(reverse_tile(reverse_twice, true)[5] == 5.0f);
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)
  const std::vector<float> wrong = reverse_tile(reverse, false);
  CHECK(std::any_of(wrong.begin(), wrong.end(), [](float x) { return x != x; }));
#endif
}

#ifdef __SANITIZE_THREAD__
TEST_CASE("crash missing barrier" * doctest::skip()) { reverse_tile(reverse, false); }
TEST_CASE("crash missing second barrier" * doctest::skip()) { reverse_tile(reverse_twice, false); }
TEST_CASE("crash missing fence" * doctest::skip()) { sum_by_last_block(false); }
TEST_CASE("crash blocks race" * doctest::skip()) {
  const Stream stream;
  DeviceBuffer<float> out(1, "out");
  launch("blocks_race", blocks_race, 2, 32, 0, stream, out.data());
  stream.synchronize();
}
TEST_CASE("simt: ThreadSanitizer reports missing barriers and fences, and blocks that race") {
  CHECK(contains(output_of("crash missing barrier"), "data race"));
  CHECK(contains(output_of("crash missing second barrier"), "data race"));
  CHECK(contains(output_of("crash missing fence"), "data race"));
  CHECK(contains(output_of("crash blocks race"), "data race"));
}
#endif
