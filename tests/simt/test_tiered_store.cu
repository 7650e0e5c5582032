// The store on the GPU as a whole: its memory, its graphs, its order on the stream, its errors.
#include "tests/error_of.h"
#include "tests/sanitized.h"
#include "tests/simt/both_stores.h"
#include "tests/simt/simt.h"
#include "tests/step_order.h"

using namespace thaw;
using testing::BothStores;
using testing::error_of;
using testing::Mood;
using testing::thaw_options;

namespace {

constexpr std::size_t kMemory = std::size_t{1} << 30;

const KvShape kShape{simt::kIsSlow ? 1 : 2, 2, 8, 300, KvType::kF16, {}};

std::int64_t taken() { return static_cast<std::int64_t>(kMemory - device_facts().free_memory); }

}  // namespace

TEST_CASE("cuda tiers: bytes that are reported are the bytes that were taken") {
  for (const Policy policy : {Policy::kThaw, Policy::kAsr, Policy::kH2o}) {
    if (simt::kIsSlow && policy != Policy::kThaw) continue;
    const std::int64_t before = taken();
    KvOptions options = thaw_options();
    options.policy.policy = policy;
    BothStores both(kShape, options, 3);
    both.prefill(130, Mood::kPlain);
    both.decode(2, Mood::kPlain);
    both.prefill(60, Mood::kTies);
    both.decode(1, Mood::kAllHit);
    const KvUsage cuda = both.cuda->usage(), cpu = both.cpu->usage();
    CHECK(cuda.hot + cuda.ghosts + cuda.bookkeeping == taken() - before);
    CHECK(cuda.ghosts == cpu.ghosts);
    CHECK(cuda.cold == cpu.cold);
    CHECK(cuda.full == cpu.full);
    CHECK(cuda.resident == cuda.hot + cuda.ghosts);
    CHECK(cuda.hot > 0);
  }
}

TEST_CASE("cuda tiers: rows of every type are hot with the CPU's bits") {
  for (const KvType type :
       {KvType::kF16, KvType::kBF16, KvType::kF32, KvType::kQ8_0, KvType::kQ4_0}) {
    CAPTURE(kv_type_name(type));
    KvOptions options = thaw_options();
    options.check = true;
    BothStores both({1, 2, 96, 100, type, {}}, options, 5);
    both.prefill(20, Mood::kPlain);
    both.restore(7);
    both.decode(3, Mood::kPlain);
    std::vector<std::byte> cpu(30 * 4 * kv_row_bytes(type, 96)), cuda(cpu.size());
    both.cpu->read(0, 0, 30, cpu.data()), both.cuda->read(0, 0, 30, cuda.data());
    CHECK(cpu == cuda);
  }
}

namespace {

// The bytes of a layer's rows in device memory, token by token.
std::vector<std::byte> rows_on_device(const KvView& view, const KvShape& shape,
                                      const Stream& stream) {
  const DeviceRows& rows = view.device->rows;
  std::vector<const std::byte*> pages(static_cast<std::size_t>(view.kv_len / rows.page_rows() + 1));
  copy_to_host(pages.data(), rows.pages, pages.size(), stream);
  const auto bytes = kv_row_bytes(shape.type, shape.head_dim);
  std::vector<std::byte> all(static_cast<std::size_t>(2 * shape.n_kv_heads * view.kv_len) * bytes);
  std::byte* to = all.data();
  for (int token = 0; token < view.kv_len; ++token)
    for (int head = 0; head < shape.n_kv_heads; ++head)
      for (const std::size_t value : {std::size_t{0}, rows.value_offset}) {
        const std::byte* page = pages[static_cast<std::size_t>(token / rows.page_rows())];
        copy_to_host(to,
                     page + rows.offset + static_cast<std::size_t>(head) * rows.head_stride +
                         value +
                         static_cast<std::size_t>(token % rows.page_rows()) * rows.row_bytes,
                     bytes, stream);
        to += bytes;
      }
  return all;
}
std::vector<std::byte> rows_on_host(const KvRows& rows, int n, const KvShape& shape) {
  const auto bytes = kv_row_bytes(shape.type, shape.head_dim);
  std::vector<std::byte> all;
  for (int token = 0; token < n; ++token)
    for (int head = 0; head < shape.n_kv_heads; ++head)
      for (const std::byte* row : {rows.key(head, token), rows.value(head, token)})
        all.insert(all.end(), row, row + bytes);
  return all;
}

}  // namespace

