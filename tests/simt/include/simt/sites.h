// Calls that order memory, by where they stand in the source: tests/barriers.py takes them away one
// at a time. Implemented in tests/simt/sites.cpp; only builds with ThreadSanitizer have them.
#pragma once

#include <source_location>

namespace simt {

using Where = std::source_location;

#if defined(__SANITIZE_THREAD__) || defined(SIMT_RACE)
// Whether the call at `where` is to do nothing.
bool skipped(const Where& where);
#else
inline bool skipped(const Where&) { return false; }
#endif

}  // namespace simt
