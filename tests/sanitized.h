#pragma once

namespace thaw::testing {

// Whether the code under test was compiled with sanitizers. Tests never are, so that the same
// objects serve both (Makefile); main.cpp is.
bool sanitized();

}  // namespace thaw::testing