// Every layer of every step finds in device memory what the cold tier has, and the step's tokens;
// the cold tier gets those, also when a later step begins before anybody waited.
TEST_CASE("cuda tiers: a prompt's rows are staged in any order that streams and events allow") {
  const KvShape shape{5, 2, 8, 300, KvType::kF16, {}};
  for (std::uint64_t seed = 1; seed <= (simt::kIsSlow ? 3 : 40); ++seed) {
    CAPTURE(seed);
    simt::set_seed(seed);
    KvOptions options = thaw_options();
    if (seed % 8 != 1) options.policy.policy = Policy::kAsr;  // no ghosts, which take longest
    testing::QueuedStores both(shape, options, seed);
    const auto &cuda = both.cuda, &cpu = both.cpu;
    const auto step = [&](int n, int n_layers) {
      both.begin(n, Phase::kPrefill);
      for (int layer = 0; layer < n_layers; ++layer) {
        both.append(layer, n);
        const KvView view = cpu->view(layer);
        if (n > 8 && rows_on_device(cuda->view(layer), shape, both.stream) !=
                         rows_on_host(view.cold, view.kv_len, shape))
          FAIL("seed " << seed << ", layer " << layer << ", " << view.kv_len << " tokens");
        if (n_layers < shape.n_layers) continue;
        fill_device(cuda->view(layer).device->stats.probability, 0, 4u * view.kv_len, both.stream);
        fill_device(cuda->view(layer).device->stats.entropy, 0, 4, both.stream);
        AttentionStats stats;
        stats.lanes.resize(2);
        for (auto& lane : stats.lanes) lane.probability.resize(view.kv_len);
        cuda->settle(layer, {}), cpu->settle(layer, stats);
      }
    };
    step(3, 5), step(100, 5), step(40, 5), step(20, 2);
    both.rewind(130);  // in the page that the step before wrote
    step(5, 5), step(45, 5);
    static_cast<void>(cuda->counters());  // waits
    for (int layer = 0; layer < shape.n_layers; ++layer)
      CHECK(rows_on_host(cuda->view(layer).cold, 180, shape) ==
            rows_on_host(cpu->view(layer).cold, 180, shape));
  }
  simt::set_seed(1);
}

TEST_CASE("cuda tiers: a prompt whose staged rows are refused reads the cold tier") {
  BothStores both(kShape, thaw_options(), 3);
  both.prefill(3, Mood::kPlain);
  const std::int64_t before = both.cuda->usage().bookkeeping;
  simt::set_memory(kMemory - device_facts().free_memory + 12000);  // stderr says so
  both.cuda->begin(20, Phase::kPrefill);
  CHECK(both.cuda->view(0).device->rows.offset == 0);
  both.rewind(3);
  both.prefill(20, Mood::kPlain);
  CHECK(both.cuda->usage().bookkeeping < before + 12000);
  simt::set_memory(kMemory);
  both.prefill(20, Mood::kPlain);
  CHECK(both.cuda->usage().bookkeeping > before + 12000);
  both.decode(2, Mood::kPlain);
  CHECK(both.cuda->usage().bookkeeping < before + 12000);
}

TEST_CASE("cuda tiers: work in any order that the stream allows gives the same bits") {
  for (std::uint64_t seed = 1; seed <= (simt::kIsSlow ? 3 : 24); ++seed) {
    CAPTURE(seed);
    simt::set_seed(seed);
    KvOptions options = thaw_options();
    options.hot_tokens = 24;
    BothStores both({1, 2, 8, 100, KvType::kF16, {}}, options, 9);
    both.prefill(30, Mood::kTies);
    both.decode(4, Mood::kTies);
    both.reset(Rung::kWindow);
    both.rewind(28);
    both.decode(2, Mood::kPlain);
  }
}

