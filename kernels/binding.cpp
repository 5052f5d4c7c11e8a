/* The one file that knows torch: CUDA implementations of the ops in arfusion_pass/ops/schema.py, on the stable ABI.
 *
 * Python defines the schemas; this file registers boxed kernels, which may happen before the definition. Boxed by hand:
 * the arguments arrive as 64-bit words in the schema's order, are read once into plain structs (no std::string, no heap),
 * and the same words go on to another op where Python has to take over (`redispatch`). std::invalid_argument becomes
 * ValueError, std::runtime_error RuntimeError.
 *
 * Every call's shapes, dtypes, strides and addresses are checked here, before the group is asked for anything. What is
 * a number in the graph (flags, quantiser, which tensors there are) Python checks (ops/checks.py), at the first call of
 * each kind; and where something is wrong, Python's sentence is the one that is raised, so that every back-end refuses
 * in the same words. */
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>

#include <dlfcn.h>

#include <unordered_set>

#include "binding.h"

#ifdef ARF_TEST_ON_CPU /* tests/runtime/test_binding.py: the same ops for CPU tensors, in front of a launch that only counts */
#define ARF_DISPATCH_KEY "CPU"
#else
#define ARF_DISPATCH_KEY "CUDA"
#endif

/* The CUDA runtime's C functions, linked statically; declared here so that g++ needs no CUDA headers. */
extern "C" int cudaGetDevice(int*);
extern "C" int cudaSetDevice(int);

namespace arf {
namespace {

thread_local std::string call_problem;
thread_local bool call_problem_is_value_error = false;

/* Another op, which Python defines, on the same words. What it raises is raised here, in its words and of its kind. */
void redispatch(const char* prefix, const char* op, StableIValue* stack) {
  const std::string name = std::string("arfusion::") + prefix + op;
  call_problem.clear();
  call_problem_is_value_error = false;
  if (torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION) == 0) return;
  if (call_problem.empty()) call_problem = "arfusion: " + name + " failed, or is not defined (import arfusion_pass defines it)";
  if (call_problem_is_value_error) throw std::invalid_argument(call_problem);
  throw std::runtime_error(call_problem);
}

/* Asks Python about a call, the words staying ours: raises what it says is wrong with it. */
void ask_python(const char* op, const Words& words) {
  StableIValue copies[kMaxArguments] = {};
  words.copy(copies);
  redispatch("_first_", op, copies);
}

using StreamFn = AOTITorchError (*)(int32_t, void**);

/* Found at run time, so that the library links against no CUDA library of torch's. */
void* current_stream(int device) {
#ifdef ARF_TEST_ON_CPU
  return nullptr;
#endif
  static const StreamFn get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    void* symbol = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    return reinterpret_cast<StreamFn>(symbol);
  }();
  if (!get) throw std::runtime_error("arfusion: this torch has no CUDA");
  void* stream = nullptr;
  check(get(device, &stream), "get_current_cuda_stream");
  return stream;
}

/* Makes the tensors' device current, where it is not. */
struct DeviceGuard {
  int previous = -1, device;
  explicit DeviceGuard(int wanted) : device(wanted) {
    cudaGetDevice(&previous);
    if (previous != device) cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (previous != device) cudaSetDevice(previous);
  }
};

/* `error`, in Python's words where Python finds the call wrong too. */
[[noreturn]] void refuse(const char* op, const Words& words, const std::invalid_argument& error) {
  try {
    ask_python(op, words);
  } catch (const std::invalid_argument&) {
    throw;
  } catch (const std::exception&) {
    throw error; /* Python is not there to be asked */
  }
  throw error; /* what only this library refuses, such as an address that is not aligned */
}

template <typename Op>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  Words words(Op::kKinds, stack);
  const auto flags = static_cast<uint32_t>(word_to<int64_t>(stack[Op::kArguments + kFlags]));
  if (flags & (kReference | kFlashinfer | kRecord)) {
    words.ours = false;
    return redispatch("_python_", Op::kOp, stack);
  }
  Call c;
  thread_local std::unordered_set<uint64_t> known;
  try {
    read_call<Op>(c, stack);
  } catch (const std::invalid_argument& error) {
    refuse(Op::kOp, words, error);
  }
  const uint64_t kind = kind_of(c, word_to<double>(stack[Op::kArguments + kQuantBound]));
  if (known.find(kind) == known.end()) {
    ask_python(Op::kOp, words);
    known.insert(kind);
  }
  if constexpr (Op::kBetween != 0) {
    if (!Scatter::fits(c)) {
      words.ours = false;
      return redispatch("_fallback_", Op::kOp, stack);
    }
    Scatter::make_blocks(c);
  }
  const int device = c.x.device;
  const DeviceGuard guard(device);
  void* const stream = current_stream(device);
  if (*c.group) {
    int state = arf_group_state(c.group, device);
    if (state == 0) {
      const int status = arf_prepare_group(c.group, device, c.raw.tokens, c.raw.hidden, c.raw.dtype, stream);
      if (status != ARF_OK && status != ARF_FALLBACK) raise(c, status);
      state = arf_group_state(c.group, device);
    }
    if (state == 2) {
      words.ours = false;
      return redispatch("_fallback_", Op::kOp, stack);
    }
  }
  const int status = arf_launch(c.group, device, &c.raw, stream);
  if (status == ARF_OK) return;
  if (status != ARF_INVALID) raise(c, status);
  refuse(Op::kOp, words, std::invalid_argument(std::string("arfusion::") + c.op + ": " + arf_last_error()));
}

struct Registration {
  TorchLibraryHandle library = nullptr;

  Registration() {
    check(aoti_torch_library_init_impl("arfusion", ARF_DISPATCH_KEY, __FILE__, __LINE__, &library), "library_init_impl");
    add<AllReduce>();
    add<MoeReduce>();
    add<MoeFinalize>();
    add<Scatter>();
    constexpr uint64_t kTorch213 = (2ull << 56) | (13ull << 48);
    arf_set_cast_saturates(aoti_torch_abi_version() >= kTorch213);
  }

  template <typename Op>
  void add() {
    check(torch_library_impl(library, Op::kOp, &boxed<Op>, TORCH_ABI_VERSION), "library_impl");
  }
};

/* Lives as long as the process: unregistering while torch itself is torn down is not safe. */
[[maybe_unused]] const Registration* const registration = new Registration;

}  // namespace
}  // namespace arf

extern "C" void arf_call_failed(const char* text, int is_value_error) {
  arf::call_problem = text && *text ? text : "the call failed";
  arf::call_problem_is_value_error = is_value_error != 0;
}
