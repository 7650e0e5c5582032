#include "tests/simt/memory.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>

#include "tests/simt/block.h"
#include "tests/simt/sanitizers.h"
#include "tests/simt/simt.h"

namespace simt {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kGuard = 1 << 20;  // address space before and after an allocation
constexpr std::size_t kAlignment = 256;  // as cudaMalloc promises
constexpr unsigned char kTail = 0xa5;    // between the end of the data and the guard

struct Allocation {
  Kind kind;
  std::size_t bytes;
  char* mapping;  // guard, pages, guard; the data ends at the second guard
  std::size_t mapping_bytes;
  bool touched = false;  // device memory that can be touched now
};

struct Memories {
  std::map<std::uintptr_t, Allocation> allocations;  // by address of the data
  std::size_t device_bytes = std::size_t{1} << 30, used = 0;
  int open = 0;
};
Memories& memories() {
  static Memories* const all = new Memories;  // lives until the last destructor has run
  return *all;
}

std::uintptr_t address(const void* at) { return reinterpret_cast<std::uintptr_t>(at); }
std::size_t round_up(std::size_t n, std::size_t to) { return (n + to - 1) / to * to; }
const char* name_of(Kind kind) { return kind == Kind::kDevice ? "device" : "pinned"; }

void protect(const Allocation& a, int protection) {
  mprotect(a.mapping + kGuard, a.mapping_bytes - 2 * kGuard, protection);
}

// Device memory can be touched by nobody until somebody may who does: opening all of it for every
// kernel would take longer than most kernels do.
bool open_touched(Allocation& a, std::uintptr_t at) {
  const std::uintptr_t first = address(a.mapping) + kGuard;
  const std::size_t bytes = a.mapping_bytes - 2 * kGuard;
  if (a.kind != Kind::kDevice || a.touched || memories().open == 0) return false;
  if (at < first || at >= first + bytes) return false;
  a.touched = true;
  protect(a, PROT_READ | PROT_WRITE);
  return true;
}

void close_touched() {
  for (auto& [at, a] : memories().allocations)
    if (std::exchange(a.touched, false)) protect(a, PROT_NONE);
}

void explain_fault(int, siginfo_t* info, void*) {
  const std::uintptr_t at = address(info->si_addr);
  for (auto& [data, a] : memories().allocations) {
    const std::uintptr_t first = address(a.mapping);
    if (at < first || at >= first + a.mapping_bytes) continue;
    if (open_touched(a, at)) return;
    const long offset = static_cast<long>(at - data);
    if (running() == nullptr && a.kind == Kind::kDevice && offset >= 0 && at < data + a.bytes)
      fatal("host code touched device memory: byte %ld of a buffer of %zu", offset, a.bytes);
    fatal("out of bounds: byte %ld of a buffer of %zu in %s memory", offset, a.bytes,
          name_of(a.kind));
  }
  fatal("segmentation fault at %p", info->si_addr);
}

void report_leaks() {
  if (memories().allocations.empty()) return;
  for (const auto& [at, a] : memories().allocations)
    std::fprintf(stderr, "simt: never freed: %zu bytes of %s memory\n", a.bytes, name_of(a.kind));
  _exit(1);
}

void handle_faults() {
  static char stack[64 << 10];
  const stack_t alternative = {.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof stack};
  sigaltstack(&alternative, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = explain_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
}

void prepare_once() {
  static bool done = false;
  if (std::exchange(done, true)) return;
  handle_faults();
  std::atexit(report_leaks);
}

}  // namespace

void set_memory(std::size_t bytes) { memories().device_bytes = bytes; }
std::size_t total_device_bytes() { return memories().device_bytes; }
std::size_t free_device_bytes() {
  return memories().device_bytes - std::min(memories().used, memories().device_bytes);
}

void* allocate(Kind kind, std::size_t bytes) {
  prepare_once();
  if (kind == Kind::kDevice && bytes > free_device_bytes()) return nullptr;
  const std::size_t taken = round_up(bytes, kAlignment);
  Allocation a = {kind, bytes, nullptr, round_up(taken, kPage) + 2 * kGuard};
  void* mapping =
      mmap(nullptr, a.mapping_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) return nullptr;
  a.mapping = static_cast<char*>(mapping);
  char* data = a.mapping + a.mapping_bytes - kGuard - taken;
  protect(a, PROT_READ | PROT_WRITE);
  std::memset(data, 0xff, bytes);
  std::memset(data + bytes, kTail, taken - bytes);
  poison(data + bytes, taken - bytes);
  if (kind == Kind::kDevice) memories().used += bytes;
  if (kind == Kind::kDevice) protect(a, PROT_NONE);
  memories().allocations[address(data)] = a;
  return data;
}

void deallocate(void* data) {
  const auto found = memories().allocations.find(address(data));
  if (found == memories().allocations.end()) fatal("freed %p, which was not allocated", data);
  const Allocation a = found->second;
  memories().allocations.erase(found);
  protect(a, PROT_READ | PROT_WRITE);
  char* end = static_cast<char*>(data) + round_up(a.bytes, kAlignment);
  char* tail = static_cast<char*>(data) + a.bytes;
  unpoison(tail, static_cast<std::size_t>(end - tail));
  for (; tail < end; ++tail)
    if (static_cast<unsigned char>(*tail) != kTail)
      fatal("a buffer of %zu bytes in %s memory was written behind its end", a.bytes,
            name_of(a.kind));
  if (a.kind == Kind::kDevice) memories().used -= a.bytes;
  munmap(a.mapping, a.mapping_bytes);
}

Kind kind_of(const void* at, std::size_t bytes) {
  const auto& all = memories().allocations;
  auto next = all.upper_bound(address(at));
  if (next == all.begin()) return Kind::kPageable;
  const auto& [data, a] = *--next;
  return address(at) + bytes <= data + a.bytes ? a.kind : Kind::kPageable;
}

// doctest handles faults itself, from each case's beginning on.
DeviceAccess::DeviceAccess() {
  if (memories().open++ == 0) handle_faults();
}
DeviceAccess::~DeviceAccess() {
  if (--memories().open == 0) close_touched();
}

void fatal(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "simt: %s", describe_running());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  _exit(134);
}

}  // namespace simt