// Nobody is hit, so timers fall, and tokens freeze, in steps that only graphs queue.
TEST_CASE("cuda tiers: a graph of a decode step serves the later ones, across pages and growth") {
  BothStores both({1, 2, 8, 300, KvType::kF16, {}}, thaw_options(), 3);
  both.prefill(100, Mood::kAllHit);
  both.decode(1, Mood::kAllHit);
  const std::vector<float> row(16, 1.5f);
  const DeviceBuffer<float> x(row.size(), "x");
  copy_to_device(x.data(), row.data(), row.size(), both.stream);
  DeviceView recorded = {};
  Graph graph;
  int n_graphs = 0;
  for (int i = 0; i < (simt::kIsSlow ? 20 : 60); ++i) {
    both.cpu->begin(1, Phase::kDecode), both.cuda->begin(1, Phase::kDecode);
    const DeviceView view = *both.cuda->view(0).device;
    fill_device(view.stats.probability, 0, 2 * static_cast<std::size_t>(view.stats.stride) * 4,
                both.stream);
    const auto pass = [&] {
      both.cuda->append(0, x.data(), x.data(), 1);
      both.cuda->settle(0, {});
    };
    if (graph && view == recorded) {
      const Stream::Muted muted(both.stream);
      pass();
    } else {
      graph = Graph(both.stream, pass), recorded = view, ++n_graphs;
    }
    graph.launch(both.stream);
    both.cpu->append(0, row.data(), row.data(), 1);
    AttentionStats stats;
    for (const LaneView& lane : both.cpu->view(0).lanes)
      stats.lanes.emplace_back().probability.resize(lane.tokens.size());
    std::vector<float> entropy(2);
    copy_to_host(entropy.data(), view.stats.entropy, 2, both.stream);
    for (std::size_t lane = 0; lane < 2; ++lane) stats.lanes[lane].entropy = entropy[lane];
    both.cpu->settle(0, stats);
  }
  CHECK(n_graphs <= 2);
  CHECK(both.cuda->counters().frozen == both.cpu->counters().frozen);
  CHECK(both.cuda->counters().frozen > (simt::kIsSlow ? 5 : 20));
  both.decode(3, Mood::kPlain);
  both.cuda->check();
}

TEST_CASE("cuda tiers: while memory is refused no step begins, and nothing changes") {
  BothStores both(kShape, thaw_options(), 3);
  // Steps so short that they have no staged rows, whose memory decode would find.
  for (int n = 0; n < 100; n += 5) both.prefill(5, Mood::kAllHit);
  simt::set_memory(kMemory - device_facts().free_memory + 100);
  for (int i = 0; i < 3; ++i) {
    CHECK(error_of([&] { both.cuda->begin(1, Phase::kDecode); }).find("out of device memory") !=
          std::string::npos);
    CHECK(error_of([&] { both.cuda->begin(100, Phase::kPrefill); }).find("out of device memory") !=
          std::string::npos);
    CHECK(both.cuda->length() == 100);
  }
  simt::set_memory(kMemory);
  both.decode(simt::kIsSlow ? 1 : 10, Mood::kPlain);
  both.prefill(100, Mood::kTies);
  both.decode(1, Mood::kTies);
}

TEST_CASE(
    "cuda tiers: while memory is refused to a step that chose hot tokens, it tells of them once") {
  for (const int cut : {0, 2}) {
    BothStores both(kShape, thaw_options(), 3, true);
    for (int n = 0; n < 100; n += 5) both.prefill(5, Mood::kPlain);  // as above
    int n_refused = 0;
    for (std::size_t more = 0;; more += 64) {
      simt::set_memory(kMemory);
      simt::set_memory(static_cast<std::size_t>(taken()) + more);
      const std::string error = error_of([&] { both.cuda->begin(1, Phase::kDecode); });
      if (error.empty()) break;
      CHECK(error.find("out of device memory") != std::string::npos);
      ++n_refused;
    }
    simt::set_memory(kMemory);
    CHECK(n_refused > 2);
    both.cpu->begin(1, Phase::kDecode);
    if (cut > 0) both.rewind(100 - cut);
    both.decode(3, Mood::kPlain);
  }
}

TEST_CASE("cuda tiers: calls that are out of order are refused, and a rewind begins anew") {
  KvOptions options = thaw_options();
  options.policy.policy = Policy::kWindow;
  options.check = true;
  const Stream stream;
  const DeviceBuffer<float> x(3 * 2 * 8, "x");
  fill_device(x.data(), 0, x.bytes(), stream);
  const auto kv = make_cuda_tiered_store({2, 2, 8, 40, KvType::kF16, {}}, options, stream);
  testing::check_step_order(*kv, x.data());
}

