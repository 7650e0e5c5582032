// The ops on the GPU against the definition: every format, odd shapes, both RoPE pairings.
//
// Tolerances are on the error's power relative to the result's (NMSE). A lane adds K / 32 products
// and five steps join the lanes: about 20 roundings of 2^-24, each of power 2^-48 / 12, so 1e-14;
// 1e-11 leaves room for sums that cancel. q and k add the rounding of the angle in f32: at position
// 117 that is 117 x 2^-24 = 7e-6, squared 5e-11.
//
// Where weights are codes, activations are rounded to integers up to 32512, of the largest of a
// block of 32, which is at most sqrt(32) times their rms, for normal numbers some 2.5 times: a step
// has the power (2.5 / 32512)^2 / 12 = 5e-10 of theirs, and a sum of products that share of its
// own. 2e-9 holds blocks whose largest number is twice that.
//
// With more than 8 rows, numbers are rounded to the product's format, by at most u = 2^-11 (f16) or
// 2^-8 (bf16) of them and evenly: less than u^2 / 3 of the power; quantised weights are rounded as
// well. Errors of different products are independent, so a sum has the same share of its power. h
// is a product of two sums, and silu's slope adds to it: four times.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda.h"
#include "model/device_weights.h"
#include "model/gemm_cuda.h"
#include "model/ops_cuda.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/reference.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;
using testing::nmse;

namespace {

using Vector = std::vector<float>;

constexpr DType kTypes[] = {DType::kF32,  DType::kF16,  DType::kBF16,
                            DType::kQ8_0, DType::kQ4_0, DType::kQ4_1};

// Of a product with n_rows rows.
double tolerance(DType type, std::int64_t n_rows) {
  if (n_rows <= 8 && dtype_info(type).block > 1) return 2e-9;
  if (n_rows <= 8 || type == DType::kF32) return 1e-11;
  if (type == DType::kBF16) return 0x1p-16 / 3;
  return (type == DType::kF16 ? 1 : 2) * 0x1p-22 / 3;
}

constexpr int kAllPairs = 16;  // of weight rows that a multiprocessor takes at a time

bool is_float(DType type) { return dtype_info(type).block == 1; }

// What the ops gave, or should have, for T rows.
struct Results {
  Vector x, q, k, v, added, h, logits;
};

// Copies of host memory on the device.
template <class T>
DeviceBuffer<T> on_device(const std::vector<T>& host, const Stream& stream) {
  DeviceBuffer<T> device(host.size(), "test");
  copy_to_device(device.data(), host.data(), host.size(), stream);
  return device;
}
Vector on_host(const DeviceBuffer<float>& device, const Stream& stream) {
  Vector host(device.size());
  copy_to_host(host.data(), device.data(), host.size(), stream);
  return host;
}

std::vector<std::int32_t> tokens_of(const Config& c, std::int64_t n_rows) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t t = 0; t < n_rows; ++t)
    tokens.push_back(static_cast<std::int32_t>((7 * t + 5) % c.vocab_size));
  return tokens;
}
std::vector<std::int32_t> positions_of(std::int64_t n_rows) {
  std::vector<std::int32_t> positions;
  for (std::int64_t t = 0; t < n_rows; ++t) positions.push_back(static_cast<std::int32_t>(100 + t));
  return positions;
}

