// The ops on the GPU against the definition: every format, odd shapes, both RoPE pairings.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "device/cuda.h"
#include "model/device_weights.h"
#include "model/ops_cuda.h"
#include "tests/compare.h"
#include "tests/error_of.h"
#include "tests/reference.h"
#include "tests/sanitized.h"
#include "tests/simt/products.h"
#include "tests/simt/simt.h"
#include "tests/tiny_model.h"

using namespace thaw;
using testing::error_of;
using testing::nmse;
using testing::on_device;
using testing::on_host;
using testing::Vector;

namespace {

constexpr int kAllPairs = 16;  // of weight rows that a multiprocessor takes at a time

bool is_float(DType type) { return dtype_info(type).block == 1; }

// What the ops gave, or should have, for T rows.
struct Results {
  Vector x, q, k, v, added, h, logits;
};

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
    testing::append(r.x, row);
    const Vector n = reference::rms_norm(row, w.attn_norm, c.norm_eps);
    Vector rq = reference::project(w.wq, n), rk = reference::project(w.wk, n);
    reference::rope(rq, positions_of(n_rows)[t], c);
    reference::rope(rk, positions_of(n_rows)[t], c);
    testing::append(r.q, rq), testing::append(r.k, rk),
        testing::append(r.v, reference::project(w.wv, n));
    Vector sum = row;
    reference::add(sum, reference::project(
                            w.wo, {q.begin() + t * c.q_dim(), q.begin() + (t + 1) * c.q_dim()}));
    testing::append(r.added, sum);
    const Vector f = reference::rms_norm(row, w.ffn_norm, c.norm_eps);
    const Vector gate = reference::project(w.w_gate, f);
    Vector up = reference::project(w.w_up, f);
    for (std::size_t i = 0; i < up.size(); ++i)
      up[i] = static_cast<float>(up[i] * (gate[i] / (1 + std::exp(-double{gate[i]}))));
    testing::append(r.h, up);
    testing::append(r.logits,
                    reference::project(weights.output,
                                       reference::rms_norm(row, weights.final_norm, c.norm_eps)));
  }
  return r;
}

void check(const testing::TinyModel& tiny, std::int64_t n_rows, const Results& got) {
  const Results e = expected(tiny, n_rows, got.q);
  const double limit = testing::product_error(tiny.model.weights.output.type, n_rows);
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
    testing::append(e, y);
  }
  CHECK(nmse(on_host(x, stream), e) <= testing::product_error(type, n_rows));
}

}  // namespace

TEST_CASE("cuda ops: each op equals the definition, every format, both pairings") {
  for (DType type : testing::product_types())
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

TEST_CASE("cuda ops: embed gives the definition's floats whatever the bits of a K-quant's block") {
  testing::Random random(5);
  for (DType type : {DType::kQ4_K, DType::kQ5_K, DType::kQ6_K})
    for (int cols : {256, 1280}) {  // part of a step, and a step and a part
      CAPTURE(dtype_info(type).name);
      CAPTURE(cols);
      testing::TinyOptions o{.type = type, .dim = cols, .n_layers = 1};
      o.n_heads = o.n_kv_heads = 1, o.head_dim = 32, o.vocab_size = 9;
      testing::TinyModel tiny = testing::make_tiny_model(o);
      std::vector<std::byte>& table = tiny.storage.front();
      const int block = dtype_info(type).block_bytes;
      for (int i = 0; i < std::ssize(table); ++i) {
        const int in_halves = i % block - k_d_at(type);  // d and e stay as they are
        if (in_halves < 0 || in_halves >= (type == DType::kQ6_K ? 2 : 4))
          table[i] = static_cast<std::byte>(random.below(256));
      }
      const Stream stream;
      const DeviceWeights device(tiny.model.weights, stream);
      const auto ops = make_cuda_ops(tiny.model.config, device, stream);
      const auto tokens = on_device(std::vector<std::int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8}, stream);
      const DeviceBuffer<float> x(9 * cols, "x");
      ops->embed(x.data(), {tokens.data(), tokens.size()}, tiny.model.weights);
      Vector e(9 * cols);
      dequantize(e.data(), table.data(), type, std::ssize(e));
      CHECK((on_host(x, stream) == e));
    }
}

TEST_CASE("cuda ops: products that are staged in several chunks, and warps of several pairs") {
  for (DType type : testing::product_types()) {
    const int block = std::max(32, dtype_info(type).block);
    check_project(type, 1, 6, (is_float(type) ? 16384 : 28672) + 3 * block);
    check_project(type, 3, 5, (is_float(type) ? 4096 : 7168) + block);
  }
  check_project(DType::kBF16, 1, 3, 16384 + 77);
  check_project(DType::kF32, 1, 1, 1);
  const int all_rows = 2 * kAllPairs * device_facts().n_multiprocessors;
  check_project(DType::kQ4_0, 1, all_rows + 37, 32);
  check_project(DType::kF16, 4, 2 * all_rows + 3, 8);
  check_project(DType::kF16, 4, all_rows + 3, 4096 + 8);
}

