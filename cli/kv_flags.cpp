#include "cli/kv_flags.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "device/error.h"

namespace thaw {
namespace {

// "k3v2" -> 3 and 2; "off" -> 0 and 0.
bool parse_ghost(const std::string& text, int& key_bits, int& value_bits) {
  key_bits = value_bits = 0;
  if (text == "off") return true;
  if (text.size() != 4 || text[0] != 'k' || text[2] != 'v') return false;
  key_bits = text[1] - '0';
  value_bits = text[3] - '0';
  return key_bits >= 1 && key_bits <= 4 &&
         (value_bits == 0 || value_bits == 1 || value_bits == 2 || value_bits == 4);
}

Policy policy_named(const std::string& name) {
  const auto* found = std::find(std::begin(kPolicyNames), std::end(kPolicyNames), name);
  return static_cast<Policy>(found - std::begin(kPolicyNames));
}

// The economy preset: fewer bits, more recalls.
void apply_preset(const std::string& preset, PolicyParams& p) {
  if (preset != "economy" || p.policy != Policy::kThaw) return;
  p.ghost_key_bits = 2;
  p.ghost_value_bits = 2;
  p.epsilon = 1.5e-3f;
  p.caution = 1.5f;
  p.stay = 0;
}

// A flag that says what freezes or how, and the policy that alone reads it; "": all but full.
struct FreezingFlag {
  const char *name, *policy;
  bool is_given;
};
std::vector<FreezingFlag> freezing_flags(const KvFlags& f) {
  return {{"--preset", "thaw", f.preset != "default"},
          {"--hot-fraction", "", f.hot_fraction.has_value()},
          {"--hot-tokens", "", f.hot_tokens.has_value()},
          {"--hot-bytes", "", f.hot_bytes.has_value()},
          {"--freeze-from", "thaw", f.freeze_from.has_value()},
          {"--window", "", f.window.has_value()},
          {"--sinks", "", f.sinks.has_value()},
          {"--ghost", "thaw", f.ghost.has_value()},
          {"--epsilon", "thaw", f.epsilon.has_value()},
          {"--caution", "thaw", f.caution.has_value()},
          {"--stay", "thaw", f.stay.has_value()},
          {"--select", "thaw", f.select != "head"},
          {"--softness", "asr", f.softness.has_value()},
          {"--tau-quantile", "asr", f.quantile.has_value()}};
}

}  // namespace

std::string ghost_name(const PolicyParams& p) {
  return p.ghost_key_bits == 0 ? "off" : join("k", p.ghost_key_bits, "v", p.ghost_value_bits);
}

KvType KvFlags::type() const { return kv_type_named(type_name).value_or(KvType::kF16); }

KvOptions KvFlags::options() const {
  KvOptions o;
  PolicyParams& p = o.policy;
  p.policy = policy_named(policy);
  if (hot_fraction.has_value() + hot_tokens.has_value() + hot_bytes.has_value() > 1)
    throw UsageError("expected at most one of --hot-fraction, --hot-tokens and --hot-bytes");
  if (p.policy == Policy::kBudget)
    p.window = 24;  // worth 4 % of perplexity; h2o keeps half its room
  if (p.policy == Policy::kAsr) p.sinks = 0, p.window = 32;  // the paper's: no sinks
  apply_preset(preset, p);
  if (p.policy != Policy::kFull) {
    o.hot_fraction = hot_fraction.value_or(0);
    o.hot_tokens = hot_tokens.value_or(0);
    o.hot_bytes = hot_bytes.value_or(0);
  }
  if ((p.policy == Policy::kH2o || p.policy == Policy::kBudget) && !hot_tokens && !hot_bytes &&
      !hot_fraction)
    o.hot_fraction = 1.0 / 3;
  p.window = window.value_or(p.window);
  p.sinks = sinks.value_or(p.sinks);
  p.epsilon = epsilon.value_or(p.epsilon);
  p.caution = caution.value_or(p.caution);
  p.stay = stay.value_or(p.stay);
  p.softness = softness.value_or(p.softness);
  p.quantile = quantile.value_or(p.quantile);
  p.per_head = select == "head";
  if (ghost) parse_ghost(*ghost, p.ghost_key_bits, p.ghost_value_bits);
  o.cold_file = cold_file.value_or("");
  o.check = check;
  return o;
}

std::vector<KvFlags> with_policies(const KvFlags& kv, const std::vector<std::string>& policies) {
  std::vector<KvFlags> variants;
  for (const std::string& policy : policies) variants.emplace_back(kv).policy = policy;
  return variants;
}

void check_kv(const std::vector<KvFlags>& variants) {
  const auto some = [&](const auto& is) {
    return std::any_of(variants.begin(), variants.end(), is);
  };
  const bool freezes = some([](const KvFlags& f) { return f.policy != "full"; });
  for (const KvFlags& variant : variants) {
    for (const auto& [name, policy, is_given] : freezing_flags(variant)) {
      if (!is_given) continue;
      if (!freezes)
        throw UsageError(join(name, ": expected another --policy than full, which never freezes"));
      const auto reads = [only = std::string(policy)](const KvFlags& f) {
        return f.policy == only;
      };
      if (*policy != '\0' && !some(reads))
        throw UsageError(join(name, ": expected --policy ", policy, ", which alone reads it"));
    }
    variant.options();
  }
}

void add_kv_flags(Flags& flags, KvFlags& kv, std::vector<std::string>* policies) {
  const auto positive = [](double x) { return x > 0; };
  flags.choice(kv.type_name, "--kv-type", {"f16", "bf16", "f32", "q8_0", "q4_0"},
               "how exact keys and values are stored");
  const std::vector<std::string> names(std::begin(kPolicyNames), std::end(kPolicyNames));
  const std::string help =
      "which tokens stay exact in fast memory; the rest is frozen, and with thaw answers through "
      "ghosts. full: all of them";
  if (policies) {
    flags.choices(*policies, "--policy", names, help + "; a list takes turns");
  } else {
    flags.choice(kv.policy, "--policy", names, help);
  }
  flags.choice(kv.preset, "--preset", {"default", "economy"},
               "thaw: economy takes smaller ghosts and reads more from the cold tier");
  flags.real(kv.hot_fraction, "--hot-fraction",
             "bound the hot tier: X times the context as it grows (h2o, budget: default 1/3; thaw "
             "with ghosts: no fewer than 128 tokens)",
             "a number above 0, at most 1", [](double x) { return x > 0 && x <= 1; });
  flags.integer(kv.hot_tokens, "--hot-tokens", "bound the hot tier: N tokens a layer", 1, 1 << 24);
  flags.bytes(kv.hot_bytes, "--hot-bytes",
              "bound the hot tier: N bytes over all layers; 64M and 2G are understood");
  flags.integer(kv.freeze_from, "--freeze-from",
                join("thaw: freeze in contexts of N tokens and more; shorter ones, which it would "
                     "make no faster, stay exact as a whole (default ",
                     kv.freezes_at_once ? "0, to measure what freezing does"
                                        : "1024; on a GPU 65536, or what fits",
                     ")"),
                0, 1 << 24);
  flags.integer(kv.window, "--window",
                "newest tokens that are never frozen (default 16; budget: 24; asr: 32)", 0,
                1 << 24);
  flags.integer(kv.sinks, "--sinks", "oldest tokens that are never frozen (default 4; asr: 0)", 0,
                1 << 24);
  flags.text(
      kv.ghost, "--ghost", "kAvB|off",
      "thaw: bits of a ghost's key (1 to 4) and value (0, 1, 2, 4) (default k3v2)",
      [](const std::string& s) {
        int k, v;
        return parse_ghost(s, k, v);
      },
      "such as k3v2: 1 to 4 bits for keys; 0, 1, 2 or 4 for values; or off");
  flags.real(kv.epsilon, "--epsilon",
             "thaw: attention probability from which a frozen token is recalled (default 0.0028; "
             "economy: 0.0015)",
             "a number above 0", positive);
  flags.real(kv.caution, "--caution",
             "thaw: where ghosts' scores err by much, recall also what is that probable if its "
             "score errs by X standard deviations; 0: never (default 3; economy: 1.5)",
             "a number from 0 to 100", [](double x) { return x >= 0 && x <= 100; });
  flags.real(
      kv.stay, "--stay",
      "thaw: a token needed c times stays hot for X sqrt(c) more steps (default 1.5; economy: 0)",
      "a number from 0 to 255", [](double x) { return x >= 0 && x <= 255; });
  flags.choice(kv.select, "--select", {"head", "layer"},
               "thaw: what freezes together: a KV head's tokens, or a layer's");
  flags.real(kv.softness, "--softness",
             "asr: a token of low relevance c times sleeps sqrt(c) / X steps (default 2)",
             "a number from 0.01 to 1000", [](double x) { return x >= 0.01f && x <= 1000; });
  flags.real(kv.quantile, "--tau-quantile",
             "asr: share of the context's tokens that count as of low relevance (default 0.5)",
             "a number from 0 to 1", [](double x) { return x >= 0 && x <= 1; });
  flags.path(
      kv.cold_file, "--cold-file", "PATH",
      "keep the cold tier in a new file instead of memory; it is gone when the program ends");
  flags.toggle(kv.check, "--check-kv",
               "check the store after every step: slow, and an error names what does not hold");
}

}  // namespace thaw