// Every op of the last layer, on the rows of some tokens.
Results run(const testing::TinyModel& tiny, std::int64_t n_rows, const Observer& observer = {},
            bool by_graph = false) {
  const Config& c = tiny.model.config;
  const Weights& weights = tiny.model.weights;
  const LayerWeights& w = weights.layers.back();
  const Stream stream;
  const DeviceWeights device(weights, stream);
  const auto ops = make_cuda_ops(c, device, stream);
  ops->observe(observer);
  const auto tokens = on_device(tokens_of(c, n_rows), stream);
  const auto positions = on_device(positions_of(n_rows), stream);
  const auto buffer = [&](int cols) { return DeviceBuffer<float>(n_rows * cols, "test"); };
  const auto x = buffer(c.dim), q = buffer(c.q_dim()), k = buffer(c.kv_dim()),
             v = buffer(c.kv_dim()), added = buffer(c.dim), h = buffer(c.ffn_dim),
             logits = buffer(c.vocab_size);
  const auto all = [&] {
    ops->embed(x.data(), {tokens.data(), tokens.size()}, weights);
    ops->qkv(q.data(), k.data(), v.data(), x.data(), w, {positions.data(), positions.size()});
    copy_on_device(added.data(), x.data(), x.size(), stream);
    ops->project_add(added.data(), q.data(), w.wo, n_rows);
    ops->gate_up(h.data(), x.data(), w, n_rows);
    ops->logits(logits.data(), x.data(), weights, n_rows);
  };
  if (by_graph) {
    const Graph graph(stream, all);
    graph.launch(stream), graph.launch(stream);
    stream.synchronize();
  } else {
    all();
  }
  return {on_host(x, stream),     on_host(q, stream), on_host(k, stream),     on_host(v, stream),
          on_host(added, stream), on_host(h, stream), on_host(logits, stream)};
}

void append(Vector& to, const Vector& from) { to.insert(to.end(), from.begin(), from.end()); }

// The same by the definition; project_add takes the q that was computed.
Results expected(const testing::TinyModel& tiny, std::int64_t n_rows, const Vector& q) {
  const Config& c = tiny.model.config;
  const Weights& weights = tiny.model.weights;
  const LayerWeights& w = weights.layers.back();
  Results r;
  for (std::int64_t t = 0; t < n_rows; ++t) {
    Vector row(c.dim);
    dequantize(row.data(), weights.embedding.row(tokens_of(c, n_rows)[t]), weights.embedding.type,
               c.dim);
    append(r.x, row);
    const Vector n = reference::rms_norm(row, w.attn_norm, c.norm_eps);
    Vector rq = reference::project(w.wq, n), rk = reference::project(w.wk, n);
    reference::rope(rq, positions_of(n_rows)[t], c);
    reference::rope(rk, positions_of(n_rows)[t], c);
    append(r.q, rq), append(r.k, rk), append(r.v, reference::project(w.wv, n));
    Vector sum = row;
    reference::add(sum, reference::project(
                            w.wo, {q.begin() + t * c.q_dim(), q.begin() + (t + 1) * c.q_dim()}));
    append(r.added, sum);
    const Vector f = reference::rms_norm(row, w.ffn_norm, c.norm_eps);
    const Vector gate = reference::project(w.w_gate, f);
    Vector up = reference::project(w.w_up, f);
    for (std::size_t i = 0; i < up.size(); ++i)
      up[i] = static_cast<float>(up[i] * (gate[i] / (1 + std::exp(-double{gate[i]}))));
    append(r.h, up);
    append(r.logits, reference::project(weights.output,
                                        reference::rms_norm(row, weights.final_norm, c.norm_eps)));
  }
  return r;
}

void check(const testing::TinyModel& tiny, std::int64_t n_rows, const Results& got) {
  const Results e = expected(tiny, n_rows, got.q);
  const double limit = tolerance(tiny.model.weights.output.type, n_rows);
  CHECK(got.x == e.x);
  CHECK(nmse(got.q, e.q) <= std::max(limit, 1e-10));
  CHECK(nmse(got.k, e.k) <= std::max(limit, 1e-10));
  CHECK(nmse(got.v, e.v) <= limit);
  CHECK(nmse(got.added, e.added) <= limit);
  CHECK(nmse(got.h, e.h) <= 4 * limit);
  CHECK(nmse(got.logits, e.logits) <= limit);
}

bool same(const Results& a, const Results& b) {
  return a.x == b.x && a.q == b.q && a.k == b.k && a.v == b.v && a.added == b.added && a.h == b.h &&
         a.logits == b.logits;
}

// Sizes that fill no unit, no warp and no group of rows where the format can have them.
testing::TinyOptions odd_shape(DType type) {
  testing::TinyOptions o{.type = type, .dim = 96, .n_layers = 1};
  o.n_heads = 3, o.n_kv_heads = 1, o.head_dim = 32, o.ffn_dim = 160, o.vocab_size = 67;
  if (is_float(type)) {
    o.dim = 102, o.n_heads = 6, o.n_kv_heads = 2, o.head_dim = 10, o.ffn_dim = 77;
  }
  o.rope_factors = linear_rope_factors(o.head_dim, 2.5);
  return o;
}

