// Every product and op against the definition, all formats, odd shapes.
//
// Tolerances are on the error's power relative to |w|^2 |x|^2 / K, the expected power of a dot
// product of K terms. f32 sums: (2^-24 sqrt(K))^2 = 4e-15 K, below 1e-11 for the K used here. Block
// formats add the rounding of activations to codes, uniform in steps of peak 2^-15, where the peak
// of 32 normal numbers is about 2.5 times their rms: 2.5^2 2^-30 / 12 = 4.9e-10. The mean of n
// squared errors stays below 1 + 2 sqrt(12 / n) + 24 / n times that, but for a chance of e^-12
// (Laurent and Massart's bound on the chi-square).
#include <doctest/doctest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "device/error.h"
#include "model/matmul.h"
#include "model/ops.h"
#include "tests/compare.h"
#include "tests/reference.h"
#include "tests/tiny_model.h"

using namespace thaw;

namespace {

double tolerance(DType type, std::size_t n_outputs) {
  const double n = static_cast<double>(n_outputs);
  return needs_codes(type) ? 4.9e-10 * (1 + 2 * std::sqrt(12 / n) + 24 / n) : 1e-11;
}

double power(std::span<const float> x) {
  double sum = 0;
  for (float value : x) sum += static_cast<double>(value) * value;
  return sum;
}

// out (T x rows) by the definition.
std::vector<float> expected_product(const Tensor& w, const std::vector<float>& x) {
  std::vector<float> out;
  for (std::size_t at = 0; at < x.size(); at += static_cast<std::size_t>(w.cols)) {
    const auto y = reference::project(w, {x.begin() + at, x.begin() + at + w.cols});
    out.insert(out.end(), y.begin(), y.end());
  }
  return out;
}

// Mean squared error of `out` against the definition, relative to the power expected.
double relative_error(const std::vector<float>& out, const Tensor& w, const std::vector<float>& x) {
  std::vector<float> all(static_cast<std::size_t>(w.rows * w.cols));
  for (std::int64_t r = 0; r < w.rows; ++r)
    dequantize(all.data() + r * w.cols, w.row(r), w.type, w.cols);
  const std::vector<float> expected = expected_product(w, x);
  return testing::nmse(out, expected) * power(expected) /
         (power(all) * power(x) / static_cast<double>(w.cols));
}

std::vector<float> product(const Tensor& w, const std::vector<float>& x, int n_threads,
                           float initial = 0) {
  const std::int64_t n_rows = static_cast<std::int64_t>(x.size()) / w.cols;
  std::vector<float> out(static_cast<std::size_t>(n_rows * w.rows), initial);
  Activations a;
  ThreadPool pool(n_threads);
  a.assign(x.data(), n_rows, w.cols, needs_codes(w.type), pool);
  const Product p{out.data(), w.rows, &w, initial != 0};
  matmul({&p, 1}, a, pool);
  return out;
}

}  // namespace

TEST_CASE("dequantize: each block format is what the gguf package reads") {
  std::ifstream file("tests/golden/blocks.json");
  REQUIRE_MESSAGE(file, "run the tests from the root of the repository");
  const auto golden = nlohmann::json::parse(file);
  for (DType type : testing::kAllTypes) {
    if (!needs_codes(type)) continue;
    CAPTURE(dtype_info(type).name);
    for (const auto& block : golden.at(std::string(dtype_info(type).name))) {
      const std::string hex = block.at("bytes");
      std::vector<std::byte> bytes;
      for (std::size_t i = 0; i < hex.size(); i += 2)
        bytes.push_back(static_cast<std::byte>(std::stoi(hex.substr(i, 2), nullptr, 16)));
      REQUIRE(static_cast<int>(bytes.size()) == dtype_info(type).block_bytes);
      std::vector<float> out(static_cast<std::size_t>(dtype_info(type).block));
      dequantize(out.data(), bytes.data(), type, dtype_info(type).block);
      CHECK(out == block.at("values").get<std::vector<float>>());
    }
  }
}

