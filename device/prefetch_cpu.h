// Memory that will be read soon.
#pragma once

#include <cstddef>

namespace thaw {

// Has the CPU fetch bytes into its caches; any address will do.
inline void prefetch(const std::byte* from, std::size_t bytes) {
  for (std::size_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
}

template <class T>
void prefetch(const T& number) {
  __builtin_prefetch(&number);
}

}  // namespace thaw