// project_add of T rows alone, x = 1 at first.
void check_project(DType type, std::int64_t n_rows, int rows, int cols) {
  CAPTURE(dtype_info(type).name);
  CAPTURE(n_rows);
  CAPTURE(rows);
  CAPTURE(cols);
  testing::TinyModel tiny = testing::make_tiny_model({.dim = 32, .n_layers = 1, .vocab_size = 2});
  testing::Random random(3);
  const auto bytes = testing::encode(random.normals(std::int64_t{rows} * cols), type);
  Tensor& w = tiny.model.weights.layers[0].w_down;
  w = {"w", type, rows, cols, bytes.data()};
  const Vector h = random.normals(n_rows * cols);
  const Stream stream;
  const DeviceWeights device(tiny.model.weights, stream);
  const auto ops = make_cuda_ops(tiny.model.config, device, stream);
  const auto x = on_device(Vector(n_rows * rows, 1.0f), stream), dh = on_device(h, stream);
  ops->project_add(x.data(), dh.data(), w, n_rows);
  Vector e;
  for (std::int64_t t = 0; t < n_rows; ++t) {
    Vector y = reference::project(w, {h.begin() + t * cols, h.begin() + (t + 1) * cols});
    for (float& value : y) value += 1;
    append(e, y);
  }
  CHECK(nmse(on_host(x, stream), e) <= tolerance(type, n_rows));
}

}  // namespace

TEST_CASE("cuda ops: each op equals the definition, every format, both pairings") {
  for (DType type : kTypes)
    for (std::int64_t n_rows : {1, 2, 8, 9, 17}) {
      CAPTURE(dtype_info(type).name);
      CAPTURE(n_rows);
      testing::TinyOptions o = odd_shape(type);
      o.pairing =
          n_rows % 2 == 0 || n_rows == 17 ? RopePairing::kInterleaved : RopePairing::kHalves;
      const testing::TinyModel tiny = testing::make_tiny_model(o);
      check(tiny, n_rows, run(tiny, n_rows));
    }
  testing::TinyOptions o = odd_shape(DType::kBF16);
  o.pairing = RopePairing::kInterleaved, o.rope_factors.clear(), o.tied = true;
  o.vocab_size = 2 * kAllPairs * device_facts().n_multiprocessors + 37;  // some turns
  const testing::TinyModel tiny = testing::make_tiny_model(o);
  check(tiny, 1, run(tiny, 1));
}

TEST_CASE("cuda ops: products that are staged in several chunks, and warps of several pairs") {
  for (DType type : kTypes) {
    check_project(type, 1, 6, (is_float(type) ? 16384 : 28672) + 96);
    check_project(type, 3, 5, (is_float(type) ? 4096 : 7168) + 32);
  }
  check_project(DType::kBF16, 1, 3, 16384 + 77);
  check_project(DType::kF32, 1, 1, 1);
  const int all_rows = 2 * kAllPairs * device_facts().n_multiprocessors;
  check_project(DType::kQ4_0, 1, all_rows + 37, 32);
  check_project(DType::kF16, 4, 2 * all_rows + 3, 8);
  check_project(DType::kF16, 4, all_rows + 3, 4096 + 8);
}

TEST_CASE("cuda ops: the GEMM in tiles, into any address, saturated") {
  for (DType type : kTypes)
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
        append(e, reference::project(w, {x.begin() + t * w.cols, x.begin() + (t + 1) * w.cols}));
      CHECK(nmse(got, e) <= tolerance(type, kT));

      // Twice the same layer's plans, and activations beyond f16.
      copy_to_device(dx.data(), Vector(x.size(), 1e6f).data(), x.size(), stream);
      gemm.set_activations(dx.data(), nullptr, 0, kT, static_cast<int>(w.cols));
      gemm.multiply("y", y.data(), device.matrix(w), false);
      const float peak = type == DType::kF32 || type == DType::kBF16 ? 1e6f : 65504.0f;
      const Vector row = reference::project(w, Vector(w.cols, peak));
      e.clear();
      for (int t = 0; t < kT; ++t) append(e, row);
      got = on_host(y, stream);
      got.pop_back();
      CHECK(nmse(got, e) <= 2 * tolerance(type, kT) + 0x1p-18);
    }
}

