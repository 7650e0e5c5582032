// Where keys and values live. Two tiers: every token's exact key and value stands in the cold tier
// from the moment it is appended; those that matter now also stand in the hot tier, and every other
// token is frozen. What is frozen leaves a ghost (kvstore/ghost.h) or is mute, as the policy says.
//
// One step of a model, layer by layer:   kv.begin(n, phase);
//   for each layer:  kv.append(layer, k, v, n);  attend(.., kv.view(layer), &stats);
//                    kv.settle(layer, stats);
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kvstore/ghost.h"
#include "kvstore/pages.h"
#include "kvstore/policy.h"
#include "kvstore/recorder.h"

namespace thaw {

class ThreadPool;  // device/thread_pool.h

enum class KvType : std::uint8_t { kF16, kBF16, kF32, kQ8_0, kQ4_0 };
std::string_view kv_type_name(KvType type);  // "f16", "bf16", "f32", "q8_0", "q4_0"
std::optional<KvType> kv_type_named(std::string_view name);
std::size_t kv_row_bytes(KvType type, int head_dim);  // of one key or value of one head

struct KvShape {
  int n_layers = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  int capacity = 0;  // tokens
  KvType type = KvType::kF16;
  KvRope rope = {};  // of the keys that will be appended

  // Bytes of keys and values of one token over all layers.
  std::int64_t bytes_per_token() const;
};

// How a forward pass attends. Prefill: each row sees every token before it, exactly. Decode: one
// row, which sees what the policy shows it. Restore: keys and values are known, and nobody attends.
enum class Phase : std::uint8_t { kPrefill, kDecode, kRestore };

// Rows of keys and values, in pages. Row i of a head stands in page i >> page_shift.
struct KvRows {
  std::span<const std::byte* const> pages;
  std::size_t offset = 0;        // bytes from a page's start to its first key of head 0
  std::size_t value_offset = 0;  // bytes from a key to its value
  std::size_t head_stride = 0;   // bytes from a head to the next
  std::size_t row_bytes = 0;     // bytes from a row to the next
  int page_shift = 0;            // a page has 2^page_shift rows of each head
  int n_rows = 0;

  int page_rows() const { return 1 << page_shift; }
  const std::byte* key(int head, int row) const {
    return pages[static_cast<std::size_t>(row >> page_shift)] + offset +
           static_cast<std::size_t>(head) * head_stride +
           static_cast<std::size_t>(row & (page_rows() - 1)) * row_bytes;
  }
  const std::byte* value(int head, int row) const { return key(head, row) + value_offset; }
};

// Copies rows first ... first + n - 1 of all heads to `out`: n x n_kv_heads x (key, value).
void copy_rows(std::byte* out, const KvShape& shape, const KvRows& rows, int first, int n_tokens);

// What decode reads of a lane: the heads of a layer that freeze and thaw together, either one head
// or all of them.
struct LaneView {
  KvRows hot;                               // heads counted from the lane's first
  std::span<const std::int32_t> tokens;     // the token in each hot row
  std::span<const std::uint32_t> hot_mask;  // bit t % 32 of word t / 32: token t is hot
};

struct DeviceView;  // kvstore/device_view.h

// The tokens of one layer that attention reads. Keys already carry RoPE.
struct KvView {
  KvType type = KvType::kF16;
  int kv_len = 0;
  int n_kv_heads = 0;
  int head_dim = 0;
  KvRows cold;                         // every token, oldest first
  const DeviceView* device = nullptr;  // the same of a store in device memory; kernels read it

