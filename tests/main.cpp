#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include "tests/sanitized.h"

namespace thaw::testing {

bool sanitized() {
#ifdef SANITIZED
  return true;
#else
  return false;
#endif
}

}  // namespace thaw::testing