TEST_CASE("matmul: equals the definition for every format, with rows that fill no tile") {
  testing::Random random(5);
  for (DType type : testing::kAllTypes)
    for (std::int64_t n_rows : {1, 2, 3, 4, 5, 6, 7, 17})
      for (std::int64_t out_dim : {1, 15, 16, 33})
        for (std::int64_t cols : {32, 96, 256, 512, 544, 1056, 1280}) {
          if (cols % dtype_info(type).block != 0) continue;
          CAPTURE(dtype_info(type).name);
          CAPTURE(n_rows);
          CAPTURE(out_dim);
          CAPTURE(cols);
          const auto bytes = testing::encode(random.normals(out_dim * cols), type);
          const Tensor w{"w", type, out_dim, cols, bytes.data()};
          const std::vector<float> x = random.normals(n_rows * cols, 3);
          const auto out = product(w, x, 2);
          CHECK(relative_error(out, w, x) <= tolerance(type, out.size()));
        }
}

TEST_CASE("matmul: float formats take columns that are no multiple of anything") {
  testing::Random random(6);
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16})
    for (std::int64_t n_rows : {1, 5})
      for (std::int64_t cols : {1, 7, 65, 515}) {
        const auto bytes = testing::encode(random.normals(20 * cols), type);
        const Tensor w{"w", type, 20, cols, bytes.data()};
        const std::vector<float> x = random.normals(n_rows * cols);
        const auto out = product(w, x, 1);
        CHECK(relative_error(out, w, x) <= tolerance(type, out.size()));
      }
}

TEST_CASE("matmul: extreme codes do not overflow the integer sums") {
  for (DType type : testing::kAllTypes)
    for (std::int64_t n_rows : {1, 4}) {
      std::vector<float> values(256 * 16);
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = i % 32 == 0 ? -1.0f : 1.0f;
      const auto bytes = testing::encode(values, type);
      const Tensor w{"w", type, 16, 256, bytes.data()};
      const std::vector<float> x(static_cast<std::size_t>(n_rows * 256), 1e4f);
      const auto out = product(w, x, 1);
      CHECK(relative_error(out, w, x) <= tolerance(type, out.size()));
    }
}

TEST_CASE(
    "matmul: accumulates when asked; zero activations give zero; the same bits for any threads") {
  testing::Random random(8);
  for (DType type : testing::kAllTypes)
    for (std::int64_t n_rows : {1, 9}) {
      const int cols = is_k_quant(type) ? 256 : 96;
      const auto bytes = testing::encode(random.normals(100 * cols), type);
      const Tensor w{"w", type, 100, cols, bytes.data()};
      const std::vector<float> x = random.normals(n_rows * cols);
      const std::vector<float> plain = product(w, x, 1);
      std::vector<float> shifted = product(w, x, 1, 2.0f);
      for (std::size_t i = 0; i < plain.size(); ++i) CHECK(shifted[i] == plain[i] + 2.0f);
      for (int n_threads : {2, 3, 7}) CHECK(product(w, x, n_threads) == plain);
      CHECK(product(w, std::vector<float>(x.size()), 2) == std::vector<float>(plain.size()));
    }
}

TEST_CASE("matmul: of a row with NaN or infinity nothing is finite, other rows stay") {
  testing::Random random(11);
  for (DType type : testing::kAllTypes)
    for (std::int64_t n_rows : {1, 3, 4, 9})
      for (const float bad : {NAN, -NAN, INFINITY, -INFINITY}) {
        CAPTURE(dtype_info(type).name);
        CAPTURE(n_rows);
        CAPTURE(bad);
        const auto bytes = testing::encode(random.normals(20 * 512), type);
        const Tensor w{"w", type, 20, 512, bytes.data()};
        std::vector<float> x = random.normals(n_rows * 512);
        const auto finite = product(w, x, 1);
        x[300] = bad;
        const auto out = product(w, x, 1);
        for (std::size_t i = 0; i < out.size(); ++i)
          CHECK((i < 20 ? !std::isfinite(out[i]) : out[i] == finite[i]));
      }
}

TEST_CASE("matmul: matrices of several formats give together what each gives alone") {
  testing::Random random(7);
  const DType types[] = {DType::kF16, DType::kQ6_K, DType::kQ4_0};
  for (std::int64_t n_rows : {1, 5, 9}) {  // on AVX2 5 are few for floats, and many for codes
    CAPTURE(n_rows);
    const std::vector<float> x = random.normals(n_rows * 256);
    std::vector<std::byte> bytes[3];
    std::vector<float> out[3];
    Tensor w[3];
    Product products[3];
    for (int i = 0; i < 3; ++i) {
      const std::int64_t rows = 21 + 16 * i;
      bytes[i] = testing::encode(random.normals(rows * 256), types[i]);
      out[i].resize(static_cast<std::size_t>(n_rows * rows));
      w[i] = {"w", types[i], rows, 256, bytes[i].data()};
      products[i] = {out[i].data(), rows, &w[i], false};
    }
    Activations a;
    ThreadPool pool(2);
    a.assign(x.data(), n_rows, 256, true, pool);
    matmul(products, a, pool);
    for (int i = 0; i < 3; ++i) CHECK(out[i] == product(w[i], x, 1));
  }
}

