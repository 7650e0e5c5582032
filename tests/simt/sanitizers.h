// What the sanitizers are told about fibers and memory; nothing in a build without them. The
// emulator itself is compiled without ThreadSanitizer, so the Makefile defines SIMT_RACE for it.
#pragma once

#include <cstddef>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#ifdef SIMT_RACE
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* clock);
void __tsan_release(void* clock);
}
#endif

namespace simt {

#ifdef SIMT_RACE
inline constexpr bool kRace = true;
inline void* new_identity() { return __tsan_create_fiber(0); }
inline void* identity() { return __tsan_get_current_fiber(); }
inline void become(void* identity) { __tsan_switch_to_fiber(identity, 1); }  // 1: orders nothing
inline void acquire(const void* clock) { __tsan_acquire(const_cast<void*>(clock)); }
inline void release(const void* clock) { __tsan_release(const_cast<void*>(clock)); }
#else
inline constexpr bool kRace = false;
inline void* new_identity() { return nullptr; }
inline void* identity() { return nullptr; }
inline void become(void*) {}
inline void acquire(const void*) {}
inline void release(const void*) {}
#endif

#ifdef __SANITIZE_ADDRESS__
inline constexpr bool kAddress = true;
inline void poison(void* at, std::size_t bytes) { __asan_poison_memory_region(at, bytes); }
inline void unpoison(void* at, std::size_t bytes) { __asan_unpoison_memory_region(at, bytes); }
#else
inline constexpr bool kAddress = false;
inline void poison(void*, std::size_t) {}
inline void unpoison(void*, std::size_t) {}
#endif

}  // namespace simt
