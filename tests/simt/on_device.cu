// Stands in for the emulator where its tests run on a GPU (build/thaw-cuda-tests), and says which
// of them are left out there.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>
#include <unistd.h>

#include <cstdio>

#include "device/cuda.h"
#include "tests/sanitized.h"
#include "tests/simt/simt.h"

namespace simt {
namespace {

struct LeftOut {
  const char* cases;  // a pattern of doctest
  const char* needs;
};
constexpr LeftOut kLeftOut[] = {
    {"*any call that fails is one clear error", "calls that fail when they are told to"},
    {"cuda tiers: pinned memory that is refused*", "calls that fail when they are told to"},
    {"cuda forward: times are of work that is done", "a device with little memory"},
    {"cuda forward: prompts go in steps of 2?048*", "a device with little memory"},
    {"cuda tiers: a prompt whose staged rows are refused*", "a device with little memory"},
    {"cuda store: what does not fit is refused*", "a device with little memory"},
    {"cuda tiers: while memory is refused*", "a device with little memory"},
    {"cuda gemm: one of which a call failed*", "calls that fail when they are told to"},
    {"cuda tiers: bytes that are reported*", "a device that takes no more than it is asked for"},
    {"cuda ops: one row is one kernel an op*", "launches and bytes that are counted"},
    {"cuda tiered attention: ghosts and rows are read once*", "bytes that are counted"},
    {"cuda tiered attention: groups that are hot*", "bytes that are counted"},
    {"cuda tiered attention: of groups of faint*", "bytes that are counted"},
    {"kernel.cuh: asynchronous copies land when*", "copies that land no sooner than they must"},
};

[[noreturn]] void only_emulated(const char* what) {
  std::fprintf(
      stderr,
      "thaw-cuda-tests: %s is of the emulator: the test case that asks for it belongs into "
      "tests/simt/on_device.cu\n",
      what);
  _exit(1);
}

}  // namespace

bool emulated() { return false; }
void set_seed(std::uint64_t) {}  // a device takes the order that it takes
void set_memory(std::size_t) { only_emulated("set_memory()"); }
void set_plain_memory(bool) { only_emulated("set_plain_memory()"); }
int fail_call(int) { only_emulated("fail_call()"); }
std::map<std::string, Count>& counts() { only_emulated("counts()"); }

}  // namespace simt

bool thaw::testing::sanitized(std::string_view) { return false; }

int main(int argc, char** argv) {
  try {
    std::fprintf(stderr, "device: %s\n", thaw::device_facts().name.c_str());
  } catch (const thaw::Error& error) {
    std::fprintf(stderr, "thaw-cuda-tests: %s\n", error.what());
    return 1;
  }
  doctest::Context context;
  for (const simt::LeftOut& left : simt::kLeftOut) {
    std::fprintf(stderr, "left out: %s: needs %s\n", left.cases, left.needs);
    context.addFilter("test-case-exclude", left.cases);
  }
  context.applyCommandLine(argc, argv);
  return context.run();
}
