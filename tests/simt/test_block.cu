// One block: reductions, exchanges, barriers.
#include <doctest/doctest.h>

#include <vector>

#include "device/cuda.h"
#include "device/kernel.cuh"

using namespace thaw;

namespace {

// out[block] = sum of the block's part of x. Grid: blocks; block: any; shared: one float a warp.
__global__ void sum_rows(float* out, const float* x, int cols) {
  float sum = 0;
  for (int i = threadIdx.x; i < cols; i += blockDim.x) sum += x[blockIdx.x * cols + i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

}  // namespace

TEST_CASE("simt: a block reduction") {
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