TEST_CASE("cuda ops: of a row with NaN no product is a number, and other rows stay") {
  for (DType type : {DType::kF32, DType::kF16, DType::kQ8_0, DType::kQ4_1, DType::kQ6_K})
    for (std::int64_t n_rows : {1, 3, 9}) {
      CAPTURE(dtype_info(type).name);
      CAPTURE(n_rows);
      const testing::TinyModel tiny = testing::make_tiny_model({.type = type, .n_layers = 1});
      const Tensor& w = tiny.model.weights.layers[0].w_down;
      const Stream stream;
      const DeviceWeights device(tiny.model.weights, stream);
      const auto ops = make_cuda_ops(tiny.model.config, device, stream);
      testing::Random random(3);
      Vector h = random.normals(n_rows * w.cols), results[2];
      for (Vector& result : results) {
        const auto x = on_device(Vector(n_rows * w.rows), stream), dh = on_device(h, stream);
        ops->project_add(x.data(), dh.data(), w, n_rows);
        result = on_host(x, stream);
        h[7] = NAN;
      }
      for (std::size_t i = 0; i < results[0].size(); ++i) {
        if (i < static_cast<std::size_t>(w.rows))
          CHECK(std::isnan(results[1][i]));
        else
          CHECK(results[1][i] == results[0][i]);
      }
    }
}

TEST_CASE("cuda ops: matrices of one op may differ in format") {
  using Types = std::pair<DType, DType>;
  for (auto [type, other_type] : {Types{DType::kQ4_0, DType::kQ8_0},
                                  {DType::kBF16, DType::kF16},
                                  {DType::kQ4_K, DType::kQ6_K}})
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
  const Config& c = tiny.model.config;
  const LayerWeights& w = tiny.model.weights.layers.back();
  const Stream stream;
  const DeviceWeights device(tiny.model.weights, stream);
  const auto ops = make_cuda_ops(c, device, stream);
  const Vector x = testing::Random(7).normals(n_rows * c.dim);
  const auto fused = on_device(x, stream), apart = on_device(x, stream);
  const DeviceBuffer<float> h(n_rows * c.ffn_dim, "test");
  ops->feed_forward(fused.data(), h.data(), w, n_rows);
  ops->gate_up(h.data(), apart.data(), w, n_rows);
  ops->project_add(apart.data(), h.data(), w.w_down, n_rows);
  CHECK(on_host(fused, stream) == on_host(apart, stream));
  CHECK(on_host(fused, stream) != x);
}

TEST_CASE("cuda ops: feed_forward is gate_up and project_add, bit for bit") {
  for (DType type : testing::product_types()) {
    for (std::int64_t n_rows : {1, 8, 9, 17}) check_feed_forward(odd_shape(type), n_rows);
    if (is_k_quant(type)) continue;  // what is packed is of f16, as for other codes
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
  for (DType type : testing::product_types()) {
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
    const auto code_bytes = [](const Tensor& t) {
      return std::int64_t{16} * n_units(t.type, static_cast<int>(t.cols));
    };
    const auto bytes = [&](const Tensor& t) {
      return t.rows * (code_bytes(t) + 16 * n_scale_units(t.type, static_cast<int>(t.cols)));
    };
    const LayerWeights& w = tiny.model.weights.layers[0];
    check_one("embed", code_bytes(tiny.model.weights.embedding));  // scales are read as they are
    check_one("qkv", bytes(w.wq) + bytes(w.wk) + bytes(w.wv));
    check_one("project_add", bytes(w.wo));
    check_one("gate_up", bytes(w.w_gate) + bytes(w.w_up));
    check_one("logits", bytes(tiny.model.weights.output));
    const int row = 16 * (n_units(type, 1024) + n_scale_units(type, 1024));
    CHECK(row <= row_bytes(type, 1024) * 101 / 100);  // bench counts the file's
  }
  testing::TinyModel tiny = testing::make_tiny_model(odd_shape(DType::kQ4_0));
  const testing::TinyModel other = testing::make_tiny_model(odd_shape(DType::kQ8_0));
  tiny.model.weights.layers[0].wv = other.model.weights.layers[0].wv;
  simt::counts().clear();
  run(tiny, 1);
  CHECK(simt::counts()["qkv"].runs == 2);  // one for each format
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
    testing::append(
        e, reference::rms_norm({got.x.begin() + t * c.dim, got.x.begin() + (t + 1) * c.dim},
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
