/* What kernels/binding.cpp, plan.cu and payload.cu call, without a GPU: a launch checks its call as the library does, and counts. */
#include "api.h"
#include "plan.h"

#include <string>

namespace {
std::string message;
long long launches = 0;
int state = 1; /* of every group */
arf_call last = {};
}  // namespace

namespace arf {
#define ARF_NO_KERNELS(D)                                               \
  const void* kernels_##D##_local(int, int) { return nullptr; }         \
  const void* kernels_##D##_two(int, int) { return nullptr; }           \
  const void* kernels_##D##_four(int, int) { return nullptr; }          \
  const void* kernels_##D##_eight(int, int) { return nullptr; }         \
  const void* kernels_##D##_any(int, int) { return nullptr; }           \
  const void* kernels_##D##_simulated(int, int) { return nullptr; }     \
  const void* kernels_##D##_sharded(int, int) { return nullptr; }
ARF_NO_KERNELS(bf16)
ARF_NO_KERNELS(fp16)
ARF_NO_KERNELS(fp32)
}  // namespace arf

extern "C" {
int cudaGetDevice(int* device) { return *device = 0; }
int cudaSetDevice(int) { return 0; }
int arf_group_state(const char*, int) { return state; }
int arf_prepare_group(const char* group, int, long long, long long, int, void*) {
  message = std::string("no process group is called '") + group + "'";
  return state == 0 ? ARF_INVALID : ARF_OK;
}
const char* arf_last_error(void) { return message.c_str(); }
void arf_set_cast_saturates(int) {}
int arf_launch(const char* group, int, const arf_call* call, void*) {
  message = arf::check_call(*call);
  arf::Plan plan;
  if (message.empty() && *group) message = arf::make_plan(2, 1 << 20, *call, false, 9, &plan);
  last = *call;
  if (!message.empty()) return ARF_INVALID;
  ++launches;
  return ARF_OK;
}
ARF_API long long stub_launches(void) { return launches; }
ARF_API const arf_call* stub_call(void) { return &last; }
ARF_API void stub_set_state(int to) { state = to; }
}
