#include "cli/freeze_map.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <utility>

namespace thaw {
namespace {

constexpr int kMaskBits = 64;

std::uint64_t mask_of(int head, int n_heads) {
  if (head >= 0) return std::uint64_t{1} << head % kMaskBits;
  return n_heads >= kMaskBits ? ~std::uint64_t{0} : (std::uint64_t{1} << n_heads) - 1;
}

}  // namespace

FreezeMap::FreezeMap(int n_layers, int n_heads, std::size_t limit, int max_columns)
    : n_heads_(n_heads),
      limit_(limit),
      max_columns_(max_columns),
      layers_(static_cast<std::size_t>(n_layers)),
      sums_(series_width()) {}

std::size_t FreezeMap::series_width() const {
  return layers_.size() * std::size(kLayerSeries) + std::size(kStoreSeries);
}

// Brings the token's hot steps up to now.
void FreezeMap::count(Residency& residency, Token& token) const {
  token.hot_steps += std::int64_t{std::popcount(residency.hot)} * (steps_ - residency.since);
  residency.since = steps_;
}

void FreezeMap::grow(std::size_t n_tokens) {
  if (tokens_.size() < n_tokens) tokens_.resize(n_tokens, {.born = steps_});
}

FreezeMap::Residency& FreezeMap::touch(Layer& layer, std::int32_t token) {
  const auto i = static_cast<std::size_t>(token);
  if (layer.tokens.size() <= i) layer.tokens.resize(i + 1);
  Residency& residency = layer.tokens[i];
  if (!residency.touched) {
    residency.touched = true;
    residency.cell = {.token = token};
    layer.touched.push_back(token);
  }
  return residency;
}

void FreezeMap::event(const KvEvent& e) {
  if (e.kind == KvEvent::kRewind) return forget(e.token);
  set_all(0, std::exchange(all_hot_, 0), false);
  const auto i = static_cast<std::size_t>(e.token);
  grow(i + 1);
  Token& token = tokens_[i];
  Residency& residency = touch(layers_[static_cast<std::size_t>(e.layer)], e.token);
  count(residency, token);
  const std::uint64_t heads = mask_of(e.head, n_heads_);
  const bool cold = e.kind == KvEvent::kFreeze || (e.kind == KvEvent::kRecall && e.timer == 0);
  residency.hot = cold ? residency.hot & ~heads : residency.hot | heads;
  if (e.kind == KvEvent::kRecall) {
    token.recalls += std::popcount(heads);
    residency.cell.recalled = true;
  }
  token.hits = std::max(token.hits, e.hits);
  if (e.probability > 0) token.probability = e.probability;
  Cell& cell = residency.cell;
  const int code = probability_code(e.probability);
  if ((e.probability > 0 || e.hits > 0 || e.timer > 0) &&
      (!cell.detailed || code >= cell.probability)) {
    cell.detailed = true;
    cell.probability = code;
    cell.hits = std::max(e.hits, 0);
    cell.timer = std::max(e.timer, 0);
  }
}

// Tokens at `position` and after it: others will take their places.
void FreezeMap::forget(std::int32_t position) {
  const auto first = static_cast<std::size_t>(position);
  for (Layer& layer : layers_) {
    for (std::size_t i = first; i < layer.tokens.size(); ++i) {
      if (layer.tokens[i].hot != 0) touch(layer, static_cast<std::int32_t>(i)).hot = 0;
    }
  }
  if (tokens_.size() > first) tokens_.resize(first);
  all_hot_ = std::min(all_hot_, position);
}

// Tokens first .. last - 1, in all heads of all layers.
void FreezeMap::set_all(int first, int last, bool hot) {
  if (first >= last) return;
  grow(static_cast<std::size_t>(last));
  for (Layer& layer : layers_) {
    for (int t = first; t < last; ++t) {
      Residency& residency = touch(layer, t);
      count(residency, tokens_[static_cast<std::size_t>(t)]);
      residency.hot = hot ? mask_of(-1, n_heads_) : 0;
    }
  }
}

void FreezeMap::step(const KvStep& step) {
  if (step.all_hot) set_all(std::exchange(all_hot_, step.length), step.length, true);
  grow(static_cast<std::size_t>(step.length));
  const int bits = std::popcount(mask_of(-1, n_heads_));
  std::vector<Cell> cells;
  std::size_t size = 0;
  for (Layer& layer : layers_) {
    std::sort(layer.touched.begin(), layer.touched.end());
    cells.clear();
    for (std::int32_t i : layer.touched) {
      Residency& residency = layer.tokens[static_cast<std::size_t>(i)];
      residency.touched = false;
      residency.cell.level = std::popcount(residency.hot) * kHotLevels / bits;
      cells.push_back(residency.cell);
    }
    layer.touched.clear();
    layer.cells.add(cells);
    size += layer.cells.size();
  }
  ++steps_;

  auto sum = sums_.begin();
  for (const KvStep::Layer& l : step.layers) {
    for (float value : {l.entropy, l.ghost_mass, l.threshold, l.hot, l.budget, l.recalled}) {
      *sum++ += value;
    }
  }
  double thawed = 0, frozen = 0;
  for (const KvStep::Layer& l : step.layers) thawed += l.thawed, frozen += l.frozen;
  sum = sums_.end() - std::ssize(kStoreSeries);
  *sum = step.length;  // the last one, not the mean
  const double store[] = {static_cast<double>(step.hot_bytes),
                          static_cast<double>(step.ghost_bytes),
                          static_cast<double>(step.cold_bytes_read), thawed, frozen};
  for (double value : store) *++sum += value;

  if (steps_ % stride() != 0) return;
  append_open(columns_);
  std::fill(sums_.begin(), sums_.end(), 0.0);
  const bool large = size > limit_;
  if (large && detailed_) {
    detailed_ = false;
    for (Layer& layer : layers_) layer.cells.drop_details();
  } else if (columns() % 2 == 0 && (large || columns() >= max_columns_)) {
    coarsen();
  }
}

void FreezeMap::coarsen() {
  for (Layer& layer : layers_) layer.cells.coarsen();
  const std::size_t width = series_width(), length = width - std::size(kStoreSeries);
  for (std::size_t c = 0; c < columns_.size() / width / 2; ++c) {
    const double *a = &columns_[2 * c * width], *b = a + width;
    for (std::size_t i = 0; i < width; ++i) {
      columns_[c * width + i] = i == length ? b[i] : (a[i] + b[i]) / 2;
    }
  }
  columns_.resize(columns_.size() / 2);
}

void FreezeMap::append_open(std::vector<double>& to) const {
  const std::size_t width = series_width(), length = width - std::size(kStoreSeries);
  const int filled = steps_ - static_cast<int>(columns_.size() / width) * stride();
  for (std::size_t i = 0; filled > 0 && i < width; ++i) {
    to.push_back(i == length ? sums_[i] : sums_[i] / filled);
  }
}

std::vector<double> FreezeMap::series() const {
  std::vector<double> all = columns_;
  append_open(all);
  return all;
}

void FreezeMap::output(int step, float entropy) {
  const auto i = static_cast<std::size_t>(step);
  if (outputs_.size() <= i) outputs_.resize(i + 1, std::numeric_limits<float>::quiet_NaN());
  outputs_[i] = entropy;
}

void FreezeMap::recovery(int step, Rung rung, float value) {
  recoveries_.push_back({step, rung, value});
}

std::vector<FreezeMap::Token> FreezeMap::tokens() const {
  std::vector<Token> tokens = tokens_;
  for (const Layer& layer : layers_) {
    const std::size_t n = std::min(layer.tokens.size(), tokens.size());
    for (std::size_t i = 0; i < n; ++i) {
      Residency residency = layer.tokens[i];
      count(residency, tokens[i]);
    }
  }
  return tokens;
}

double FreezeMap::hot_share(const Token& token) const {
  const double life =
      static_cast<double>(steps_ - token.born) * n_layers() * std::popcount(mask_of(-1, n_heads_));
  return life > 0 ? static_cast<double>(token.hot_steps) / life : 1;
}

}  // namespace thaw