TEST_CASE("cuda tiers: a step that is given up leaves no row behind") {
  KvOptions options = thaw_options();
  options.hot_tokens = 17;
  BothStores both(kShape, options, 3);
  both.prefill(60, Mood::kPlain);
  both.decode(4, Mood::kPlain);
  for (int i = 0; i < 3; ++i)
    both.cuda->begin(1, Phase::kDecode), both.cpu->begin(1, Phase::kDecode);
  both.rewind(64);
  both.decode(2, Mood::kTies);
  both.cuda->begin(1, Phase::kDecode), both.cpu->begin(1, Phase::kDecode);
  both.reset(Rung::kWindow);
  both.rewind(66);
  both.prefill(4, Mood::kTies);
  both.decode(1, Mood::kTies);
}

TEST_CASE("cuda tiers: tokens that are restored teach nothing, and leave ghosts") {
  for (const Policy policy : {Policy::kThaw, Policy::kAsr, Policy::kBudget}) {
    if (simt::kIsSlow && policy != Policy::kThaw) continue;
    KvOptions options = thaw_options();
    options.policy.policy = policy;
    options.check = true;
    BothStores both(kShape, options, 9);
    both.restore(130), both.restore(1);
    both.decode(2, Mood::kPlain);
    both.restore(9);
    both.prefill(4, Mood::kTies);
    both.decode(3, Mood::kTies);
    both.rewind(135);
    both.restore(5);
    both.decode(1, Mood::kPlain);
  }
}

TEST_CASE("cuda tiers: any call that fails is one clear error") {
  const auto everything = [&] {
    BothStores both({1, 1, 8, 200, KvType::kF16, {}}, thaw_options(), 3);
    both.prefill(20, Mood::kPlain);
    both.decode(2, Mood::kPlain);
    both.reset(Rung::kWindow), both.reset(Rung::kFull);
    both.decode(1, Mood::kPlain);
    both.rewind(10);
    both.decode(1, Mood::kPlain);
  };
  everything();  // what is asked for once a process
  simt::fail_call(0);
  everything();
  const int n_calls = simt::fail_call(0);
  int n_unnoticed = 0;  // a prompt's staged rows, which it can do without
  CHECK(n_calls > 100);
  for (int call = 1; call <= n_calls; call += simt::kIsSlow ? 61 : 3) {
    simt::fail_call(call);
    const std::string error = error_of(everything);
    simt::fail_call(0);
    forget_failure();
    if (error.empty() && ++n_unnoticed > 1)
      FAIL("call " << call << " of " << n_calls << " failed, and nobody noticed");
    if (error.find('\n') != std::string::npos) FAIL("call " << call << ": " << error);
  }
}

TEST_CASE("cuda tiers: pinned memory that is refused is plain memory, where the device reads it") {
  const auto pages = make_pinned_pages();
  simt::fail_call(1);
  CHECK(error_of([&] {
          pages->take(1000, "the cold tier");
        }).starts_with("the cold tier: the system refuses"));
  simt::set_plain_memory(true);
  simt::fail_call(1);
  const std::byte* page = pages->take(1000, "the cold tier");  // stderr says so
  simt::set_plain_memory(false);
  CHECK(std::all_of(page, page + 1000, [](std::byte b) { return b == std::byte{0}; }));
  simt::fail_call(1);
  CHECK(pages->take(1000, "the cold tier") != nullptr);  // the system is not asked again
  simt::fail_call(0);
}

TEST_CASE("cuda tiers: what cannot be is refused in one line") {
  const Stream stream;
  const auto made = [&](const KvShape& shape, const KvOptions& options) {
    return error_of([&] { make_cuda_tiered_store(shape, options, stream); });
  };
  KvOptions options = thaw_options();
  CHECK(made({1, 1, 12, 10}, options) ==
        "KV store: expected a head_dim that 8 divides, up to 256, on the GPU, found 12");
  CHECK(made({1, 1, 8, 0}, options).starts_with("KV store: expected positive sizes"));
  options.hot_tokens = 3;
  CHECK(made(kShape, options).starts_with("--hot-tokens: expected room for at least 9 tokens"));
  options.hot_tokens = 0, options.cold_file = std::string(3, 'x');
  CHECK(made(kShape, options).starts_with("--cold-file: expected --backend cpu"));
  const auto store = make_cuda_tiered_store(kShape, thaw_options(), stream);
  store->record(nullptr);
  BothStores both(kShape, thaw_options(), 3);
  both.prefill(20, Mood::kPlain);
  testing::LastStep recorder(true);
  CHECK(error_of([&] { both.cuda->record(&recorder); }) ==
        "KV store: a recorder of freezes and thaws: expected an empty store, found 20 tokens");
}
