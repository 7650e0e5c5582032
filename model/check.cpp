#include "model/check.h"

#include <cmath>

#include "device/error.h"

namespace thaw {
namespace {

class Finder {
 public:
  void vector(const std::string& name, const std::vector<float>& values) {
    NonFinite found{name};
    count(found, values, 0);
    if (found.count > 0) found_.push_back(found);
  }

  void matrix(const Tensor& tensor) {
    NonFinite found{tensor.name};
    row_.resize(static_cast<std::size_t>(tensor.cols));
    for (std::int64_t r = 0; r < tensor.rows; ++r) {
      dequantize(row_.data(), tensor.row(r), tensor.type, tensor.cols);
      count(found, row_, r * tensor.cols);
    }
    if (found.count > 0) found_.push_back(found);
  }

  std::vector<NonFinite> take() { return std::move(found_); }

 private:
  // Adds the non-finite ones of `values`, of which the first has index `start` in its tensor.
  static void count(NonFinite& found, const std::vector<float>& values, std::int64_t start) {
    for (std::size_t i = 0; i < values.size(); ++i) {
      if (std::isfinite(values[i])) continue;
      if (found.count++ == 0) found.first = start + static_cast<std::int64_t>(i);
    }
  }

  std::vector<NonFinite> found_;
  std::vector<float> row_;
};

}  // namespace

std::vector<NonFinite> find_non_finite(const Model& model) {
  const Weights& weights = model.weights;
  Finder finder;
  finder.matrix(weights.embedding);
  for (const LayerWeights& w : weights.layers) {
    finder.vector(join("attn_norm of layer ", w.index), w.attn_norm);
    for (const Tensor* t : {&w.wq, &w.wk, &w.wv, &w.wo}) finder.matrix(*t);
    finder.vector(join("ffn_norm of layer ", w.index), w.ffn_norm);
    for (const Tensor* t : {&w.w_gate, &w.w_up, &w.w_down}) finder.matrix(*t);
  }
  finder.vector("final_norm", weights.final_norm);
  if (!model.config.tied_output) finder.matrix(weights.output);
  return finder.take();
}

}  // namespace thaw
