// What happens to the store when memory, disk or sense is short: a clear error, and nothing lost.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "kvstore/kvstore.h"
#include "tests/error_of.h"
#include "tests/file_limit.h"
#include "tests/sanitized.h"
#include "tests/tiny_files.h"

using namespace thaw;

namespace {

constexpr int kHeads = 2, kDim = 16, kLayers = 2;

// Pages that are counted, and refused from the `refuse`-th on, `times` times.
struct Ledger {
  int taken = 0, refuse = -1, times = 0;
  std::int64_t bytes = 0;
};

class CountedPages final : public PageSource {
 public:
  explicit CountedPages(Ledger& ledger) : ledger_(ledger) {}
  std::byte* take(std::size_t bytes, const char* what) override {
    if (ledger_.taken == ledger_.refuse && ledger_.times > 0) {
      --ledger_.times;
      fail("no memory for ", what);
    }
    ++ledger_.taken;
    ledger_.bytes += static_cast<std::int64_t>(bytes);
    return pages_->take(bytes, what);
  }

 private:
  Ledger& ledger_;
  std::unique_ptr<PageSource> pages_ = make_memory_pages();
};

KvOptions options(Policy policy) {
  KvOptions o;
  o.policy.policy = policy;
  o.policy.window = 4;
  o.policy.softness = 0.2f;
  o.centre_tokens = 32;
  o.check = true;
  if (policy == Policy::kH2o || policy == Policy::kBudget) o.hot_tokens = 150;
  return o;
}

// A step with attention that makes many tokens hot, then few, then recalls.
void step(KvStore& kv, int n, Phase phase, testing::Random& random) {
  kv.begin(n, phase);
  for (int layer = 0; layer < kv.shape().n_layers; ++layer) {
    const auto x = random.normals(n * kv.shape().n_kv_heads * kv.shape().head_dim);
    kv.append(layer, x.data(), x.data(), n);
    const KvView view = kv.view(layer);
    AttentionStats stats;
    stats.n_rows = view.lanes.empty() ? kv.stats_rows(n) : 1;
    const int n_lanes = stats.n_rows > 0 ? kv.shape().n_kv_heads / view.lane_heads : 0;
    for (int i = 0; i < n_lanes; ++i) {
      AttentionStats::Lane& lane = stats.lanes.emplace_back();
      const int rows = view.lanes.empty() ? view.kv_len : view.lanes[i].hot.n_rows;
      for (int row = 0; row < rows; ++row) {
        lane.probability.push_back(random.below(2) == 0 ? 0.1f : 0.0f);
        lane.relevance.push_back(std::fabs(random.normal()));
      }
      if (view.lanes.empty() || !view.ghosts.present()) continue;
      for (int t = 0; t < view.kv_len; ++t)
        if ((view.lanes[i].hot_mask[t / 32] >> t % 32 & 1) == 0 && random.below(4) == 0)
          lane.recalled.push_back({t, 0.1f});
    }
    kv.settle(layer, stats);
  }
}

// Some life with every kind of step; what is refused is tried again, `refused` times.
int live(KvStore& kv) {
  testing::Random random(11);
  int refused = 0;
  const auto try_step = [&](int n, Phase phase) {
    const int length = kv.length();
    try {
      step(kv, n, phase, random);
    } catch (const Error&) {
      ++refused;
      CHECK(kv.length() == length);
      kv.check();
      step(kv, n, phase, random);
    }
    CHECK(kv.length() == length + n);
  };
  try_step(90, Phase::kPrefill);
  for (int i = 0; i < 12; ++i) try_step(1, Phase::kDecode);
  try_step(200, Phase::kPrefill);
  for (int i = 0; i < 12; ++i) try_step(1, Phase::kDecode);
  kv.reset(Rung::kWindow);
  kv.check();
  for (int i = 0; i < 3; ++i) try_step(1, Phase::kDecode);
  kv.rewind(20);  // all are hot again: there are no ghosts
  kv.check();
  for (int i = 0; i < 20; ++i) try_step(1, Phase::kDecode);
  return refused;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::int64_t resident_bytes() {
  std::ifstream in("/proc/self/statm");
  std::int64_t total = 0, resident = 0;
  in >> total >> resident;
  return resident * ::sysconf(_SC_PAGESIZE);
}

}  // namespace

TEST_CASE("faults: whichever page is refused, the step fails as a whole and can be tried again") {
  const KvShape shape{kLayers, kHeads, kDim, 1024, KvType::kF16};
  for (const Policy policy : {Policy::kFull, Policy::kWindow, Policy::kH2o, Policy::kBudget,
                              Policy::kAsr, Policy::kThaw}) {
    CAPTURE(kPolicyNames[static_cast<int>(policy)]);
    Ledger all;
    CHECK(live(*make_kv_store(shape, options(policy), std::make_unique<CountedPages>(all),
                              std::make_unique<CountedPages>(all))) == 0);
    CHECK(all.taken >= 3);
    int refused = 0;
    for (int page = 0; page < all.taken; ++page) {
      CAPTURE(page);
      Ledger ledger{0, page, 1};
      refused += live(*make_kv_store(shape, options(policy), std::make_unique<CountedPages>(ledger),
                                     std::make_unique<CountedPages>(ledger)));
      CHECK(ledger.times == 0);
    }
    CHECK(refused >= 3);  // the others were for tokens to thaw, which stayed frozen
  }
}

TEST_CASE("faults: while memory is refused every step fails, and nothing changes") {
  for (const Policy policy : {Policy::kFull, Policy::kThaw}) {
    Ledger ledger{0, 0, 1 << 20};
    auto kv = make_kv_store({kLayers, kHeads, kDim, 1024, KvType::kF16}, options(policy),
                            std::make_unique<CountedPages>(ledger),
                            std::make_unique<CountedPages>(ledger));
    testing::Random random(1);
    for (int i = 0; i < 3; ++i) {
      CHECK(testing::error_of([&] { step(*kv, 40, Phase::kPrefill, random); }) ==
            "no memory for the cold tier");
      CHECK(kv->length() == 0);
      kv->check();
    }
    ledger.times = 0;
    CHECK(live(*kv) == 0);
  }
}

TEST_CASE("faults: a cold file must be new, and where files can be; the error names it") {
  const testing::TemporaryDirectory directory;
  const std::string file = (directory.path() / "there").string();
  testing::write_file(file, "mine");
  for (const auto& [path, reason] :
       {std::pair(file, "File exists"), {file + "/cold", "Not a directory"},
        {(directory.path() / "no" / "cold").string(), "No such file or directory"},
        {directory.path().string(), "File exists"}}) {
    KvOptions o;
    o.cold_file = path;
    const std::string message = testing::error_of(
        [&] { make_kv_store({kLayers, kHeads, kDim, 1024, KvType::kF16}, o); });
    CHECK(contains(message, "cold file "));
    CHECK(contains(message, reason));
  }
  std::ifstream in(file);
  CHECK(std::string(std::istreambuf_iterator<char>(in), {}) == "mine");
}

TEST_CASE("faults: a cold file has no name while it is used, and leaves nothing") {
  const testing::TemporaryDirectory directory;
  KvOptions o = options(Policy::kThaw);
  o.cold_file = (directory.path() / "cold").string();
  auto kv = make_kv_store({kLayers, kHeads, kDim, 1024, KvType::kF16}, o);
  CHECK(std::filesystem::is_empty(directory.path()));
  CHECK(live(*kv) == 0);
  CHECK(kv->usage().cold > 0);
  CHECK(std::filesystem::is_empty(directory.path()));
}

TEST_CASE("faults: a disk that is full stops the step that needs room, and loses nothing") {
  const testing::TemporaryDirectory directory;
  KvOptions o = options(Policy::kThaw);
  o.cold_file = (directory.path() / "cold").string();
  const KvShape shape{kLayers, kHeads, kDim, 4096, KvType::kF16};
  auto kv = make_kv_store(shape, o);
  testing::Random random(1);
  {
    const testing::FileLimit limit(300 * static_cast<rlim_t>(shape.bytes_per_token()));
    step(*kv, 200, Phase::kPrefill, random);
    const std::string message =
        testing::error_of([&] { step(*kv, 200, Phase::kPrefill, random); });
    CHECK(contains(message, "cold file " + o.cold_file + ": no room for the cold tier"));
    CHECK(kv->length() == 200);
    kv->check();
    for (int i = 0; i < 56; ++i) step(*kv, 1, Phase::kDecode, random);
    CHECK_THROWS_AS(step(*kv, 1, Phase::kDecode, random), Error);
    CHECK(kv->length() == 256);
    kv->check();
  }
  step(*kv, 200, Phase::kPrefill, random);
  kv->check();
}

TEST_CASE("faults: bytes that are reported are the bytes that were taken") {
  for (const Policy policy : {Policy::kH2o, Policy::kThaw}) {
    Ledger fast, cold;
    auto kv = make_kv_store({kLayers, kHeads, kDim, 1024, KvType::kF16}, options(policy),
                            std::make_unique<CountedPages>(fast),
                            std::make_unique<CountedPages>(cold));
    live(*kv);
    CHECK(kv->usage().hot + kv->usage().ghosts == fast.bytes);
    CHECK(kv->usage().cold == cold.bytes);
    CHECK(kv->usage().resident == fast.bytes);
    CHECK((kv->usage().ghosts > 0) == (policy == Policy::kThaw));
  }
}

TEST_CASE("faults: bytes that are reported are the bytes that the process grows by") {
  constexpr int kTokens = 4096;
  const KvShape shape{4, 2, 64, kTokens + 8, KvType::kF16};
  KvOptions o;
  o.policy.policy = Policy::kThaw;
  o.hot_fraction = 0.5;
  const std::vector<float> x(std::size_t{kTokens} * 2 * 64, 1.0f);
  AttentionStats stats;
  stats.n_rows = 1;
  for (int i = 0; i < 2; ++i)
    stats.lanes.push_back({std::vector<float>(kTokens, 0.1f), {}, {}, 0, 0});
  const std::int64_t before = resident_bytes();
  auto kv = make_kv_store(shape, o);
  kv->begin(kTokens, Phase::kPrefill);
  for (int layer = 0; layer < shape.n_layers; ++layer) {
    kv->append(layer, x.data(), x.data(), kTokens);
    kv->settle(layer, stats);
  }
  kv->begin(1, Phase::kDecode);
  const KvUsage used = kv->usage();
  const auto reported = static_cast<double>(used.hot + used.ghosts + used.cold + used.bookkeeping);
  CHECK(used.hot >= shape.bytes_per_token() * kTokens / 2);
  if (!testing::sanitized())  // their shadow memory grows, too
    CHECK(static_cast<double>(resident_bytes() - before) == doctest::Approx(reported).epsilon(0.1));
}
