// What a store says to calls that come out of order, wherever it keeps its tokens.
#pragma once

#include <doctest/doctest.h>

#include "kvstore/kvstore.h"
#include "tests/error_of.h"

namespace thaw::testing {

// kv: an empty store of two layers whose policy asks prompts for no statistics. x: the numbers of
// three tokens, where append() reads them.
inline void check_step_order(KvStore& kv, const float* x) {
  const auto append = [&](int layer, int n) { kv.append(layer, x, x, n); };
  const auto layer = [&](int i, int n) { append(i, n), kv.settle(i, {}); };
  const auto error_of_append = [&](int i, int n) {
    return error_of([&] { append(i, n); });
  };
  const auto error_of_begin = [&] { return error_of([&] { kv.begin(1, Phase::kPrefill); }); };
  const std::string no_step = "KV store: append: expected a step that has begun, found none";
  const std::string partial = "KV store: the last step reached only some layers; rewind first";

  CHECK(error_of_append(0, 1) == no_step);
  CHECK(error_of([&] { kv.begin(0, Phase::kPrefill); }) ==
        "KV store: expected at least 1 token, found 0");
  kv.begin(2, Phase::kPrefill);  // a step may be given up before its first append
  kv.begin(3, Phase::kPrefill);
  CHECK(error_of_append(0, 2) ==
        "KV store: layer 0: append: expected the step's 3 tokens, found 2");
  layer(0, 3);
  CHECK(error_of([&] { kv.settle(0, {}); }) == "KV store: layer 0: settled without an append");
  CHECK(error_of_append(0, 3) == "KV store: layer 0: append: expected one a step, found a second");
  CHECK(error_of_begin() == partial);
  layer(1, 3);
  CHECK(kv.length() == 3);
  CHECK(error_of_append(1, 1) ==
        "KV store: layer 1: append: expected the step's 3 tokens, found 1");
  CHECK(error_of_append(1, 3) == "KV store: layer 1: append: expected one a step, found a second");

  kv.begin(2, Phase::kPrefill);
  append(0, 2), layer(1, 2);
  CHECK(error_of_begin() ==
        "KV store: begin: expected layers that are settled, found layer 0 only appended; rewind "
        "first");
  kv.rewind(3);
  CHECK(error_of_append(0, 2) == no_step);
  kv.begin(2, Phase::kPrefill);
  append(0, 2);
  kv.rewind(3);
  CHECK(error_of([&] { kv.settle(0, {}); }) == "KV store: layer 0: settled without an append");
  kv.begin(2, Phase::kPrefill);
  layer(0, 2), layer(1, 2);
  CHECK(kv.length() == 5);

  kv.begin(2, Phase::kPrefill);
  CHECK(
      error_of([&] { kv.begin(1000, Phase::kPrefill); }).starts_with("KV store: expected at most"));
  layer(0, 2), layer(1, 2);  // what was refused changed nothing
  kv.check();
  CHECK(kv.length() == 7);
}

}  // namespace thaw::testing