  int lane_heads = 0;  // KV heads that share statistics and decisions: 1, or n_kv_heads
  // Decode under a policy that freezes; empty where all tokens are attended exactly.
  std::vector<LaneView> lanes;
  GhostView ghosts;  // of the layer's heads; absent when frozen tokens are mute
  float recall = 0;  // ghosts of at least this probability, mean over the lane's query heads, are
                     // replaced by the exact token
  Caution caution;   // by how much more a ghost's probability may be, for that
};

// What the policy learns from attend(); filled by attention, read by settle(). "Mean" is over the
// query heads of a lane and the asked rows.
struct AttentionStats {
  struct Recall {
    std::int32_t token;
    float probability;
  };
  struct Lane {
    std::vector<float> probability;  // mean, of each row read: every token, or in decode under a
                                     // policy each hot row
    std::vector<float> relevance;    // mean |q.k| / sqrt(head_dim), likewise
    std::vector<Recall> recalled;    // tokens read exactly from the cold tier, ascending
    float entropy = 0;               // mean of H = ln l + m - sum(p s), in nats
    float ghost_mass = 0;            // mean probability on frozen tokens, recalled ones included
  };
  int n_rows = 0;  // rows asked for
  std::vector<Lane> lanes;
};

// Bytes held now.
struct KvUsage {
  std::int64_t hot = 0;          // pages of the hot tier; as much as was ever needed at once
  std::int64_t ghosts = 0;       // blocks of ghosts
  std::int64_t bookkeeping = 0;  // counters, timers, slot tables
  std::int64_t cold = 0;         // blocks of the cold tier
  std::int64_t full = 0;         // what the tokens take with every one resident
  // What must stand in fast memory: hot + ghosts, or the whole where every token is attended.
  std::int64_t resident = 0;
  int awake_until = 0;  // tokens from which on it freezes; 0: it does, or never will
};

// Sums over steps since the store was made or clear() was called; of tokens, a token of one head
// counting 1 / n_kv_heads, over all layers.
struct KvCounters {
  std::int64_t steps = 0;            // decode steps
  double attended = 0;               // read exactly
  double visible = 0;                // in the context
  double recalled = 0;               // read in place from the cold tier
  double thawed = 0;                 // made hot again, recalled ones included
  double frozen = 0;                 // made cold
  std::int64_t cold_bytes_read = 0;  // by decode: recalls and thaws
  double cold_bytes_visible = 0;     // what reading the whole context each step would have been
};

// Everything that can be chosen. At most one hot_* is above 0; none: no bound, except that
// window then keeps its sinks and its window alone.
struct KvOptions {
  PolicyParams policy;
  double hot_fraction = 0;     // most tokens of a layer that are hot, as a share of the context
  int hot_tokens = 0;          // the same in tokens
  std::int64_t hot_bytes = 0;  // the same in bytes over all layers
  std::string cold_file;       // the cold tier's file; empty: memory
  int centre_tokens = kCentreTokens;  // tokens whose mean ghosts are centred on
  // thaw: decode freezes from this many tokens on. A shorter context is attended exactly, whole,
  // and has no ghosts. A bound of the hot tier that holds fewer, or is a share, goes first.
  int freeze_from = 0;
  bool check = false;  // hash for check(); a step then checks its own tokens, every 64th step all
};
inline constexpr int kCheckSteps = 64;

class KvStore {
 public:
  virtual ~KvStore() = default;

  // Opens a step of n_tokens (1 in decode) and takes the memory it needs. Throws Error, with no
  // token lost, when the tokens do not fit the capacity, memory is refused, or the step before is
  // not settled in every layer: then rewind() comes first.
  virtual void begin(int n_tokens, Phase phase) = 0;

  // Appends the step's tokens to `layer`: k and v are T x kv_dim f32, rounded to the store's type
  // here. Once a layer and step, and all of them: throws Error otherwise.
  virtual void append(int layer, const float* k, const float* v, int n_tokens) = 0;

  // The tokens of `layer`; valid until the next append, settle, rewind, reset or clear.
  virtual KvView view(int layer) const = 0;

  // Copies what is exact of tokens first ... first + n - 1 of `layer` to `rows` in host memory, as
  // it is stored: n x n_kv_heads x (key, value), each kv_row_bytes(). Waits for what writes it.
  virtual void read(int layer, int first, int n_tokens, std::byte* rows) const = 0;

  // How many of the step's last rows the policy wants statistics of; 0: none at all.
  virtual int stats_rows(int n_tokens) const = 0;

  // Takes the attention of this step into account: the policy freezes and thaws. Throws Error
  // unless the layer was appended to since it was last settled.
  virtual void settle(int layer, const AttentionStats& stats) = 0;

  // Forgets every token at `position` and after it, in all layers. 0 <= position <= length().
  virtual void rewind(int position) = 0;
  virtual void clear() = 0;  // rewind(0), reset(kNone), and counters to 0

  // A rung of recovery (kvstore/recovery.h): thaws what the rung names; of kFull, the next
  // exact_steps steps attend every token. kNone ends what earlier ones began. Returns tokens
  // thawed.
  virtual double reset(Rung rung, int exact_steps = kAlarmSteps) = 0;

  // Throws Error naming the first invariant that does not hold (docs/kvstore.md lists them).
  virtual void check() const = 0;

  virtual void record(KvRecorder* recorder) = 0;  // null (the default): nobody listens

  virtual int length() const = 0;  // complete tokens: those that every layer holds
  virtual const KvShape& shape() const = 0;
  virtual const KvOptions& options() const = 0;
  virtual KvUsage usage() const = 0;
  virtual const KvCounters& counters() const = 0;
  // Mean over layers and heads of the last step's ghost mass; none where it attended all exactly.
  virtual std::optional<float> ghost_mass() const = 0;

  // A number that no other store of the process has had: an address can be had again.
  std::uint64_t id() const { return id_; }

 private:
  static inline std::atomic<std::uint64_t> n_stores_ = 0;
  const std::uint64_t id_ = ++n_stores_;
};

// Throws Error when sizes are not positive, do not fit 64 bits, or do not fit the type.
void check_shape(const KvShape& shape);

// Throws Error when shape and options do not fit each other. The second form takes its memory from
// the sources given: fast for the hot tier and ghosts, cold for the cold tier. pool: whose threads
// write ghosts, and which must outlive the store; null: the caller's alone.
std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options = {},
                                       ThreadPool* pool = nullptr);
std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options,
                                       std::unique_ptr<PageSource> fast,
                                       std::unique_ptr<PageSource> cold,
                                       ThreadPool* pool = nullptr);

}  // namespace thaw
