/* The one file that knows torch: CUDA implementations of the ops in arfusion_pass/ops/schema.py, on the stable ABI.
 *
 * Python defines the schemas; this file registers boxed kernels, which may happen before the definition. Boxed by hand:
 * the arguments arrive as 64-bit words in the schema's order, are read once into plain structs (no std::string, no heap),
 * and the same words go on to another op where Python has to take over (`redispatch`). std::invalid_argument becomes
 * ValueError, std::runtime_error RuntimeError. */
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/version.h>

#include <dlfcn.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "api.h"
#include "spec.h"

/* The CUDA runtime's C functions, linked statically; declared here so that g++ needs no CUDA headers. */
extern "C" int cudaGetDevice(int*);
extern "C" int cudaSetDevice(int);

namespace {

using arf::Format;
using arf::Layout;
using arf::Quant;

[[noreturn]] void invalid(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("arfusion::") + op + ": " + what);
}

void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("arfusion: torch's ") + what + " failed");
}

struct Dtypes {
  int32_t bf16 = aoti_torch_dtype_bfloat16(), fp16 = aoti_torch_dtype_float16(), fp32 = aoti_torch_dtype_float32();
  int32_t fp8 = aoti_torch_dtype_float8_e4m3fn(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
  int32_t int32 = aoti_torch_dtype_int32();
};
const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

/* A tensor argument, read once; owns the handle that the dispatcher gave. */
struct Tensor {
  const char* name = "";
  AtenTensorHandle handle = nullptr;
  void* data = nullptr;
  int32_t dtype = -1, device = -1, device_type = -1;
  int64_t dim = 0, numel = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  Tensor() = default;
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle) aoti_torch_delete_tensor_object(handle);
  }
  explicit operator bool() const { return handle != nullptr; }

  void read() {
    int64_t *s = nullptr, *t = nullptr;
    check(aoti_torch_get_data_ptr(handle, &data), "get_data_ptr");
    check(aoti_torch_get_dtype(handle, &dtype), "get_dtype");
    check(aoti_torch_get_device_index(handle, &device), "get_device_index");
    check(aoti_torch_get_device_type(handle, &device_type), "get_device_type");
    check(aoti_torch_get_dim(handle, &dim), "get_dim");
    check(aoti_torch_get_sizes(handle, &s), "get_sizes");
    check(aoti_torch_get_strides(handle, &t), "get_strides");
    sizes = s;
    strides = t;
    numel = 1;
    for (int64_t i = 0; i < dim; ++i) numel *= sizes[i];
  }

  int64_t size_from_end(int64_t i) const { return dim > i ? sizes[dim - 1 - i] : 1; }

  bool contiguous(int64_t from = 0) const {
    int64_t expected = 1;
    for (int64_t i = dim - 1; i >= from; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  /* Rows of [tokens, hidden] at one distance, in elements; 0 where there is none. */
  int64_t row_stride() const {
    if (numel == 0 || contiguous()) return size_from_end(0);
    if (dim < 2 || strides[dim - 1] != 1) return 0;
    int64_t stride = 0, expected = 0;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (stride == 0) {
        stride = strides[i];
      } else if (strides[i] != expected) {
        return 0;
      }
      expected = strides[i] * sizes[i];
    }
    return stride ? stride : size_from_end(0);
  }

  std::string shape() const {
    std::string text = "[";
    for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
    return text + "]";
  }
};

/* A `str` argument; owns the handle (torch's own boxing leaks it in 2.11 and 2.13). */
struct String {
  StringHandle handle = nullptr;
  const char* text = "";

  String() = default;
  String(const String&) = delete;
  String& operator=(const String&) = delete;
  ~String() {
    if (handle) torch_delete_string(handle);
  }
};

