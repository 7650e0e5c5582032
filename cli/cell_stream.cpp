#include "cli/cell_stream.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace thaw {
namespace {

void put_varint(std::string& out, std::uint32_t value) {
  for (; value >= 128; value >>= 7) out += static_cast<char>(value | 128);
  out += static_cast<char>(value);
}

std::uint32_t get_varint(const std::string& in, std::size_t& at) {
  std::uint32_t value = 0;
  for (int shift = 0;; shift += 7) {
    const auto byte = static_cast<unsigned char>(in[at++]);
    value |= std::uint32_t{byte & 127u} << shift;
    if (byte < 128) return value;
  }
}

void put_cell(std::string& out, const Cell& cell, std::int32_t previous) {
  put_varint(out, static_cast<std::uint32_t>(cell.token - previous - 1));
  out += static_cast<char>(cell.level | (cell.recalled ? 32 : 0) | (cell.detailed ? 64 : 0));
  if (!cell.detailed) return;
  out += static_cast<char>(cell.probability);
  for (int value : {cell.hits, cell.timer, cell.step}) {
    put_varint(out, static_cast<std::uint32_t>(value));
  }
}

// The column at `at`, which moves behind it.
std::vector<Cell> get_column(const std::string& in, std::size_t& at) {
  std::vector<Cell> cells(get_varint(in, at));
  std::int32_t previous = -1;
  for (Cell& cell : cells) {
    cell.token = previous + 1 + static_cast<std::int32_t>(get_varint(in, at));
    previous = cell.token;
    const auto bits = static_cast<unsigned char>(in[at++]);
    cell.level = bits & 31;
    cell.recalled = (bits & 32) != 0;
    cell.detailed = (bits & 64) != 0;
    if (!cell.detailed) continue;
    cell.probability = static_cast<unsigned char>(in[at++]);
    for (int* value : {&cell.hits, &cell.timer, &cell.step}) {
      *value = static_cast<int>(get_varint(in, at));
    }
  }
  return cells;
}

}  // namespace

int probability_code(float p) {
  return p > 0 ? std::clamp(static_cast<int>(std::lround(255 + 16 * std::log2(p))), 0, 255) : 0;
}

CellStream::Token& CellStream::touch(std::int32_t token) {
  if (tokens_.size() <= static_cast<std::size_t>(token)) {
    tokens_.resize(static_cast<std::size_t>(token) + 1);
  }
  Token& t = tokens_[static_cast<std::size_t>(token)];
  if (!t.touched) {
    t.touched = true;
    t.open = {.token = token};
    t.sum = t.from = 0;
    touched_.push_back(token);
  }
  return t;
}

void CellStream::add(std::span<const Cell> cells, int steps) {
  for (const Cell& cell : cells) {
    Token& t = touch(cell.token);
    t.sum += t.level * (filled_ - t.from);
    t.from = filled_;
    t.level = cell.level;
    const bool recalled = t.open.recalled || cell.recalled;
    if (cell.detailed && details_) {
      t.open = cell;
      t.open.step += filled_;
    }
    t.open.recalled = recalled;
  }
  filled_ += steps;
  if (filled_ >= stride_) close();
}

void CellStream::close() {
  for (std::int32_t token : std::exchange(stale_, {})) touch(token);
  std::sort(touched_.begin(), touched_.end());
  std::string cells;
  std::uint32_t n = 0;
  std::int32_t previous = -1;
  for (std::int32_t token : std::exchange(touched_, {})) {
    Token& t = tokens_[static_cast<std::size_t>(token)];
    t.touched = false;
    t.sum += t.level * (filled_ - t.from);
    t.open.level = static_cast<int>((2 * t.sum + filled_) / (2 * filled_));  // rounded mean
    if (t.open.level != t.shown || t.open.recalled || t.open.detailed) {
      put_cell(cells, t.open, previous);
      previous = token;
      ++n;
    }
    t.shown = t.open.level;
    if (t.shown != t.level) stale_.push_back(token);
  }
  put_varint(bytes_, n);
  bytes_ += cells;
  filled_ = 0;
}

std::string CellStream::bytes() const {
  if (filled_ == 0) return bytes_;
  CellStream ended = *this;
  ended.close();
  return std::move(ended.bytes_);
}

void CellStream::drop_details() {
  details_ = false;
  recode(stride_);
}

void CellStream::coarsen() { recode(2 * stride_); }

void CellStream::recode(int stride) {
  CellStream coded(stride);
  coded.details_ = details_;
  for (std::size_t at = 0; at < bytes_.size();) coded.add(get_column(bytes_, at), stride_);
  // A column says the mean of its steps; what holds now is known better.
  coded.stale_.clear();
  coded.tokens_.resize(std::max(coded.tokens_.size(), tokens_.size()));
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    Token& t = coded.tokens_[i];
    t.level = tokens_[i].level;
    if (t.level != t.shown) coded.stale_.push_back(static_cast<std::int32_t>(i));
  }
  *this = std::move(coded);
}

}  // namespace thaw
