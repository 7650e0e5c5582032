#include "kvstore/bounds.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <string_view>

#include "device/error.h"
#include "kvstore/lane.h"

namespace thaw {

KvBounds::KvBounds(const KvShape& shape, const KvOptions& options)
    : shape_(shape), options_(options), shares_(static_cast<std::size_t>(shape.n_layers)) {
  if (params().policy != Policy::kFull) check();
}

void KvBounds::check() const {
  const auto enough = [&](const char* what, double given, std::int64_t tokens) {
    require(tokens >= least(), what, ": expected room for at least ", least(), " tokens a layer (",
            params().sinks, " sinks, a window of ", params().window, ", and the newest), found ",
            given, what == std::string_view("--hot-bytes") ? join(", room for ", tokens) : "");
  };
  if (options_.hot_tokens > 0) enough("--hot-tokens", options_.hot_tokens, options_.hot_tokens);
  if (options_.hot_bytes > 0)
    enough("--hot-bytes", static_cast<double>(options_.hot_bytes), rows_in_bytes());
}

// Rows of every lane that --hot-bytes holds, in whole pages.
std::int64_t KvBounds::rows_in_bytes() const {
  const std::int64_t page = kHotPageRows * shape_.bytes_per_token();
  return options_.hot_bytes / page * kHotPageRows;
}

// At most n, and what a promise in tokens or bytes holds.
int KvBounds::promised_at_most(std::int64_t n) const {
  if (options_.hot_tokens > 0) n = std::min<std::int64_t>(n, options_.hot_tokens);
  if (options_.hot_bytes > 0) n = std::min(n, rows_in_bytes());
  return static_cast<int>(n);
}

int KvBounds::centre_tokens() const { return promised_at_most(options_.centre_tokens); }

int KvBounds::freeze_from() const {
  if (params().policy == Policy::kFull) return std::numeric_limits<int>::max();
  if (params().policy != Policy::kThaw || options_.hot_fraction > 0) return 0;
  return promised_at_most(options_.freeze_from);
}

bool KvBounds::has_ghosts() const {
  return params().policy == Policy::kThaw && params().ghost_key_bits > 0;
}

GhostFormat KvBounds::ghost_format() const {
  if (params().policy != Policy::kThaw) return {0, 0, shape_.head_dim};
  return {params().ghost_key_bits, params().ghost_value_bits, shape_.head_dim};
}

int KvBounds::lane_heads() const {
  return params().policy == Policy::kThaw && params().per_head ? 1 : shape_.n_kv_heads;
}

std::int64_t KvBounds::most_pages() const {
  if (options_.hot_bytes == 0) return std::numeric_limits<std::int64_t>::max() / 2;
  const std::size_t row =
      2 * kv_row_bytes(shape_.type, shape_.head_dim) * static_cast<std::size_t>(lane_heads());
  return options_.hot_bytes / static_cast<std::int64_t>(row * kHotPageRows);
}

double KvBounds::promised(int kv_len) const {
  if (options_.hot_bytes > 0) return static_cast<double>(rows_in_bytes());
  if (options_.hot_tokens > 0) return options_.hot_tokens;
  if (options_.hot_fraction > 0) return std::ceil(options_.hot_fraction * kv_len);
  return params().policy == Policy::kWindow ? params().sinks + params().window : kv_len;
}

int KvBounds::bound(int layer, int kv_len) const {
  double rows = params().policy == Policy::kBudget ? shares_[static_cast<std::size_t>(layer)].bound
                                                   : promised(kv_len);
  rows = std::max(rows, static_cast<double>(least()));
  if (has_ghosts() && options_.hot_fraction > 0)
    rows = std::max(rows, static_cast<double>(centre_tokens()));
  return static_cast<int>(std::min(rows, static_cast<double>(kv_len)));
}

void KvBounds::learn(int layer, float entropy, int n_rows) {
  Share& share = shares_[static_cast<std::size_t>(layer)];
  share.sum += double{entropy} * n_rows, share.rows += n_rows;
}

void KvBounds::adopt() {
  for (Share& share : shares_)
    if (share.rows > 0) share.entropy = std::max(1e-6f, static_cast<float>(share.sum / share.rows));
}

void KvBounds::forget() { std::fill(shares_.begin(), shares_.end(), Share{}); }

// Each layer's part of the total is proportional to its entropy, but holds what is always hot and
// is no more than the context; what a layer cannot use goes to the others. So a layer gets
// clamp(x layer_share, least, kv_len), with x found by bisection. Bytes are promised in whole
// pages, and so given in pages.
void KvBounds::share(int kv_len) {
  if (params().policy != Policy::kBudget) return;
  const int unit = options_.hot_bytes > 0 ? kHotPageRows : 1;
  const double fewest = (least() + unit - 1) / unit * unit,
               most = (kv_len + unit - 1) / unit * unit;
  const double total = std::max(fewest, std::min(promised(kv_len), most)) * shape_.n_layers;
  std::vector<float> entropy;
  for (const Share& share : shares_) entropy.push_back(share.entropy);
  const float sum = std::accumulate(entropy.begin(), entropy.end(), 0.0f);
  const auto rows = [&](std::size_t layer, double x) {
    return std::max(fewest, std::min<double>(x * layer_share(entropy[layer], sum), most));
  };
  double low = 0, high = sum * most / *std::min_element(entropy.begin(), entropy.end());
  for (int i = 0; i < 64; ++i) {
    const double middle = (low + high) / 2;
    double given = 0;
    for (std::size_t layer = 0; layer < entropy.size(); ++layer) given += rows(layer, middle);
    (given <= total ? low : high) = middle;
  }
  for (std::size_t layer = 0; layer < entropy.size(); ++layer)
    shares_[layer].bound = static_cast<int>((rows(layer, low) + 1e-6) / unit) * unit;
}

}  // namespace thaw
