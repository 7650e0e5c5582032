#pragma once

namespace thaw::testing {

// Whether the code under test was compiled with sanitizers. tests/*.cpp never are, so that the same
// objects serve both (Makefile); main.cpp, which answers, is compiled for each.
bool sanitized();

}  // namespace thaw::testing
