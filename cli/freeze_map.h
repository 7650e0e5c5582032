// The freeze map: what the KV store did with each token at each step, gathered while the model
// runs, then written as one page that needs nothing beside it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cli/cell_stream.h"
#include "kvstore/policy.h"
#include "kvstore/recorder.h"

namespace thaw {

class FreezeMap : public KvRecorder {
 public:
  // What one token went through, over all layers and KV heads.
  struct Token {
    std::int32_t born = 0;       // the first step that sees it
    std::int64_t hot_steps = 0;  // steps it was hot at the end of, a sum over heads
    std::int32_t recalls = 0;    // a sum over heads
    std::int32_t hits = 0;       // the most of any head
    float probability = 0;       // of its last event that had one
  };
  struct Recovery {
    int step;
    Rung rung;
    float value;  // what set it off
  };
  // Means over the steps of a column, but for the length, which is that of the last step. Of each
  // layer, in the order of kLayerSeries; then of the store, in the order of kStoreSeries.
  static constexpr const char* kLayerSeries[] = {"entropy", "ghost_mass", "threshold",
                                                 "hot",     "budget",     "recalled"};
  static constexpr const char* kStoreSeries[] = {"length",          "hot_bytes", "ghost_bytes",
                                                 "cold_bytes_read", "thawed",    "frozen"};

  // When the columns of all layers outgrow `limit` bytes, details go, then each two columns become
  // one; that also when they number max_columns.
  FreezeMap(int n_layers, int n_heads, std::size_t limit = std::size_t{6} << 20,
            int max_columns = 4096);

  void event(const KvEvent& event) override;
  void step(const KvStep& step) override;
  void output(int step, float entropy);  // of the distribution that a token is drawn from, nats
  void recovery(int step, Rung rung, float value);

  int n_layers() const { return static_cast<int>(layers_.size()); }
  int n_heads() const { return n_heads_; }
  int steps() const { return steps_; }
  bool detailed() const { return detailed_; }  // whether cells say probability, hits and timer
  int stride() const { return layers_[0].cells.stride(); }
  int columns() const { return (steps_ + stride() - 1) / stride(); }
  std::string cells(int layer) const {
    return layers_[static_cast<std::size_t>(layer)].cells.bytes();
  }
  std::vector<double> series() const;  // columns x series_width()
  std::size_t series_width() const;
  std::span<const float> outputs() const { return outputs_; }  // NaN where none was reported
  std::span<const Recovery> recoveries() const { return recoveries_; }
  std::vector<Token> tokens() const;
  // Share of the heads and steps of its life in which a token was hot. 1 before the first step.
  double hot_share(const Token& token) const;

 private:
  struct Residency {
    std::uint64_t hot = 0;   // a bit a head; heads beyond 64 share bits
    std::int32_t since = 0;  // steps counted in Token::hot_steps
    bool touched = false;    // in this step
    Cell cell;               // what the stream will be told of this step
  };
  struct Layer {
    std::vector<Residency> tokens;
    std::vector<std::int32_t> touched;
    CellStream cells;
  };
  void grow(std::size_t n_tokens);
  Residency& touch(Layer& layer, std::int32_t token);
  void count(Residency& residency, Token& token) const;
  void forget(std::int32_t position);
  void set_all(int first, int last, bool hot);
  void append_open(std::vector<double>& to) const;  // the column that is not full yet
  void coarsen();

  int n_heads_;
  std::size_t limit_;
  int max_columns_;
  int steps_ = 0;
  bool detailed_ = true;
  int all_hot_ = 0;  // tokens, the first ones, that are hot because all are (KvStep::all_hot)
  std::vector<Layer> layers_;
  std::vector<Token> tokens_;
  std::vector<double> sums_, columns_;  // of the open column; of the closed ones
  std::vector<float> outputs_;
  std::vector<Recovery> recoveries_;
};

}  // namespace thaw
