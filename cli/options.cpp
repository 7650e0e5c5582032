#include "cli/options.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <set>

#include "device/error.h"
#include "model/forward.h"

namespace thaw {
namespace {

constexpr int kMaxThreads = 256;
constexpr int kMaxContext = 1 << 24;

// What auto comes down to, and why.
std::string automatic_backend(const CommonOptions& o, const Config& c) {
  if (!has_cuda()) return "cpu";
  std::string backend = "cpu", why = o.needs_cpu;
  try {
    const std::string device = cuda_device_name();
    if (why.empty() && (c.head_dim % 8 != 0 || c.head_dim > 256))
      why = join("head_dim ", c.head_dim);
    if (why.empty()) backend = "cuda";
    why = why.empty() ? device : why + " runs on the CPU only";
  } catch (const Error& error) {
    why = error.what();
  }
  if (!o.quiet) std::cerr << "backend  " << backend << ": " << why << "\n";
  return backend;
}

}  // namespace

int CommonOptions::default_threads() {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  ::sched_getaffinity(0, sizeof allowed, &allowed);
  std::set<std::string> cores;  // CPUs of one core have the same list of siblings
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    const std::string topology = join("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    std::string siblings;
    std::getline(std::ifstream(topology + "thread_siblings_list"), siblings);
    cores.insert(siblings.empty() ? join(cpu) : siblings);
  }
  return std::clamp(static_cast<int>(cores.size()), 1, kMaxThreads);
}

void add_model_flag(Flags& flags, CommonOptions& o, const std::string& help) {
  flags.text(o.model, "-m, --model", "PATH", help);
  flags.is_path(o.model, "--model", false);
}

void add_run_flags(Flags& flags, CommonOptions& o) {
  flags.section("Machine");
  flags.integer(o.threads, "-t, --threads", "CPU threads; by default the physical cores", 1,
                kMaxThreads);
  flags.choice(o.backend, "--backend", {"auto", "cpu", "cuda", "checked"},
               join("where to compute; checked: cuda and cpu side by side, and the first op that "
                    "differs is an error; this build has: ",
                    has_cuda() ? "cpu, cuda" : "cpu"));
}

void add_kv_flags(Flags& flags, CommonOptions& o, const std::string& context_help,
                  std::vector<std::string>* policies) {
  flags.section("Context");
  flags.integer(o.context, "-c, --context", context_help, 1, kMaxContext);
  add_kv_flags(flags, o.kv, policies);
}

void add_output_flags(Flags& flags, CommonOptions& o) {
  flags.section("Output");
  flags.toggle(o.json, "--json", "print one JSON document instead of text");
  flags.toggle(o.quiet, "-q, --quiet", "no progress and no statistics on standard error");
}

void check_common(CommonOptions& o) {
  if (o.model.value_or("").empty())
    throw UsageError("expected a model: -m FILE.gguf or -m DIRECTORY");
  const bool cuda = o.backend == "cuda" || o.backend == "checked";
  require(has_cuda() || !cuda, "--backend ", o.backend,
          ": this build has no CUDA backend; it has: cpu");
  if (o.kv.cold_file) o.needs_cpu = "--cold-file";
}

int context_tokens(const CommonOptions& o, const Config& config) {
  if (o.context.value_or(0) > config.context_length) {
    std::cerr << "warning: --context " << *o.context << " is beyond the " << config.context_length
              << " tokens that the model was trained for\n";
  }
  return o.context.value_or(config.context_length);
}

void require_finite(std::span<const float> logits, const Model& model) {
  const auto finite = [](float x) { return std::isfinite(x); };
  const auto other = std::find_if_not(logits.begin(), logits.end(), finite);
  if (other == logits.end()) return;
  fail(model.path.string(), ": logits: expected finite numbers, found ", *other,
       "; thaw inspect --check looks for NaN among the weights");
}

std::string describe(const Config& c) {
  return join(c.name.empty() ? "unnamed" : printable(c.name), ": ", c.n_layers, " layers of width ",
              c.dim, ", ", c.n_heads, " query and ", c.n_kv_heads, " key/value heads of ",
              c.head_dim, ", vocabulary ", c.vocab_size, ", context ", c.context_length);
}

std::unique_ptr<Backend> make_backend(const CommonOptions& o, const Model& model) {
  const std::string backend = o.backend == "auto" ? automatic_backend(o, model.config) : o.backend;
  if (backend == "cpu") return make_cpu_backend(model, o.threads);
  require(o.needs_cpu.empty(), o.needs_cpu, ": runs on the CPU only; expected --backend cpu");
  return backend == "cuda" ? make_cuda_backend(model, o.threads)
                           : make_checked_backend(model, o.threads);
}

std::unique_ptr<KvStore> make_kv_store(Backend& backend, const KvFlags& flags, const Config& c,
                                       int capacity) {
  for (const auto& [name, tokens] : {std::pair("--window", flags.window), {"--sinks", flags.sinks}})
    if (tokens.value_or(0) > capacity)
      throw UsageError(
          join(name, ": expected at most the context of ", capacity, " tokens, found ", *tokens));
  KvOptions options = flags.options();
  options.freeze_from =
      flags.freeze_from.value_or(flags.freezes_at_once ? 0 : backend.best_freeze_from());
  return backend.make_kv_store(kv_shape(c, capacity, flags.type()), options);
}

}  // namespace thaw