template <typename T>
T word_to(StableIValue word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

/* The part of the arguments that all ops share, at stack[0] on: EPILOGUE_INPUTS and OUTPUTS in schema.py. */
/* residual weight scale group_name epsilon weight_bias flags quant quant_bound scale_value, then the five outputs */
enum { kResidual, kWeight, kScale, kGroup, kEpsilon, kBias, kFlags, kQuant, kQuantBound, kScaleValue, kAllreduceOut,
       kResidualOut, kNormOut, kQuantOut, kScaleOut };

struct Call {
  const char* op;
  Tensor x, residual, weight, scale, allreduce_out, residual_out, norm_out, quant_out, scale_out;
  Tensor expert_scale, index, shared; /* MoE */
  String group;
  arf_call raw = {};

  [[noreturn]] void fail(const std::string& what) const { invalid(op, what); }
};

void take_tensor(Tensor& t, const char* name, StableIValue& word) {
  t.name = name;
  t.handle = word_to<AtenTensorHandle>(word);
  word = 0;
  t.read();
}

/* An optional is a pointer to a word, or null; both ours to free. */
void take_optional(Tensor& t, const char* name, StableIValue& word) {
  auto* inner = word_to<StableIValue*>(word);
  word = 0;
  if (!inner) return;
  const StableIValue value = *inner;
  delete inner;
  t.name = name;
  t.handle = word_to<AtenTensorHandle>(value);
  t.read();
}

void take_epilogue(Call& c, StableIValue* stack) {
  c.group.handle = word_to<StringHandle>(stack[kGroup]);
  stack[kGroup] = 0;
  check(torch_string_c_str(c.group.handle, &c.group.text), "string_c_str");
  take_optional(c.residual, "residual", stack[kResidual]);
  take_optional(c.weight, "weight", stack[kWeight]);
  take_optional(c.scale, "scale", stack[kScale]);
  take_optional(c.allreduce_out, "allreduce_out", stack[kAllreduceOut]);
  take_optional(c.residual_out, "residual_out", stack[kResidualOut]);
  take_optional(c.norm_out, "norm_out", stack[kNormOut]);
  take_optional(c.quant_out, "quant_out", stack[kQuantOut]);
  take_optional(c.scale_out, "scale_out", stack[kScaleOut]);
  c.raw.epsilon = static_cast<float>(word_to<double>(stack[kEpsilon]));
  c.raw.weight_bias = static_cast<float>(word_to<double>(stack[kBias]));
  c.raw.flags = static_cast<int32_t>(word_to<int64_t>(stack[kFlags]));
  c.raw.quant = word_to<int64_t>(stack[kQuant]);
  c.raw.quant_bound = static_cast<float>(word_to<double>(stack[kQuantBound]));
  c.raw.scale_value = static_cast<float>(word_to<double>(stack[kScaleValue]));
}

int arf_dtype_of(const Call& c, const Tensor& t) {
  const Dtypes& d = dtypes();
  if (t.dtype == d.bf16) return ARF_BF16;
  if (t.dtype == d.fp16) return ARF_FP16;
  if (t.dtype == d.fp32) return ARF_FP32;
  c.fail(std::string(t.name) + " must be bfloat16, float16 or float32");
}

/* T or fp32; whether it is fp32. */
bool is_fp32(const Call& c, const Tensor& t, bool fp32_allowed = true) {
  const Dtypes& d = dtypes();
  if (t.dtype == c.x.dtype) return t.dtype == d.fp32;
  if (!fp32_allowed || t.dtype != d.fp32) {
    c.fail(std::string(t.name) + " must have " + c.x.name + "'s dtype" + (fp32_allowed ? " or float32" : ""));
  }
  return true;
}

void need_device(const Call& c, const Tensor& t) {
  if (t && (t.device_type != c.x.device_type || t.device != c.x.device)) {
    c.fail(std::string(t.name) + " must be on the device of " + c.x.name + ", cuda:" + std::to_string(c.x.device));
  }
}

void need_contiguous(const Call& c, const Tensor& t) {
  if (t && !t.contiguous()) c.fail(std::string(t.name) + " must be contiguous, got shape " + t.shape());
}

/* [..., width] with the call's tokens. */
void need_rows(const Call& c, const Tensor& t, int64_t width) {
  if (t.dim < 1 || t.size_from_end(0) != width || t.numel != c.raw.tokens * width) {
    c.fail(std::string(t.name) + " must be [..., " + std::to_string(width) + "] with " + std::to_string(c.raw.tokens) +
           " tokens, got " + t.shape());
  }
}

void read_scale_out(Call& c) {
  const Tensor& s = c.scale_out;
  const Quant q{static_cast<uint32_t>(c.raw.quant)};
  const int64_t group = (c.raw.quant >> 32) - 1;
  const int64_t groups = group > 0 ? c.raw.hidden / group : 1, tokens = c.raw.tokens;
  const Dtypes& d = dtypes();
  const bool bytes = q.format() == Format::kNvfp4 || q.format() == Format::kMxfp8;
  int64_t item = 0;
  if (bytes) {
    item = s.dtype == d.uint8 || (s.dtype == d.fp8 && q.format() == Format::kNvfp4) || aoti_torch_dtype_element_size(s.dtype) == 1;
    if (s.dtype == d.int8 || (s.dtype == d.fp8 && q.format() == Format::kMxfp8)) item = 0;
  } else {
    item = s.dtype == (q.layout() == Layout::kPackedUe8m0 ? d.int32 : d.fp32);
  }
  if (!item) c.fail("scale_out has the wrong dtype for this quantiser");
  switch (q.layout()) {
    case Layout::kColumn:
    case Layout::kColumnTma:
    case Layout::kPackedUe8m0: {
      const int64_t columns = q.layout() == Layout::kPackedUe8m0 ? (groups + 3) / 4 : groups;
      const int64_t ld = q.layout() == Layout::kColumn ? tokens : (tokens + 3) / 4 * 4;
      const bool transposed = s.dim == 2 && s.sizes[0] == columns && s.sizes[1] == ld && s.contiguous();
      const bool logical = s.dim == 2 && s.sizes[0] == tokens && s.sizes[1] == columns &&
                           (tokens <= 1 || s.strides[0] == 1) && (columns <= 1 || s.strides[1] == ld);
      if (!transposed && !logical && tokens > 0) {
        c.fail("scale_out must be [" + std::to_string(tokens) + ", " + std::to_string(columns) + "] with strides (1, " +
               std::to_string(ld) + "), or contiguous [" + std::to_string(columns) + ", " + std::to_string(ld) + "], got " +
               s.shape());
      }
      c.raw.scale_pad_last = transposed;
      break;
    }
    case Layout::kSwizzled128x4:
    case Layout::kSwizzled8x4: {
      const int64_t rows = q.layout() == Layout::kSwizzled128x4 ? 128 : 8;
      const int64_t elements = (tokens + rows - 1) / rows * rows * ((groups + 3) / 4 * 4);
      need_contiguous(c, s);
      if (s.numel != elements) c.fail("scale_out must have " + std::to_string(elements) + " elements, got " + s.shape());
      break;
    }
    default:
      need_contiguous(c, s);
      if (s.numel != tokens * groups) {
        c.fail("scale_out must be [..., " + std::to_string(groups) + "] with " + std::to_string(tokens) + " tokens, got " + s.shape());
      }
  }
  c.raw.scale_out = s.data;
}

void read_epilogue(Call& c) {
  arf_call& raw = c.raw;
  const Dtypes& d = dtypes();
  for (const Tensor* t : {&c.residual, &c.weight, &c.scale, &c.allreduce_out, &c.residual_out, &c.norm_out, &c.quant_out,
                          &c.scale_out}) {
    need_device(c, *t);
  }
  if (c.residual) {
    need_rows(c, c.residual, raw.hidden);
    raw.residual_fp32 = is_fp32(c, c.residual);
    raw.residual_stride = c.residual.row_stride();
    if (!raw.residual_stride) c.fail("residual must be contiguous, or rows at one distance, got shape " + c.residual.shape());
    raw.residual = c.residual.data;
  }
  if (c.weight) {
    if (c.weight.dim != 1 || c.weight.numel != raw.hidden) {
      c.fail("weight must be [" + std::to_string(raw.hidden) + "], got " + c.weight.shape());
    }
    need_contiguous(c, c.weight);
    raw.weight_fp32 = is_fp32(c, c.weight);
    raw.weight = c.weight.data;
  }
  if (c.scale) {
    if (c.scale.numel != 1) c.fail("scale must have one element, got " + c.scale.shape());
    raw.scale_dtype = arf_dtype_of(c, c.scale);
    raw.scale = c.scale.data;
  }
  struct Output {
    const Tensor& t;
    void*& to;
    int32_t* fp32;
  };
  for (const Output& o : {Output{c.allreduce_out, raw.allreduce_out, nullptr}, Output{c.residual_out, raw.residual_out, &raw.residual_out_fp32},
                          Output{c.norm_out, raw.norm_out, &raw.norm_out_fp32}}) {
    if (!o.t) continue;
    need_rows(c, o.t, raw.hidden);
    need_contiguous(c, o.t);
    const bool fp32 = is_fp32(c, o.t, o.fp32 != nullptr);
    if (o.fp32) *o.fp32 = fp32;
    o.to = o.t.data;
  }
  if (c.quant_out) {
    const Format format = Quant{static_cast<uint32_t>(raw.quant)}.format();
    const int32_t dtype = c.quant_out.dtype;
    const bool fits = format == Format::kInt8    ? dtype == d.int8
                      : format == Format::kNvfp4 ? dtype != d.int8 && dtype != d.fp8 && aoti_torch_dtype_element_size(dtype) == 1
                                                 : dtype == d.fp8;
    if (!fits) c.fail("quant_out has the wrong dtype for this quantiser");
    need_rows(c, c.quant_out, format == Format::kNvfp4 ? raw.hidden / 2 : raw.hidden);
    need_contiguous(c, c.quant_out);
    raw.quant_out = c.quant_out.data;
  }
  if (c.scale_out) {
    if (!raw.quant) c.fail("scale_out needs a quantiser, got quant=0");
    read_scale_out(c);
  }
}

/* The other side of the op: Python's version of it, with the words as they came. */
void redispatch(const char* prefix, const char* op, StableIValue* stack) {
  const std::string name = std::string("arfusion::") + prefix + op;
  if (torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION) != 0) {
    throw std::runtime_error("arfusion: " + name + " failed, or is not defined (import arfusion_pass defines it)");
  }
}

