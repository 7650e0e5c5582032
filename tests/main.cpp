#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "tests/sanitized.h"

namespace thaw::testing {

bool sanitized(std::string_view by) {
  return SANITIZERS[0] != '\0' && std::string_view(SANITIZERS).find(by) != std::string_view::npos;
}

}  // namespace thaw::testing
