// What the calls of the runtime share.
#pragma once

#include <string>

namespace simt {

bool fails();                              // at the start of every call that may fail
std::string name_or(const char* unnamed);  // of the innermost profile range

}  // namespace simt