using StreamFn = AOTITorchError (*)(int32_t, void**);

/* Found at run time, so that the library links against no CUDA library of torch's. */
void* current_stream(int device) {
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

void read_x(Call& c) {
  if (c.x.dim < 1) c.fail(std::string(c.x.name) + " must be [..., hidden], got a scalar");
  c.raw.dtype = arf_dtype_of(c, c.x);
  c.raw.hidden = c.x.size_from_end(0);
  c.raw.x = c.x.data;
  if (c.raw.hidden < 1) c.fail(std::string(c.x.name) + " must have a hidden size, got " + c.x.shape());
}

struct AllReduce {
  static constexpr const char* kOp = "allreduce_rms_norm";
  static constexpr int kArguments = 1;
  static constexpr int kTokensArgument = 0, kTokensDim = -1; /* all dimensions of x but the last */
  static void take(Call& c, StableIValue* stack) { take_tensor(c.x, "x", stack[0]); }
  static void read(Call& c) {
    read_x(c);
    c.raw.op = ARF_OP_ALLREDUCE;
    c.raw.tokens = c.x.numel / c.raw.hidden;
    c.raw.x_stride = c.x.row_stride();
    if (!c.raw.x_stride) c.fail("x must be contiguous, or rows at one distance, got shape " + c.x.shape());
  }
};

struct MoeReduce {
  static constexpr const char* kOp = "moe_reduce_allreduce_rms_norm";
  static constexpr int kArguments = 3;
  static constexpr int kTokensArgument = 0, kTokensDim = 1;
  static void take(Call& c, StableIValue* stack) {
    take_tensor(c.x, "expert_x", stack[0]);
    take_tensor(c.expert_scale, "expert_scale", stack[1]);
    take_optional(c.shared, "token_input", stack[2]);
  }
  static void read(Call& c) {
    read_x(c);
    c.raw.op = ARF_OP_MOE_REDUCE;
    if (c.x.dim != 3) c.fail("expert_x must be [experts, tokens, hidden], got " + c.x.shape());
    c.raw.experts = static_cast<int32_t>(c.x.sizes[0]);
    c.raw.tokens = c.x.sizes[1];
    need_contiguous(c, c.x);
    need_device(c, c.expert_scale);
    need_contiguous(c, c.expert_scale);
    if (c.expert_scale.dtype != dtypes().fp32 || c.expert_scale.dim != 2 || c.expert_scale.sizes[0] != c.raw.experts ||
        c.expert_scale.sizes[1] != c.raw.tokens) {
      c.fail("expert_scale must be float32 [experts, tokens] = [" + std::to_string(c.raw.experts) + ", " +
             std::to_string(c.raw.tokens) + "], got " + c.expert_scale.shape());
    }
    c.raw.expert_scale = c.expert_scale.data;
    c.raw.expert_scale_fp32 = 1;
  }
};

struct MoeFinalize {
  static constexpr const char* kOp = "moe_finalize_allreduce_rms_norm";
  static constexpr int kArguments = 5;
  static constexpr int kTokensArgument = 1, kTokensDim = 0;
  static void take(Call& c, StableIValue* stack) {
    take_tensor(c.x, "permuted_x", stack[0]);
    take_tensor(c.index, "index", stack[1]);
    take_optional(c.expert_scale, "expert_scale", stack[2]);
    take_optional(c.shared, "shared", stack[3]);
    c.raw.routed_scaling_factor = static_cast<float>(word_to<double>(stack[4]));
  }
  static void read(Call& c) {
    read_x(c);
    c.raw.op = ARF_OP_MOE_FINALIZE;
    if (c.x.dim != 2) c.fail("permuted_x must be [rows, hidden], got " + c.x.shape());
    if (c.index.dim != 2 || c.index.dtype != dtypes().int32) c.fail("index must be int32 [tokens, top_k], got " + c.index.shape());
    c.raw.permuted_rows = c.x.sizes[0];
    c.raw.tokens = c.index.sizes[0];
    c.raw.experts = static_cast<int32_t>(c.index.sizes[1]);
    c.raw.index = static_cast<const int32_t*>(c.index.data);
    for (const Tensor* t : {&c.x, &c.index, &c.expert_scale}) {
      need_device(c, *t);
      need_contiguous(c, *t);
    }
    if (c.expert_scale) {
      if (c.expert_scale.dim != 2 || c.expert_scale.sizes[0] != c.raw.tokens || c.expert_scale.sizes[1] != c.raw.experts) {
        c.fail("expert_scale must be [tokens, top_k] as index, got " + c.expert_scale.shape());
      }
      c.raw.expert_scale_fp32 = is_fp32(c, c.expert_scale);
      c.raw.expert_scale = c.expert_scale.data;
    }
  }
};

/* What a workspace is prepared for, read from a tensor that stays the stack's. */
void first_use(const char* group, StableIValue* stack, int tokens_at, int tokens_dim, int device) {
  Tensor x, rows;
  x.handle = word_to<AtenTensorHandle>(stack[0]);
  rows.handle = word_to<AtenTensorHandle>(stack[tokens_at]);
  long long tokens = 0, hidden = 0;
  int dtype = ARF_BF16;
  x.read();
  rows.read();
  hidden = x.size_from_end(0);
  tokens = tokens_dim >= 0 ? (rows.dim > tokens_dim ? rows.sizes[tokens_dim] : 0) : hidden ? x.numel / hidden : 0;
  dtype = x.dtype == dtypes().fp32 ? ARF_FP32 : x.dtype == dtypes().fp16 ? ARF_FP16 : ARF_BF16;
  x.handle = rows.handle = nullptr; /* borrowed */
  const DeviceGuard guard(device);
  arf_prepare_group(group, device, tokens, hidden, dtype, current_stream(device)); /* the launch reports a failure */
}

template <typename Op>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  StableIValue* epilogue = stack + Op::kArguments;
  const auto flags = static_cast<uint32_t>(word_to<int64_t>(epilogue[kFlags]));
  if (flags & (arf::kReference | arf::kFlashinfer | arf::kRecord)) return redispatch("_python_", Op::kOp, stack);
  /* Another op needs the words untouched, so the group's state comes before they are taken. */
  const char* group = "";
  check(torch_string_c_str(word_to<StringHandle>(epilogue[kGroup]), &group), "string_c_str");
  if (*group) {
    int32_t device = 0;
    check(aoti_torch_get_device_index(word_to<AtenTensorHandle>(stack[0]), &device), "get_device_index");
    int state = arf_group_state(group, device);
    if (state == 0) {
      first_use(group, stack, Op::kTokensArgument, Op::kTokensDim, device);
      state = arf_group_state(group, device);
    }
    if (state == 2) return redispatch("_fallback_", Op::kOp, stack);
  }
  Call c;
  c.op = Op::kOp;
  Op::take(c, stack);
  take_epilogue(c, epilogue);
  Op::read(c);
  if (c.shared) {
    need_device(c, c.shared);
    need_rows(c, c.shared, c.raw.hidden);
    need_contiguous(c, c.shared);
    is_fp32(c, c.shared, false);
    c.raw.shared = c.shared.data;
  }
  read_epilogue(c);
  const DeviceGuard guard(c.x.device);
  const int status = arf_launch(c.group.text, c.x.device, &c.raw, current_stream(c.x.device));
  if (status == ARF_OK) return;
  const std::string text = arf_last_error();
  if (status == ARF_INVALID) c.fail(text);
  throw std::runtime_error(std::string("arfusion::") + c.op + ": " + text);
}

struct Registration {
  TorchLibraryHandle library = nullptr;

  Registration() {
    check(aoti_torch_library_init_impl("arfusion", "CUDA", __FILE__, __LINE__, &library), "library_init_impl");
    add<AllReduce>();
    add<MoeReduce>();
    add<MoeFinalize>();
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
