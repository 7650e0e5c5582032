// What a needle grid looks like: text, a page, a document.
#pragma once

#include <string>
#include <vector>

#include "cli/needle_text.h"
#include "kvstore/kvstore.h"
#include "kvstore/recovery.h"

namespace thaw {

struct NeedleAnswer {
  int context = 0;   // tokens asked for
  int question = 1;  // 1, or 2 with --second
  NeedleKey key;
  std::string text;       // what the model wrote
  std::string number;     // the first number in it
  double share = 0;       // of the key's digits that stand at their place
  double least_lead = 0;  // over its tokens: how far the one chosen led the next, in nats
  std::vector<Recovery::Firing> firings;  // while it was asked and answered
  bool right() const { return number == key.digits; }
};

// The grid under one policy. All runs hold the same questions in the same order.
struct NeedleRun {
  std::string policy;
  std::vector<NeedleAnswer> answers;
  double seconds = 0;
  // Sums over texts, at the end of each.
  KvUsage usage;
  KvCounters counters;
  std::int64_t f16_bytes = 0;  // of all tokens
  int n_layers = 0;
  int alarms = 0;  // rungs that recovery climbed
  int checks = 0;  // passes in which what was written ran again

  // Means: bytes in fast memory as a share of f16; share of the context that a decode step reads
  // exactly; tokens recalled a layer and step.
  double resident() const;
  double attended() const;
  double recalls() const;
};

struct NeedleScore {
  int right = 0;
  double share = 0;  // of all digits
};
NeedleScore score(const NeedleRun& run);

// The run under policy full, or null.
const NeedleRun* find_full(const std::vector<NeedleRun>& runs);

// Of what `reference` answered right, how many `run` answered right, too. The others hung on what
// is at most `lead`: the reference's least_lead, for a second question also that of the answer to
// the first, which is part of the talk.
struct NeedleAgreement {
  int both = 0;
  int reference = 0;
  double lead = 0;
};
NeedleAgreement agreement(const NeedleRun& run, const NeedleRun& reference);

// A heat map of each run: rows are contexts, columns depths, cells the percentage of digits right.
std::string needle_text_report(const std::vector<NeedleRun>& runs, bool colour);

// The same as a page that needs nothing else, with every answer. `settings`: a line about the run.
std::string needle_page(const std::vector<NeedleRun>& runs, const std::string& settings);

}  // namespace thaw