TEST_CASE("cuda ops: a GEMM of which a call failed multiplies when it is asked again") {
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

TEST_CASE("cuda ops: matrices of one op may differ in format") {
  using Types = std::pair<DType, DType>;
  for (auto [type, other_type] : {Types{DType::kQ4_0, DType::kQ8_0}, {DType::kBF16, DType::kF16}})
    for (std::int64_t n_rows : {1, 5, 12}) {
      testing::TinyModel tiny = testing::make_tiny_model({.type = type, .n_layers = 1});
      const testing::TinyModel other =
          testing::make_tiny_model({.type = other_type, .n_layers = 1, .seed = 2});
      LayerWeights& w = tiny.model.weights.layers[0];
      const LayerWeights& from = other.model.weights.layers[0];
      w.wv = from.wv, w.w_up = from.w_up;
      check(tiny, n_rows, run(tiny, n_rows));
    }
}

void check_feed_forward(testing::TinyOptions o, std::int64_t n_rows) {
  CAPTURE(dtype_info(o.type).name);
  CAPTURE(n_rows);
  const testing::TinyModel tiny = testing::make_tiny_model(o);
  const LayerWeights& w = tiny.model.weights.layers.back();
  const Stream stream;
  const DeviceWeights device(tiny.model.weights, stream);
  const auto ops = make_cuda_ops(tiny.model.config, device, stream);
  const Vector x = testing::Random(7).normals(n_rows * o.dim);
  const auto fused = on_device(x, stream), apart = on_device(x, stream);
  const DeviceBuffer<float> h(n_rows * o.ffn_dim, "test");
  ops->feed_forward(fused.data(), h.data(), w, n_rows);
  ops->gate_up(h.data(), apart.data(), w, n_rows);
  ops->project_add(apart.data(), h.data(), w.w_down, n_rows);
  CHECK(on_host(fused, stream) == on_host(apart, stream));
  CHECK(on_host(fused, stream) != x);
}

TEST_CASE("cuda ops: feed_forward is gate_up and project_add, bit for bit") {
  for (DType type : kTypes) {
    for (std::int64_t n_rows : {1, 8, 9, 17}) check_feed_forward(odd_shape(type), n_rows);
    testing::TinyOptions o = odd_shape(type);
    o.dim = 32, o.ffn_dim = 4 * 256 * 4 + 96;  // more than the loads that pack_rows begins with
    check_feed_forward(o, 9);                  // which packs more than eight rows
  }
}

TEST_CASE("cuda ops: rows longer than what a thread keeps, normalised and packed") {
  testing::TinyOptions o{.type = DType::kBF16, .dim = 8192 + 1024 + 24, .n_layers = 1};
  o.n_heads = 1, o.n_kv_heads = 1, o.head_dim = 8, o.ffn_dim = 8, o.vocab_size = 16;
  const testing::TinyModel tiny = testing::make_tiny_model(o);
  check(tiny, 9, run(tiny, 9));
}

TEST_CASE("cuda ops: the same bits whatever the order of threads, and from a graph") {
  for (DType type : {DType::kBF16, DType::kQ4_1})
    for (std::int64_t n_rows : {1, 6, 9}) {
      const testing::TinyModel tiny = testing::make_tiny_model(odd_shape(type));
      const Results first = run(tiny, n_rows);
      for (std::uint64_t seed : {2, 3}) {
        simt::set_seed(seed);
        CHECK(same(run(tiny, n_rows), first));
        if (simt::kIsSlow) break;
      }
      if (n_rows <= 8) CHECK(same(run(tiny, n_rows, {}, true), first));
    }
  simt::set_seed(1);
}

TEST_CASE("cuda ops: one row is one kernel an op, which reads each weight once") {
  for (DType type : kTypes) {
    CAPTURE(dtype_info(type).name);
    testing::TinyOptions o = odd_shape(type);
    o.dim = 128, o.n_heads = 4, o.n_kv_heads = 2, o.head_dim = 32, o.ffn_dim = 64;
    o.vocab_size = 32, o.rope_factors.clear();
    const testing::TinyModel tiny = testing::make_tiny_model(o);
    simt::counts().clear();
    run(tiny, 1);
    const auto check_one = [&](const char* name, std::int64_t bytes) {
      CHECK(simt::counts()[name].runs == 1);
      CHECK(simt::counts()[name].bytes == static_cast<double>(bytes));
    };
    const std::int64_t code_bytes = row_bytes(type, o.dim) - o.dim / 32 * scale_bytes(type);
    const std::int64_t row = code_bytes + n_scale_units(type, o.dim) * 16;
    check_one("embed", code_bytes);  // its scales are read as they are
    check_one("qkv", row * (128 + 64 + 64));
    check_one("project_add", row * 128);
    check_one("gate_up", row * 64 * 2);
    check_one("logits", row * 32);
  }
}

TEST_CASE("cuda ops: an observer gets every intermediate, in host memory") {
  const testing::TinyModel tiny = testing::make_tiny_model(odd_shape(DType::kF16));
  const Config& c = tiny.model.config;
  std::string names;
  Vector norm, q;
  const Results got = run(tiny, 3, [&](const ActivationView& view) {
    names += join(view.name, " ", view.layer, " ", view.rows, "x", view.cols, "\n");
    const Vector data(view.data, view.data + view.rows * view.cols);
    if (view.name == "attn_norm") norm = data;
    if (view.name == "q") q = data;
  });
  CHECK(names == join("embed -1 3x102\nattn_norm 0 3x102\nq 0 3x60\nk 0 3x20\nv 0 3x20\n",
                      "ffn_norm 0 3x102\nffn_hidden 0 3x77\nfinal_norm -1 3x102\n",
                      "logits -1 3x67\n"));
  CHECK(q == got.q);
  Vector e;
  for (int t = 0; t < 3; ++t)
    append(e, reference::rms_norm({got.x.begin() + t * c.dim, got.x.begin() + (t + 1) * c.dim},
                                  tiny.model.weights.layers[0].attn_norm, c.norm_eps));
  CHECK(nmse(norm, e) <= 1e-13);
}

TEST_CASE("cuda ops: unknown tokens become NaN, unknown tensors are refused") {
  const testing::TinyModel tiny = testing::make_tiny_model({.vocab_size = 40});
  const testing::TinyModel other = testing::make_tiny_model();
  const Stream stream;
  const DeviceWeights device(tiny.model.weights, stream);
  const auto ops = make_cuda_ops(tiny.model.config, device, stream);
  const auto tokens = on_device(std::vector<std::int32_t>{-1, 39, 40}, stream);
  const DeviceBuffer<float> x(3 * 64, "x");
  ops->embed(x.data(), {tokens.data(), 3}, tiny.model.weights);
  const Vector rows = on_host(x, stream);
  for (int i = 0; i < 3 * 64; ++i) CHECK(std::isnan(rows[i]) == (i / 64 != 1));
  const Tensor& foreign = other.model.weights.layers[0].wo;
  CHECK(error_of([&] { ops->project_add(x.data(), x.data(), foreign, 1); }) ==
        "layer.0.wo: not in device memory");
  CHECK_THROWS_AS(device.norm(other.model.weights.final_norm), Error);
}

TEST_CASE("cuda ops: a tied output head is copied once") {
  testing::TinyOptions o = odd_shape(DType::kQ8_0);
  const Stream stream;
  const testing::TinyModel own = testing::make_tiny_model(o);
  o.tied = true;
  const testing::TinyModel tied = testing::make_tiny_model(o);
  const Tensor& output = own.model.weights.output;
  const int units = static_cast<int>(output.cols) / 16 + n_scale_units(output.type, o.dim);
  const std::size_t head = static_cast<std::size_t>(output.rows) * units * 16;
  CHECK(DeviceWeights(own.model.weights, stream).bytes() ==
        DeviceWeights(tied.model.weights, stream).bytes() + head);
}
