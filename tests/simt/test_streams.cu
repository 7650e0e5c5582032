// The host's side: streams, events, graphs, memory, and calls that fail.
#include <doctest/doctest.h>

#include <chrono>
#include <set>
#include <string>
#include <vector>

#include "device/cuda.h"
#include "device/kernel.cuh"
#include "tests/error_of.h"
#include "tests/simt/crash.h"
#include "tests/simt/simt.h"

using namespace thaw;
using simt::contains;
using simt::output_of;
using testing::error_of;

namespace {

constexpr int kN = 64;

// x = a x + b, kN elements, one a thread.
__global__ void scale(float* x, float a, float b) { x[threadIdx.x] = a * x[threadIdx.x] + b; }
__global__ void scale_by_previous(float* x, const float* a, bool wait) {
  const float before = x[threadIdx.x];
  if (wait) wait_for_previous_kernel();
  x[threadIdx.x] = before * a[threadIdx.x];
  let_next_kernel_start();
}
__global__ void add(float* x, const float* y) { x[threadIdx.x] += y[threadIdx.x]; }

// A copy on one stream, a kernel on another, and the result back, with or without the event that
// orders the first two.
std::vector<float> two_streams(bool wait) {
  const Stream copies, kernels;
  const Event arrived;
  PinnedBuffer<float> x(kN, "x");
  DeviceBuffer<float> dx(kN, "x");
  for (int i = 0; i < kN; ++i) x.data()[i] = static_cast<float>(i);
  fill_device(dx.data(), 0, dx.bytes(), copies);
  copies.synchronize();
  copy_to_device(dx.data(), x.data(), kN, copies);
  arrived.record(copies);
  if (wait) kernels.wait(arrived);
  launch("scale", scale, 1, kN, 0, kernels, dx.data(), 2.0f, 1.0f);
  std::vector<float> got(kN);
  copy_to_host(got.data(), dx.data(), kN, kernels);
  return got;
}

// A graph with a fork and a join; x = 2 (x + 1) + 2 x each time.
std::vector<float> graph_runs(int runs) {
  const Stream stream, side;
  const Event forked, joined;
  DeviceBuffer<float> x(kN, "x"), y(kN, "y");
  std::vector<float> got(kN, 1.0f);
  copy_to_device(x.data(), got.data(), kN, stream);
  const Graph graph(stream, [&] {
    copy_on_device(y.data(), x.data(), kN, stream);
    forked.record(stream);
    side.wait(forked);
    launch("side", scale, 1, kN, 0, side, y.data(), 2.0f, 0.0f);
    joined.record(side);
    launch("main", scale, 1, kN, 0, stream, x.data(), 2.0f, 2.0f);
    stream.wait(joined);
    launch("add", add, 1, kN, 0, stream, x.data(), y.data());
  });
  for (int run = 0; run < runs; ++run) graph.launch(stream);
  copy_to_host(got.data(), x.data(), kN, stream);
  return got;
}

void overlap(bool wait) {
  const Stream stream;
  DeviceBuffer<float> x(kN, "x"), a(kN, "a");
  fill_device(x.data(), 0, x.bytes(), stream), fill_device(a.data(), 0, a.bytes(), stream);
  stream.synchronize();
  launch("scale", scale, 1, kN, 0, stream, a.data(), 2.0f, 1.0f);
  launch_overlapping("overlaps", scale_by_previous, 1, kN, 0, stream, x.data(), a.data(), wait);
  stream.synchronize();
}

}  // namespace

TEST_CASE("cuda.h: any legal order of two streams gives the same bits") {
  const std::vector<float> expected = two_streams(true);
  CHECK(expected[5] == 11.0f);
  for (int seed = 0; seed < 200; ++seed) {
    simt::set_seed(static_cast<std::uint64_t>(seed));
    if (two_streams(true) != expected) FAIL("seed " << seed);
    if (graph_runs(1)[3] != 6.0f) FAIL("graph, seed " << seed);
  }
}

#ifndef __SANITIZE_THREAD__
TEST_CASE("cuda.h: an event that is not waited for gives other bits for some seed") {
  std::set<std::vector<float>> results;
  for (int seed = 0; seed < 20; ++seed) {
    simt::set_seed(static_cast<std::uint64_t>(seed));
    results.insert(two_streams(false));
  }
  CHECK(results.size() == 3);  // the copy comes before the kernel, after it, or after all
}
TEST_CASE("cuda.h: what the host reads before it waits is old") {
  const Stream stream;
  DeviceBuffer<float> x(kN, "x");
  PinnedBuffer<float> host(kN, "host");
  host.data()[0] = -1;
  fill_device(x.data(), 0, x.bytes(), stream);
  copy_to_host(host.data(), x.data(), kN, stream);
  CHECK(host.data()[0] == -1);
  stream.synchronize();
  CHECK(host.data()[0] == 0);
}
#else
TEST_CASE("crash event not waited for" * doctest::skip()) { two_streams(false); }
TEST_CASE("crash read before waiting" * doctest::skip()) {
  const Stream stream;
  DeviceBuffer<float> x(kN, "x");
  fill_device(x.data(), 0, x.bytes(), stream);
  stream.synchronize();
  launch("scale", scale, 1, kN, 0, stream, x.data(), 2.0f, 1.0f);
  launch_overlapping("overlaps", scale_by_previous, 1, kN, 0, stream, x.data(), x.data(), true);
  stream.synchronize();
}
TEST_CASE("cuda.h: ThreadSanitizer reports what no event or wait orders") {
  CHECK(contains(output_of("crash event not waited for"), "data race"));
  CHECK(contains(output_of("crash read before waiting"), "data race"));
}
#endif

