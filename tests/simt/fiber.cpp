#include "tests/simt/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>

#include "tests/simt/memory.h"
#include "tests/simt/sanitizers.h"

#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)

// Pushes what a function must preserve, leaves the stack pointer in *from, takes up `to`.
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

void set_entry(Context& context, char* stack, void (*entry)()) {
  // From above: no return address (so that the stack is aligned as after a call), the entry for the
  // switch's `ret`, six registers.
  auto* top = reinterpret_cast<std::uint64_t*>(stack + kStackBytes) - 1;
  *--top = reinterpret_cast<std::uint64_t>(entry);
  context.stack_pointer = top - 6;
}

void swap(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }

#else

namespace simt {
namespace {

void set_entry(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack;
  context.registers.uc_stack.ss_size = kStackBytes;
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
}

void swap(Context& from, Context& to) { swapcontext(&from.registers, &to.registers); }

#endif

}  // namespace

#ifdef SIMT_RACE
// It must not wait at the end for threads that never end, and must remember stacks for long.
extern "C" const char* __tsan_default_options() { return "atexit_sleep_ms=0:history_size=4"; }
#endif

void prepare(Context& context, void (*entry)()) {
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* mapping = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) fatal("no memory for a stack");
  mprotect(mapping, page, PROT_NONE);
  char* stack = static_cast<char*>(mapping) + page;
  context.stack = stack;
  context.stack_bytes = kStackBytes;
  context.identity = new_identity();
  set_entry(context, stack, entry);
}

void switch_to(Context& from, Context& to) {
  if (from.identity == nullptr) from.identity = identity();
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
  become(to.identity);
  swap(from, to);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
#endif
}

void arrived([[maybe_unused]] Context& from) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  std::size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (from.stack == nullptr) from.stack = stack, from.stack_bytes = bytes;
#endif
}

}  // namespace simt
