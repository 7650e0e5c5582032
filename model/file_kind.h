// What a file that should be a model often is instead.
#pragma once

#include <cstddef>
#include <span>
#include <string_view>

namespace thaw {

// "an empty file", "an HTML page", "a git-lfs pointer ...", or "" when it is none of these.
std::string_view mistaken_for(std::span<const std::byte> bytes);

}  // namespace thaw
