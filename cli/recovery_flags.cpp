#include "cli/recovery_flags.h"

#include <algorithm>
#include <iterator>
#include <nlohmann/json.hpp>

#include "device/error.h"

namespace thaw {

RecoveryParams RecoveryFlags::params(const std::string& policy) const {
  RecoveryParams p;
  if (policy == "full") return p;
  const auto* found = std::find(std::begin(kRungNames), std::end(kRungNames), rung());
  p.highest = static_cast<Rung>(found - std::begin(kRungNames));
  p.z = z.value_or(p.z);
  p.rewalk_tokens = rewalk_tokens.value_or(p.rewalk_tokens);
  return p;
}

void add_recovery_flags(Flags& flags, RecoveryFlags& r) {
  const RecoveryParams defaults;
  flags.choice(r.highest, "--recovery", {"off", "soft", "window", "full", "rewalk"},
               "highest rung to climb when the entropy of the output, or the attention on frozen "
               "tokens, jumps: thaw what sleeps long; what froze lately; all; all, and write the "
               "last tokens again (default off)");
  flags.real(
      r.z, "--recovery-z",
      join("a jump is X standard deviations above the recent mean (default ", defaults.z, ")"),
      "a number above 0", [](double x) { return x > 0; });
  flags.integer(r.rewalk_tokens, "--rewalk-tokens",
                join("tokens that a rewalk writes again; text appears so much later where it may "
                     "(default ",
                     defaults.rewalk_tokens, ")"),
                1, 1024);
  flags.real(
      r.second_look, "--second-look",
      "thaw, greedy: when the most probable token leads the next by less than X nats (more where "
      "leads are more than 2 nats in the mean), run what was written since the last such pass "
      "again, attending every token exactly; 0: never",
      "a number >= 0", [](double x) { return x >= 0; });
  flags.integer(r.verify, "--verify",
                "run every N tokens again, attending every token exactly, and write on from the "
                "first that --policy full would not have written: the text is that of full; it "
                "appears N tokens at a time; 0: never",
                0, 1024);
}

void check_recovery(const RecoveryFlags& r, const std::vector<std::string>& policies) {
  const auto full = [](const std::string& policy) { return policy == "full"; };
  if (r.highest && r.rung() != "off" && std::all_of(policies.begin(), policies.end(), full))
    throw UsageError("--recovery: expected another --policy than full, which never freezes");
  if (r.z && !r.highest) throw UsageError("--recovery-z needs --recovery");
  if (r.rewalk_tokens && r.rung() != "rewalk")
    throw UsageError("--rewalk-tokens needs --recovery rewalk");
  if (r.verify > 0 && r.rung() != "off")
    throw UsageError("--verify leaves nothing to recover: expected it without --recovery");
}

std::string describe(const Recovery& recovery) {
  std::string out;
  for (const Rung rung : {Rung::kSoft, Rung::kWindow, Rung::kFull, Rung::kRewalk}) {
    if (recovery.count(rung) == 0) continue;
    out += join(out.empty() ? "" : ", ", kRungNames[static_cast<int>(rung)], " ",
                recovery.count(rung), " (at ");
    const char* comma = "";
    for (const Recovery::Firing& f : recovery.firings()) {
      if (f.rung != rung) continue;
      out += join(comma, f.position);
      comma = ", ";
    }
    out += ")";
  }
  return out.empty() ? "never" : out;
}

nlohmann::ordered_json to_json(const std::vector<Recovery::Firing>& firings) {
  nlohmann::ordered_json fired = nlohmann::ordered_json::array();
  for (const Recovery::Firing& f : firings) {
    fired.push_back(
        {{"token", f.position},
         {"rung", kRungNames[static_cast<int>(f.rung)]},
         {"signal", f.signal == Recovery::Signal::kEntropy ? "output_entropy_nats" : "ghost_mass"},
         {"value", f.value},
         {"mean", f.mean},
         {"sd", f.sd}});
  }
  return fired;
}

nlohmann::ordered_json to_json(const Recovery& recovery) {
  nlohmann::ordered_json json = {
      {"highest", kRungNames[static_cast<int>(recovery.params().highest)]}};
  for (const Rung rung : {Rung::kSoft, Rung::kWindow, Rung::kFull, Rung::kRewalk})
    json[kRungNames[static_cast<int>(rung)]] = recovery.count(rung);
  json["fired"] = to_json(recovery.firings());
  return json;
}

}  // namespace thaw
