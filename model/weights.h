// The tensors of a model. Matrices stay as stored; norm vectors are widened to f32 when loaded.
#pragma once

#include <vector>

#include "model/tensor.h"

namespace thaw {

struct LayerWeights {
  int index = 0;                  // which layer; for messages and the observer
  std::vector<float> attn_norm;   // dim
  Tensor wq;                      // q_dim x dim
  Tensor wk;                      // kv_dim x dim
  Tensor wv;                      // kv_dim x dim
  Tensor wo;                      // dim x q_dim
  std::vector<float> ffn_norm;    // dim
  Tensor w_gate;                  // ffn_dim x dim
  Tensor w_up;                    // ffn_dim x dim
  Tensor w_down;                  // dim x ffn_dim
};

struct Weights {
  Tensor embedding;               // vocab_size x dim
  std::vector<LayerWeights> layers;
  std::vector<float> final_norm;  // dim
  Tensor output;                  // vocab_size x dim; a copy of the `embedding` view when tied
};

}  // namespace thaw
