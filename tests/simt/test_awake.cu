// Contexts that are too short to freeze, on the GPU: exact rows in device memory, the cold tier
// behind them, and what is done when they have grown.
#include "kvstore/ghost.h"
#include "tests/sanitized.h"
#include "tests/simt/both_stores.h"
#include "tests/simt/simt.h"

using namespace thaw;
using testing::BothStores;
using testing::Mood;

namespace {

constexpr std::size_t kMemory = std::size_t{1} << 30;

KvOptions awake_options(int freeze_from) {
  KvOptions o = testing::thaw_options();
  o.freeze_from = freeze_from;
  return o;
}

const KvShape kShape{simt::kIsSlow ? 1 : 2, 2, 8, 400, KvType::kF16, {}};

std::int64_t taken() { return static_cast<std::int64_t>(kMemory - device_facts().free_memory); }

std::vector<std::byte> all_rows(const KvStore& kv, int layer) {
  const KvShape& s = kv.shape();
  std::vector<std::byte> rows(static_cast<std::size_t>(kv.length()) * s.n_kv_heads * 2 *
                              kv_row_bytes(s.type, s.head_dim));
  kv.read(layer, 0, kv.length(), rows.data());
  return rows;
}

std::vector<std::byte> cold_rows(const KvStore& kv, int layer) {
  std::vector<std::byte> rows(all_rows(kv, layer).size());
  copy_rows(rows.data(), kv.shape(), kv.view(layer).cold, 0, kv.length());
  return rows;
}

}  // namespace

TEST_CASE("cuda awake: short contexts, longer ones and rewinds between them, as on the CPU") {
  for (const bool wants_events : {false, true}) {
    KvOptions options = awake_options(simt::kIsSlow ? 40 : 140);
    options.check = true;
    BothStores both(kShape, options, 3, wants_events);
    const int from = options.freeze_from;
    both.prefill(from - 10, Mood::kPlain);
    CHECK(both.cuda->usage().awake_until == from);
    both.decode(4, Mood::kPlain);
    both.restore(2);
    both.decode(5, Mood::kTies);  // from here on two see less than all
    CHECK(both.cuda->usage().awake_until == 0);
    both.reset(Rung::kWindow);
    both.rewind(from - 3);
    both.prefill(7, Mood::kTies);  // never short again
    both.decode(2, Mood::kPlain);
    both.rewind(from - 20);
    both.decode(3, Mood::kAllHit);  // short again
    both.reset(Rung::kFull, 2);
    both.prefill(12, Mood::kPlain);
    both.decode(7, Mood::kTies);
    both.rewind(10);
    both.decode(1, Mood::kPlain);
    both.rewind(0);
    both.prefill(from + 5, Mood::kPlain);  // long at once
    both.decode(3, Mood::kPlain);
    both.cpu->clear(), both.cuda->clear();
    both.prefill(20, Mood::kPlain);
    for (int layer = 0; layer < kShape.n_layers; ++layer)
      CHECK(all_rows(*both.cuda, layer) == all_rows(*both.cpu, layer));
    CHECK(both.n_compared > 20);
    if (wants_events) CHECK(both.n_events[KvEvent::kSeed] > 20);
  }
}

// Pages go to the cold tier beside later steps, also while a rewind writes them anew.
TEST_CASE("cuda awake: the cold tier has every row in any order that streams and events allow") {
  for (std::uint64_t seed = 1; seed <= (simt::kIsSlow ? 3 : 30); ++seed) {
    CAPTURE(seed);
    simt::set_seed(seed);
    const KvOptions options = awake_options(300);
    testing::QueuedStores both(kShape, options, seed);
    const auto &cuda = both.cuda, &cpu = both.cpu;
    const auto step = [&](int n, Phase phase = Phase::kRestore) {
      both.begin(n, phase);
      for (int layer = 0; layer < kShape.n_layers; ++layer) {
        both.append(layer, n);
        cuda->settle(layer, {}), cpu->settle(layer, {});
      }
    };
    step(130), step(20), step(1, Phase::kDecode);
    both.rewind(100);  // into a page that is on its way
    step(40), step(5), step(118);
    if (seed % 2 == 0) CHECK(all_rows(*cuda, 0) == all_rows(*cpu, 0));
    step(1, Phase::kDecode);
    step(90);  // freezing begins
    cuda->check();
    for (int layer = 0; layer < kShape.n_layers; ++layer)
      CHECK(cold_rows(*cuda, layer) == cold_rows(*cpu, layer));
    both.rewind(140);
    step(4), step(2);
    for (int layer = 0; layer < kShape.n_layers; ++layer)
      CHECK(all_rows(*cuda, layer) == all_rows(*cpu, layer));
  }
  simt::set_seed(1);
}

TEST_CASE("cuda awake: bytes that are reported are the bytes that were taken, and given back") {
  const std::int64_t before = taken();
  BothStores both(kShape, awake_options(200), 3);
  both.prefill(130, Mood::kPlain);
  both.decode(2, Mood::kPlain);
  const KvUsage awake = both.cuda->usage();
  CHECK(awake.hot + awake.ghosts + awake.bookkeeping == taken() - before);
  CHECK(awake.ghosts == 0);
  CHECK(awake.hot == 256 * kShape.bytes_per_token());
  CHECK(awake.resident == 132 * kShape.bytes_per_token());
  both.prefill(90, Mood::kPlain);
  both.decode(2, Mood::kPlain);
  const KvUsage frozen = both.cuda->usage();
  CHECK(frozen.hot + frozen.ghosts + frozen.bookkeeping == taken() - before);
  CHECK(frozen.ghosts > 0);
  CHECK(frozen.hot < awake.hot);
}

TEST_CASE("cuda awake: freezing begins where memory for exact rows ends") {
  for (const bool ghosts_fit : {true, false}) {
    CAPTURE(ghosts_fit);
    KvOptions options = awake_options(400);
    BothStores both(kShape, options, 3);
    for (int n = 0; n < 120; n += 5) both.prefill(5, Mood::kPlain);
    const auto page = static_cast<std::size_t>(128 * kShape.bytes_per_token());
    const std::size_t room = ghosts_fit ? page - 1 : 3500;
    simt::set_memory(static_cast<std::size_t>(taken()) + room);  // stderr says so
    both.cuda->begin(9, Phase::kRestore);                        // a second page
    CHECK(both.cuda->usage().awake_until == 0);
    CHECK(both.cuda->usage().ghosts > 0);
    simt::set_memory(kMemory);
    both.cuda->rewind(120);
    both.cuda->check();
    CHECK(all_rows(*both.cuda, 0) == all_rows(*both.cpu, 0));
    both.cuda->begin(1, Phase::kDecode);
    CHECK(both.cuda->usage().awake_until == 129);
  }
}