TEST_CASE("matmul: a matrix that does not fit the activations is refused") {
  const std::vector<std::byte> bytes(4 * 64);
  const Tensor w{"blk.0.w", DType::kF32, 1, 64, bytes.data()};
  Activations a;
  const std::vector<float> x(32);
  ThreadPool pool(1);
  a.assign(x.data(), 1, 32, false, pool);
  float out;
  const Product p{&out, 1, &w, false};
  CHECK_THROWS_WITH_AS(matmul({&p, 1}, a, pool), "blk.0.w: cols: expected 32, found 64", Error);
}

TEST_CASE("ops: each op equals the definition, both RoPE pairings, scaled frequencies") {
  for (RopePairing pairing : {RopePairing::kInterleaved, RopePairing::kHalves})
    for (std::int64_t n_rows : {1, 2, 17}) {
      testing::TinyOptions options{.type = DType::kF32, .pairing = pairing};
      options.rope_factors = linear_rope_factors(options.head_dim, 2.5);
      const testing::TinyModel tiny = testing::make_tiny_model(options);
      const Config& c = tiny.model.config;
      const LayerWeights& w = tiny.model.weights.layers[1];
      ThreadPool pool(2);
      auto ops = make_cpu_ops(c, pool);
      testing::Random random(9);
      const std::vector<float> x = random.normals(n_rows * c.dim, 2);
      std::vector<std::int32_t> positions;
      for (std::int64_t t = 0; t < n_rows; ++t)
        positions.push_back(static_cast<std::int32_t>(100 + t));
      std::vector<float> q(n_rows * c.q_dim()), k(n_rows * c.kv_dim()), v(n_rows * c.kv_dim()),
          h(n_rows * c.ffn_dim);
      ops->qkv(q.data(), k.data(), v.data(), x.data(), w, positions);
      ops->gate_up(h.data(), x.data(), w, n_rows);
      std::vector<float> logits(n_rows * c.vocab_size);
      ops->logits(logits.data(), x.data(), tiny.model.weights, n_rows);
      std::vector<float> eq, ek, ev, eh, el;
      const auto append = [](std::vector<float>& to, const std::vector<float>& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      for (std::int64_t t = 0; t < n_rows; ++t) {
        const std::vector<float> row(x.begin() + t * c.dim, x.begin() + (t + 1) * c.dim);
        const auto n = reference::rms_norm(row, w.attn_norm, c.norm_eps);
        auto rq = reference::project(w.wq, n), rk = reference::project(w.wk, n);
        reference::rope(rq, positions[t], c), reference::rope(rk, positions[t], c);
        append(eq, rq), append(ek, rk), append(ev, reference::project(w.wv, n));
        const auto f = reference::rms_norm(row, w.ffn_norm, c.norm_eps);
        const auto gate = reference::project(w.w_gate, f);
        auto up = reference::project(w.w_up, f);
        for (std::size_t i = 0; i < up.size(); ++i)
          up[i] = static_cast<float>(up[i] * (gate[i] / (1 + std::exp(-double{gate[i]}))));
        append(eh, up);
        append(el, reference::project(
                       tiny.model.weights.output,
                       reference::rms_norm(row, tiny.model.weights.final_norm, c.norm_eps)));
      }
      // Angles are f32: at position 117 their rounding is 117 x 2^-24 = 7e-6, squared 5e-11.
      CHECK(testing::nmse(q, eq) <= 1e-10);
      CHECK(testing::nmse(k, ek) <= 1e-10);
      CHECK(testing::nmse(v, ev) <= 1e-12);
      CHECK(testing::nmse(h, eh) <= 1e-12);
      CHECK(testing::nmse(logits, el) <= 1e-12);
    }
}

TEST_CASE("ops: a token outside the vocabulary is refused") {
  const testing::TinyModel tiny = testing::make_tiny_model();
  ThreadPool pool(1);
  auto ops = make_cpu_ops(tiny.model.config, pool);
  std::vector<float> x(tiny.model.config.dim);
  for (std::int32_t token : {-1, 288}) {
    CHECK_THROWS_AS(ops->embed(x.data(), {&token, 1}, tiny.model.weights), Error);
  }
}
