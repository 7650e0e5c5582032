#include "kvstore/step_order.h"

#include "device/error.h"

namespace thaw {

void StepOrder::prepare(const KvShape& shape, int n_tokens, Phase phase) {
  const auto [first, most] = least_most();
  require(phase != Phase::kDecode || n_tokens == 1, "KV store: decode: expected 1 token, found ",
          n_tokens);
  require(n_tokens > 0, "KV store: expected at least 1 token, found ", n_tokens);
  require(n_tokens <= shape.capacity - first, "KV store: expected at most ", shape.capacity,
          " tokens, found ", std::int64_t{first} + n_tokens);
  require(first == most, "KV store: the last step reached only some layers; rewind first");
  const auto left = std::find_if(layers_.begin(), layers_.end(),
                                 [](const Layer& layer) { return layer.is_unsettled; });
  require(left == layers_.end(), "KV store: begin: expected layers that are settled, found layer ",
          left - layers_.begin(), " only appended; rewind first");
  n_tokens_ = 0;
}

void StepOrder::check_append(int layer, int n_tokens) const {
  require(n_tokens_ > 0, "KV store: append: expected a step that has begun, found none");
  require(n_tokens == n_tokens_, "KV store: layer ", layer, ": append: expected the step's ",
          n_tokens_, " tokens, found ", n_tokens);
  require(tokens(layer) == first_, "KV store: layer ", layer,
          ": append: expected one a step, found a second");
}

void StepOrder::settle(int layer) {
  require(at(layer).is_unsettled, "KV store: layer ", layer, ": settled without an append");
  at(layer).is_unsettled = false;
}

void StepOrder::rewind(int position) {
  std::fill(layers_.begin(), layers_.end(), Layer{position, false});
  n_tokens_ = 0;
}

std::pair<int, int> StepOrder::least_most() const {
  const auto [least, most] =
      std::minmax_element(layers_.begin(), layers_.end(),
                          [](const Layer& a, const Layer& b) { return a.tokens < b.tokens; });
  return {least->tokens, most->tokens};
}

}  // namespace thaw
