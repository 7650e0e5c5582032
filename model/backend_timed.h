// A backend that times chosen ops of the passes that go through it, one call at a time.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "model/backend.h"

namespace thaw {

// What can be timed; the names are those that a profile shows.
inline const std::vector<std::string> kTimedOps = {"embed",  "qkv",         "append",  "attend",
                                                   "settle", "project_add", "gate_up", "logits"};

// Seconds of each call of an op since its first decode step, with cold caches before it.
using OpTimes = std::map<std::string, std::vector<double>>;

// Passes of one row are timed op by op: those named in `ops`, of kTimedOps. Each timed call empties
// the caches and is waited for, so a pass as a whole tells nothing. Results are those of `inner`.
class TimedBackend final : public Backend {
 public:
  // `times` must outlive it.
  TimedBackend(std::unique_ptr<Backend> inner, std::vector<std::string> ops, OpTimes& times);
  ~TimedBackend() override;

  std::string name() const override { return inner_->name(); }
  Ops& ops() override;
  Attention& attention() override;
  int best_rows() const override { return inner_->best_rows(); }
  int best_freeze_from() const override { return inner_->best_freeze_from(); }
  std::unique_ptr<KvStore> make_kv_store(const KvShape& shape, const KvOptions& options) override;
  Scratch begin(std::span<const std::int32_t> tokens, int first_position, int n_logits) override;
  void upload(float* to, std::span<const float> from) override { inner_->upload(to, from); }
  std::span<const float> fetch(const Scratch& a, std::size_t n) override {
    return inner_->fetch(a, n);
  }
  void enter_layer(int layer) override { inner_->enter_layer(layer); }
  double time_cold(const std::function<void()>& work) override { return inner_->time_cold(work); }
  double measure_bandwidth() override { return inner_->measure_bandwidth(); }

  // Runs work(), which is the op; times it if that is wanted.
  void measure(const std::string& op, const std::function<void()>& work);

 private:
  class TimedOps;
  class TimedAttention;

  std::unique_ptr<Backend> inner_;
  std::vector<std::string> wanted_;
  OpTimes& times_;
  bool one_row_ = false;  // so the running pass is timed
  std::unique_ptr<TimedOps> ops_;
  std::unique_ptr<TimedAttention> attention_;
};

}  // namespace thaw
