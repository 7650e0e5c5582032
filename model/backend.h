// Where a forward pass computes: its ops, its attention, its stores, and the memory that its
// activations live in. model/forward.cpp composes them and knows no backend.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "attention/attention.h"
#include "device/thread_pool.h"
#include "kvstore/kvstore.h"
#include "model/model.h"
#include "model/ops.h"
#include "model/sampler.h"

namespace thaw {

// Scratch of one forward pass, where the backend's ops read and write it: T rows each.
struct Scratch {
  float *x, *q, *k, *v, *attn_out, *h;
  float* logits;  // n_logits rows
  std::span<const std::int32_t> tokens, positions;
};

class Backend {
 public:
  explicit Backend(int n_threads) : pool_(n_threads) {}
  virtual ~Backend() = default;

  virtual std::string name() const = 0;  // "cpu", "cuda", "checked"
  virtual Ops& ops() = 0;
  virtual Attention& attention() = 0;

  // Tokens of a pass that make the best of the backend, for prompts; any number works.
  virtual int best_rows() const { return 512; }

  // Tokens of a context from which on freezing makes a step faster: KvOptions::freeze_from.
  virtual int best_freeze_from() const { return 1024; }

  // A store for this backend's passes, which must not outlive it.
  virtual std::unique_ptr<KvStore> make_kv_store(const KvShape& shape,
                                                 const KvOptions& options) = 0;

  // Opens a pass over T = tokens.size() rows at positions first_position ...; what it returns is
  // valid until the next call.
  virtual Scratch begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) = 0;

  // Runs, or queues, the layers and the logits of the pass that begin() opened: pass() as a whole.
  // A backend may know from an earlier pass over the same store what it queues.
  virtual void run(const KvStore& kv, const std::function<void()>& pass) {
    static_cast<void>(kv);
    pass();
  }

  // Copies numbers from host memory to where ops read the pass's scratch.
  virtual void upload(float* to, std::span<const float> from) = 0;

  // n logits of the pass, in host memory, when they are there; valid until the next begin().
  virtual std::span<const float> fetch(const Scratch& a, std::size_t n) = 0;

  // What `sampler` would choose among the first n_vocab tokens by the pass's one row of logits,
  // found where they are; waits for it. None where fetch() and the sampler itself have to do it, as
  // on the CPU, and where a logit is not finite.
  virtual std::optional<Prediction> predict(const Scratch& a, Sampler& sampler, int n_vocab) {
    static_cast<void>(a), static_cast<void>(sampler), static_cast<void>(n_vocab);
    return std::nullopt;
  }

  // Called by a pass as it comes to a layer, and with -1 as it leaves the last: for profiles.
  virtual void enter_layer(int layer) { static_cast<void>(layer); }

  // Seconds that `work` takes here once all before it is done, with caches that hold nothing of
  // what it reads.
  virtual double time_cold(const std::function<void()>& work) = 0;
  // GB/s (1e9 bytes) that the memory which holds the weights gives, measured now.
  virtual double measure_bandwidth() = 0;

  ThreadPool& pool() { return pool_; }  // for work on the host

 private:
  ThreadPool pool_;
};

// All keep a reference to `model`. n_threads: at least 1.
std::unique_ptr<Backend> make_cpu_backend(const Model& model, int n_threads);

// The GPU. Where CUDA is not compiled in, has_cuda() is false, and the others throw Error.
bool has_cuda();
std::string cuda_device_name();  // throws Error that says why when there is no device
std::unique_ptr<Backend> make_cuda_backend(const Model& model, int n_threads);

// The GPU and the CPU side by side, op for op on the same input. Throws Error at the first element
// that differs by more than rounding explains (model/backend_checked.cu).
std::unique_ptr<Backend> make_checked_backend(const Model& model, int n_threads);

}  // namespace thaw
