// What an action that must fail says.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "device/error.h"

namespace thaw::testing {

// The message of the Error that action() throws, which must be one line of printable characters; ""
// when it throws none.
template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    const std::string message = error.what();
    CHECK(message.find_first_of("\n\r\t\x1b") == std::string::npos);
    CHECK_FALSE(message.empty());
    return message;
  }
  return "";
}

}  // namespace thaw::testing
