// Stacks that take turns on one thread of the system.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) || defined(SIMT_UCONTEXT)
#include <ucontext.h>
#endif

namespace simt {

inline constexpr std::size_t kStackBytes = 256 << 10;  // reserved, with a guard page below

// Where a stack stands. One that was not prepared stands for the thread it is first left from.
struct Context {
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
  void* stack_pointer = nullptr;
#else
  ucontext_t registers;
#endif
  const void* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* identity = nullptr;    // ThreadSanitizer's
};

// Gives `context` a stack and an identity of its own. When first switched to it calls entry(),
// which must begin with arrived() and never return.
void prepare(Context& context, void (*entry)());
void switch_to(Context& from, Context& to);
void arrived(Context& from);  // `from`: the context that was left

}  // namespace simt
