// Products of many rows, by cuBLASLt or its stand-in, against the definition.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "device/cuda.h"
#include "model/device_weights.h"
#include "model/gemm_cuda.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/reference.h"
#include "tests/simt/products.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;
using testing::nmse;
using testing::on_device;
using testing::on_host;
using testing::Vector;

TEST_CASE("cuda gemm: in tiles, into any address, saturated") {
  for (DType type : testing::product_types())
    for (std::size_t tile_bytes : {1, 3 * 64 * 2 + 5, 1 << 20}) {
      CAPTURE(dtype_info(type).name);
      CAPTURE(tile_bytes);
      constexpr int kT = 10;
      testing::TinyOptions o{.type = type, .n_layers = 1};
      o.vocab_size = 40;
      const testing::TinyModel tiny = testing::make_tiny_model(o);
      const Tensor& w = tiny.model.weights.output;  // 40 x 64: 13 tiles of three rows, and one row
      testing::Random random(4);
      Vector x = random.normals(kT * w.cols), e;
      const Stream stream;
      const DeviceWeights device(tiny.model.weights, stream);
      const auto dx = on_device(x, stream), y = on_device(Vector(kT * w.rows + 1, 2.0f), stream);
      Gemm gemm(stream, tile_bytes);
      gemm.set_activations(dx.data(), nullptr, 0, kT, static_cast<int>(w.cols));
      gemm.multiply("y", y.data() + 1, device.matrix(w), true);
      Vector got = on_host(y, stream);
      CHECK(got[0] == 2);
      got.erase(got.begin());
      for (float& value : got) value -= 2;
      for (int t = 0; t < kT; ++t)
        testing::append(
            e, reference::project(w, {x.begin() + t * w.cols, x.begin() + (t + 1) * w.cols}));
      CHECK(nmse(got, e) <= testing::product_error(type, kT));

      // Twice the same layer's plans, and activations beyond f16.
      copy_to_device(dx.data(), Vector(x.size(), 1e6f).data(), x.size(), stream);
      gemm.set_activations(dx.data(), nullptr, 0, kT, static_cast<int>(w.cols));
      gemm.multiply("y", y.data(), device.matrix(w), false);
      const float peak = type == DType::kF32 || type == DType::kBF16 ? 1e6f : 65504.0f;
      const Vector row = reference::project(w, Vector(w.cols, peak));
      e.clear();
      for (int t = 0; t < kT; ++t) testing::append(e, row);
      got = on_host(y, stream);
      got.pop_back();
      CHECK(nmse(got, e) <= 2 * testing::product_error(type, kT) + 0x1p-18);
    }
}

TEST_CASE("cuda gemm: one of which a call failed multiplies when it is asked again") {
  constexpr int kT = 10;
  testing::TinyOptions o{.type = DType::kQ8_0, .n_layers = 1};
  o.vocab_size = 40;
  const testing::TinyModel tiny = testing::make_tiny_model(o);
  const Stream stream;
  const DeviceWeights device(tiny.model.weights, stream);
  const DeviceMatrix& w = device.matrix(tiny.model.weights.output);
  testing::Random random(4);
  const auto x = on_device(random.normals(kT * w.cols), stream);
  const auto y = on_device(Vector(kT * w.rows), stream);
  const auto multiply = [&](Gemm& gemm) {
    gemm.set_activations(x.data(), nullptr, 0, kT, w.cols);
    gemm.multiply("y", y.data(), w, false);
    return on_host(y, stream);
  };
  Gemm whole(stream);
  const Vector expected = multiply(whole);
  int n_failed = 0;
  for (int call = 1;; ++call) {
    Gemm gemm(stream);
    simt::fail_call(call);
    const std::string error = error_of([&] { multiply(gemm); });
    simt::fail_call(0);
    forget_failure();
    if (error.empty()) break;
    ++n_failed;
    CAPTURE(error);
    fill_device(y.data(), 0, y.bytes(), stream);
    CHECK((multiply(gemm) == expected));
  }
  CHECK(n_failed > 8);
}
