// Linked instead of the CUDA sources where there is no nvcc.
#include "device/error.h"
#include "model/backend.h"

namespace thaw {
namespace {

[[noreturn]] void refuse(const char* backend) {
  fail("--backend ", backend, ": this build has no CUDA backend; it has: cpu");
}

}  // namespace

bool has_cuda() { return false; }
std::string cuda_device_name() { refuse("cuda"); }
std::unique_ptr<Backend> make_cuda_backend(const Model&, int) { refuse("cuda"); }
std::unique_ptr<Backend> make_checked_backend(const Model&, int) { refuse("checked"); }

}  // namespace thaw
