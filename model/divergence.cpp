#include "model/divergence.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "device/error.h"

namespace thaw {
namespace {

constexpr std::size_t kPiece = 4096;  // logits that one task sums

// softmax sums of a piece of a row: e^(x - largest) over its logits x.
struct RowPiece {
  double sum = 0;
  float largest = 0;
  std::size_t top = 0;  // where it stands in the row
};

struct PairPiece {
  RowPiece full, other;
  double difference = 0;  // sum of e^(f - largest f) (f - o)
};

RowPiece sum_row(std::span<const float> logits, std::size_t begin) {
  const auto top = std::max_element(logits.begin(), logits.end());
  RowPiece piece{0, *top, begin + static_cast<std::size_t>(top - logits.begin())};
  for (const float x : logits) piece.sum += std::exp(double{x} - double{piece.largest});
  return piece;
}

PairPiece sum_pair(std::span<const float> full, std::span<const float> other, std::size_t begin) {
  PairPiece piece{{}, sum_row(other, begin)};
  const auto top = std::max_element(full.begin(), full.end());
  piece.full = {0, *top, begin + static_cast<std::size_t>(top - full.begin())};
  for (std::size_t i = 0; i < full.size(); ++i) {
    const double weight = std::exp(double{full[i]} - double{piece.full.largest});
    piece.full.sum += weight;
    piece.difference += weight * (double{full[i]} - double{other[i]});
  }
  return piece;
}

// The whole row from its pieces, in order.
RowPiece merge(const std::vector<PairPiece>& pieces, RowPiece PairPiece::*row) {
  RowPiece whole = pieces.front().*row;
  for (const PairPiece& piece : pieces) {
    if ((piece.*row).largest > whole.largest) whole = piece.*row;
  }
  whole.sum = 0;
  for (const PairPiece& piece : pieces) {
    whole.sum += (piece.*row).sum * std::exp(double{(piece.*row).largest} - double{whole.largest});
  }
  return whole;
}

double log_sum(const RowPiece& row) { return std::log(row.sum) + double{row.largest}; }

}  // namespace

double negative_log_likelihood(std::span<const float> logits, std::int32_t target) {
  return log_sum(sum_row(logits, 0)) - double{logits[static_cast<std::size_t>(target)]};
}

Divergence compare_rows(ThreadPool& pool, std::span<const float> full,
                        std::span<const float> other, std::int32_t target) {
  require(full.size() == other.size() && !full.empty(), "compare_rows: logits: expected ",
          full.size(), ", found ", other.size());
  std::vector<PairPiece> pieces((full.size() + kPiece - 1) / kPiece);
  pool.run(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t task, int) {
    const std::size_t begin = static_cast<std::size_t>(task) * kPiece;
    const std::size_t n = std::min(kPiece, full.size() - begin);
    pieces[static_cast<std::size_t>(task)] =
        sum_pair(full.subspan(begin, n), other.subspan(begin, n), begin);
  });
  const RowPiece f = merge(pieces, &PairPiece::full), o = merge(pieces, &PairPiece::other);
  double difference = 0;
  for (const PairPiece& piece : pieces) {
    difference +=
        piece.difference * std::exp(double{piece.full.largest} - double{f.largest}) / f.sum;
  }
  // log p = logit - log_sum, so KL = sum of p_full (f - o), less the difference of the log_sums.
  return {log_sum(o) - double{other[static_cast<std::size_t>(target)]},
          difference - (log_sum(f) - log_sum(o)), f.top == o.top};
}

}  // namespace thaw
