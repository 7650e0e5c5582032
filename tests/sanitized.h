#pragma once

#include <string_view>

namespace thaw::testing {

// Whether the code under test was compiled with sanitizers. tests/*.cpp never are, so that the same
// objects serve both (Makefile); main.cpp, which answers, is compiled for each.
// by: "thread" or "address"; "": any.
bool sanitized(std::string_view by = "");

}  // namespace thaw::testing

namespace simt {

// Sanitizers make the emulator's steps up to thirty times as long, and see what is wrong in any
// size and order.
inline const bool kIsSlow = thaw::testing::sanitized();

}  // namespace simt
