// The residency of the tokens of one layer over time, small: a column of cells for each `stride`
// steps, and in it only what changed.
//
// A column is the number of its cells, then each cell, tokens ascending:
//   varint  token - (the previous cell's token + 1), the first one counted from 0
//   byte    bits 0..4: level; bit 5: recalled in this column; bit 6: four more fields follow
//   byte    probability p of the last event, 255 + 16 log2 p; 0: below 2^-16, or none
//   varint  hits, timer; the step of that event counted from the column's first
// Varints are little-endian groups of 7 bits, the last one below 128. A token without a cell keeps
// its level; before its first cell that is 0.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace thaw {

// Share of a layer's heads, and of a column's steps, in which a token was hot: 0 .. kHotLevels.
inline constexpr int kHotLevels = 24;

struct Cell {
  std::int32_t token = 0;
  int level = 0;
  bool recalled = false;
  bool detailed = false;  // whether the fields below say something
  int probability = 0;    // as in a column
  int hits = 0, timer = 0;
  int step = 0;  // counted from the first one of what is added
};

int probability_code(float p);

class CellStream {
 public:
  explicit CellStream(int stride = 1) : stride_(stride) {}

  // The cells that changed, ascending by token; levels hold for `steps` steps. A column must not
  // end within them.
  void add(std::span<const Cell> cells, int steps = 1);
  void drop_details();  // of the cells so far and of those to come
  void coarsen();  // columns of twice as many steps; their number so far must be even, none open

  int stride() const { return stride_; }
  std::size_t size() const { return bytes_.size(); }
  std::string bytes() const;  // with the column that is still open

 private:
  struct Token {
    Cell open;             // what the open column will say
    std::int64_t sum = 0;  // of levels over the steps of the open column before `from`
    int from = 0;
    int level = 0, shown = 0;  // now; in the last column
    bool touched = false;      // in the open column
  };
  Token& touch(std::int32_t token);
  void close();
  void recode(int stride);

  int stride_, filled_ = 0;  // filled_: steps in the open column
  bool details_ = true;
  std::vector<Token> tokens_;
  std::vector<std::int32_t> touched_, stale_;  // stale_: level and shown differ
  std::string bytes_;
};

}  // namespace thaw
