// How many tokens each layer of a store holds, and whether the calls of a step come in their order:
// begin, then append and settle in each layer. A rewind ends a step wherever it is.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kvstore/kvstore.h"

namespace thaw {

class StepOrder {
 public:
  explicit StepOrder(int n_layers) : layers_(static_cast<std::size_t>(n_layers)) {}

  // Throws Error, with nothing changed, when a step of n_tokens cannot begin: they do not fit, or a
  // layer was not reached by the last step, or not settled. Otherwise none is open any more: one
  // that was begun and not appended to is given up.
  void prepare(const KvShape& shape, int n_tokens, Phase phase);
  void begin(int n_tokens) { first_ = length(), n_tokens_ = n_tokens; }
  // Throws Error unless it is the layer's turn, and these are as many as the step's tokens.
  void check_append(int layer, int n_tokens) const;
  void append(int layer) { at(layer) = {first_ + n_tokens_, true}; }  // they are there
  void settle(int layer);  // throws Error when nothing was appended
  void rewind(int position);

  int length() const { return least_most().first; }  // tokens that every layer holds
  int most() const { return least_most().second; }   // that any layer does
  int tokens(int layer) const { return layers_.at(static_cast<std::size_t>(layer)).tokens; }
  int first() const { return first_; }  // of the step
  int n_tokens() const { return n_tokens_; }
  int end() const { return first_ + n_tokens_; }

 private:
  struct Layer {
    int tokens = 0;
    bool is_unsettled = false;
  };
  Layer& at(int layer) { return layers_.at(static_cast<std::size_t>(layer)); }
  std::pair<int, int> least_most() const;

  std::vector<Layer> layers_;
  int first_ = 0, n_tokens_ = 0;  // of the step; 0 tokens: none is open
};

}  // namespace thaw