TEST_CASE("cuda.h: events say when work is done") {
  const Stream stream;
  const Event before, after;
  CHECK(before.done());  // never recorded
  DeviceBuffer<float> x(kN, "x");
  const auto start = std::chrono::steady_clock::now();
  before.record(stream);
  fill_device(x.data(), 0, x.bytes(), stream);
  after.record(stream);
  while (!after.done()) {
  }
  const std::chrono::duration<float, std::milli> wall = std::chrono::steady_clock::now() - start;
  CHECK(milliseconds(before, after) > 0);
  CHECK(milliseconds(before, after) <= wall.count());
}

TEST_CASE("cuda.h: a graph is recorded once and runs many times") {
  simt::counts().clear();
  CHECK(graph_runs(3)[0] == 106.0f);  // 1, 6, 26, 106: x -> 4 x + 2
  CHECK(simt::counts()["side"].runs == 3);
  CHECK(simt::counts()["copy on device"].bytes == 3 * kN * 4);
  CHECK(simt::counts()["copy to host"].runs == 1);

  const Stream stream, side;
  const Event forked;
  DeviceBuffer<float> x(kN, "x");
  const auto unjoined = [&] {
    forked.record(stream);
    side.wait(forked);
    fill_device(x.data(), 0, x.bytes(), side);
  };
  CHECK(error_of([&] { Graph graph(stream, unjoined); }) ==
        "graph capture: capturing stream has unjoined work");
  forget_failure();
  CHECK(error_of([&] { Graph graph(stream, [&] { stream.synchronize(); }); }) ==
        "stream synchronize: operation not permitted when stream is capturing");
  forget_failure();
  fill_device(x.data(), 0, x.bytes(), stream);  // the stream is whole again
  stream.synchronize();
}

TEST_CASE("crash host reads device memory" * doctest::skip()) {
  DeviceBuffer<float> x(kN, "x");
  CHECK(x.data()[3] == 0);
}
TEST_CASE("crash pageable argument" * doctest::skip()) {
  const Stream stream;
  std::vector<float> x(kN);
  launch("scale", scale, 1, kN, 0, stream, x.data(), 2.0f, 1.0f);
}
TEST_CASE("crash overlap without wait" * doctest::skip()) { overlap(false); }
TEST_CASE("crash leak" * doctest::skip()) {
  new DeviceBuffer<float>(kN, "x");  // never deleted
}
__global__ void write_behind(float* x) { x[kN - 1] = 1; }
TEST_CASE("crash written behind" * doctest::skip()) {
  const Stream stream;
  DeviceBuffer<float> x(kN - 1, "x");
  launch("write_behind", write_behind, 1, 1, 0, stream, x.data());
}

TEST_CASE("simt: misuse of memory and of overlap ends with what is wrong") {
  overlap(true);
  CHECK(contains(output_of("crash host reads device memory"),
                 "host code touched device memory: byte 12 of a buffer of 256"));
  CHECK(contains(output_of("crash pageable argument"), "memory that the device cannot see"));
  CHECK(contains(output_of("crash overlap without wait"), "called wait_for_previous_kernel"));
#ifndef __SANITIZE_ADDRESS__
  CHECK(contains(output_of("crash leak"), "never freed: 256 bytes of device memory"));
  CHECK(contains(output_of("crash written behind"), "was written behind its end"));
#endif
}

TEST_CASE("cuda.h: running out of memory says how much of what, and is not sticky") {
  CHECK(error_of([] { DeviceBuffer<char> x(std::size_t{3} << 30, "hot ring"); }) ==
        "hot ring: out of device memory: asked for 3072 MiB, 1024 MiB of 1024 MiB are free");
  DeviceBuffer<char> small(10, "small");
  CHECK(device_facts().free_memory == (std::size_t{1} << 30) - 10);
}

TEST_CASE("cuda.h: launches that cannot be name their shape") {
  const Stream stream;
  DeviceBuffer<float> x(kN, "x");
  const auto start = [&](int threads, std::size_t shared) {
    const std::string error =
        error_of([&] { launch("scale", scale, 1, threads, shared, stream, x.data(), 1.0f, 0.0f); });
    forget_failure();
    return error;
  };
  CHECK(start(2000, 0) ==
        "scale (grid 1x1x1, block 2000x1x1, 0 bytes of shared memory): invalid configuration "
        "argument");
  CHECK(start(kN, 100000) == "");  // more than 48 KiB is asked for
  CHECK(start(kN, 300000) ==
        "scale (grid 1x1x1, block 64x1x1, 300000 bytes of shared memory): invalid argument");
  stream.synchronize();
}

TEST_CASE("cuda.h: every call that fails is an Error, and sticky") {
  const auto everything = [] {
    const DeviceFacts facts = device_facts();
    two_streams(true);
    graph_runs(2);
    overlap(true);
    const Event event;
    static_cast<void>(event.done());
    event.synchronize();
  };
  everything();  // what is asked for once a process
  simt::fail_call(0);
  everything();
  const int n_calls = simt::fail_call(0);
  CHECK(n_calls > 40);
  for (int call = 1; call <= n_calls; ++call) {
    simt::fail_call(call);
    const std::string error = error_of(everything);
    simt::fail_call(0);
    if (error.empty()) FAIL("call " << call << " failed, and nobody noticed");
    const bool mild = error.find("out of device memory") != std::string::npos ||
                      error.find("refuses") != std::string::npos ||
                      error == "CUDA: no NVIDIA GPU found";
    const std::string next = error_of([] { Stream stream; });
    if (next != (mild ? "" : error)) FAIL("call " << call << ": " << error << ", " << next);
    forget_failure();
  }
}
