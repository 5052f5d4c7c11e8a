/* A call of a fused op, read from the dispatcher's words into plain structs and checked: everything that may vary from
 * call to call. Part of binding.cpp. ops/checks.py checks the same, and has the sentences that users read. */
#pragma once
#include <cfloat>
#include <cmath>

#include "api.h"
#include "spec.h"
#include "words.h"

namespace arf {
namespace {

[[noreturn]] void invalid(const char* op, const std::string& what) {
  throw std::invalid_argument(std::string("arfusion::") + op + ": " + what);
}

/* The part of the arguments that all ops share, at stack[0] on: EPILOGUE_INPUTS and OUTPUTS in schema.py. */
/* residual weight scale group_name epsilon weight_bias flags quant quant_bound scale_value; behind what an op has in
 * between, addend epsilon_tensor factor factor_value, then the five outputs */
enum { kResidual, kWeight, kScale, kGroup, kEpsilon, kBias, kFlags, kQuant, kQuantBound, kScaleValue, kAddend,
       kEpsilonTensor, kFactor, kFactorValue, kAllreduceOut, kResidualOut, kNormOut, kQuantOut, kScaleOut };
#define ARF_GIVEN_KINDS "tttsddiidd"
#define ARF_RARE_KINDS "tttdttttt"
#define ARF_EPILOGUE_KINDS ARF_GIVEN_KINDS ARF_RARE_KINDS
constexpr int kMaxArguments = 24;

struct Call {
  const char* op;
  Tensor x, residual, weight, scale, allreduce_out, residual_out, norm_out, quant_out, scale_out;
  Tensor addend, epsilon_tensor, factor;
  Tensor expert_scale, index, shared; /* MoE */
  const char* group = "";
  int64_t flags = 0;
  bool finite = true; /* all factors, in fp32 */
  arf_call raw = {};

  [[noreturn]] void fail(const std::string& what) const { invalid(op, what); }
  float number(StableIValue word) {
    const double value = word_to<double>(word);
    if (!(std::fabs(value) <= FLT_MAX)) finite = false; /* so for NaN too */
    return finite ? static_cast<float>(value) : 0.0f;
  }
};

/* What the library's last function says went wrong. */
[[noreturn]] void raise(const Call& c, int status) {
  const std::string text = arf_last_error();
  if (status == ARF_INVALID) c.fail(text);
  throw std::runtime_error(std::string("arfusion::") + c.op + ": " + text);
}

void read_tensor(Tensor& t, const char* name, StableIValue word) { t.read(name, word_to<AtenTensorHandle>(word)); }

/* An optional is a pointer to a word, or null. */
void read_optional(Tensor& t, const char* name, StableIValue word) {
  if (auto* inner = word_to<StableIValue*>(word)) read_tensor(t, name, *inner);
}

/* `between`: words of the op's own in front of the rare ones. */
void read_arguments(Call& c, const StableIValue* stack, int between) {
  const StableIValue* const rare = stack + between;
  check(torch_string_c_str(word_to<StringHandle>(stack[kGroup]), &c.group), "string_c_str");
  read_optional(c.residual, "residual", stack[kResidual]);
  read_optional(c.weight, "weight", stack[kWeight]);
  read_optional(c.scale, "scale", stack[kScale]);
  read_optional(c.addend, "addend", rare[kAddend]);
  read_optional(c.epsilon_tensor, "epsilon_tensor", rare[kEpsilonTensor]);
  read_optional(c.factor, "factor", rare[kFactor]);
  read_optional(c.allreduce_out, "allreduce_out", rare[kAllreduceOut]);
  read_optional(c.residual_out, "residual_out", rare[kResidualOut]);
  read_optional(c.norm_out, "norm_out", rare[kNormOut]);
  read_optional(c.quant_out, "quant_out", rare[kQuantOut]);
  read_optional(c.scale_out, "scale_out", rare[kScaleOut]);
  c.flags = word_to<int64_t>(stack[kFlags]);
  c.raw.epsilon = c.number(stack[kEpsilon]);
  c.raw.weight_bias = c.number(stack[kBias]);
  c.raw.flags = static_cast<int32_t>(c.flags);
  c.raw.quant = word_to<int64_t>(stack[kQuant]);
  c.raw.quant_bound = c.raw.quant ? c.number(stack[kQuantBound]) : 0.0f;
  c.raw.scale_value = c.number(stack[kScaleValue]);
  c.raw.factor_value = c.number(rare[kFactorValue]);
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

void need_row_stride(const Call& c, const Tensor& t, int64_t stride) {
  if (!stride) c.fail(std::string(t.name) + " must be contiguous, or have its rows at one distance, got shape " + t.shape());
}

/* [..., width] with so many rows. */
void need_rows(const Call& c, const Tensor& t, int64_t width, int64_t rows) {
  if (t.dim < 1 || t.size_from_end(0) != width || t.numel != rows * width) {
    c.fail(std::string(t.name) + " must be [..., " + std::to_string(width) + "] with " + std::to_string(rows) +
           " tokens, got " + t.shape());
  }
}

/* With the call's tokens. */
void need_rows(const Call& c, const Tensor& t, int64_t width) { need_rows(c, t, width, c.raw.tokens); }

/* Rows of what a rank may have of its own tokens alone: residual, addend, factor, allreduce_out, residual_out. */
int64_t own_rows(const Call& c) { return c.raw.own_rows ? c.raw.own_rows : c.raw.tokens; }

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
      if (s.numel != tokens * groups || (group != -1 && (s.dim < 1 || s.size_from_end(0) != groups))) {
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
    need_rows(c, c.residual, raw.hidden, own_rows(c));
    raw.residual_fp32 = is_fp32(c, c.residual);
    raw.residual_stride = c.residual.row_stride();
    need_row_stride(c, c.residual, raw.residual_stride);
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
  if (c.addend) {
    need_device(c, c.addend);
    raw.addend_rows = c.addend.dim != 1;
    need_rows(c, c.addend, raw.hidden, raw.addend_rows ? own_rows(c) : 1);
    need_contiguous(c, c.addend);
    is_fp32(c, c.addend, false);
    raw.addend = c.addend.data;
  }
  raw.factor_kind = c.factor ? ARF_FACTOR_ELEMENT : raw.factor_value != 1.0f ? ARF_FACTOR_VALUE : ARF_FACTOR_NONE;
  if (c.factor) {
    need_device(c, c.factor);
    if (c.factor.numel != 1) {
      need_rows(c, c.factor, 1, own_rows(c));
      raw.factor_kind = ARF_FACTOR_ROWS;
    }
    need_contiguous(c, c.factor);
    raw.factor_fp32 = is_fp32(c, c.factor);
    raw.factor = c.factor.data;
  }
  if (c.epsilon_tensor) {
    need_device(c, c.epsilon_tensor);
    if (c.epsilon_tensor.numel != 1) c.fail("epsilon_tensor must have one element, got " + c.epsilon_tensor.shape());
    raw.epsilon_dtype = c.epsilon_tensor.dtype == d.fp64 ? ARF_FP64 : arf_dtype_of(c, c.epsilon_tensor);
    raw.epsilon_tensor = c.epsilon_tensor.data;
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
    need_rows(c, o.t, raw.hidden, &o.t == &c.norm_out ? raw.tokens : own_rows(c));
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

/* Memory as rows of `width` bytes, `pitch` bytes apart; ops/memory.py has the same. */
struct Rows {
  uintptr_t start = 0;
  int64_t width = 0, pitch = 0, count = 0;

  /* [..., hidden] of a known row stride. */
  static Rows of(const Tensor& t, int64_t stride, int64_t item) {
    const int64_t hidden = t.size_from_end(0);
    return {reinterpret_cast<uintptr_t>(t.data), hidden * item, stride * item, hidden ? t.numel / hidden : 0};
  }
  /* From the first byte to the last, as one row. */
  static Rows span(const Tensor& t, int64_t item) {
    int64_t last = 0;
    for (int64_t i = 0; i < t.dim; ++i) last += (t.sizes[i] - 1) * t.strides[i];
    return {reinterpret_cast<uintptr_t>(t.data), t.numel ? (last + 1) * item : 0, 0, t.numel ? 1 : 0};
  }
  bool overlaps(uintptr_t first, uintptr_t end) const {
    if (count == 0 || first >= end || end <= start) return false;
    if (first >= start + (count - 1) * pitch + width) return false;
    if (first < start || count == 1) return true;
    const int64_t row = static_cast<int64_t>(first - start) / pitch;
    return static_cast<int64_t>(first - start) - row * pitch < width || end > start + (row + 1) * pitch;
  }
  bool coincides(const Rows& o) const {
    return start == o.start && width == o.width && pitch == o.pitch && count == o.count;
  }
};

/* The storage may have been freed, or made smaller, since the tensor was made. */
void need_memory(const Call& c, const Tensor& t, int64_t item) {
  if (!t || !t.numel) return;
  int64_t offset = 0, bytes = 0;
  check(aoti_torch_get_storage_offset(t.handle, &offset), "get_storage_offset");
  check(aoti_torch_get_storage_size(t.handle, &bytes), "get_storage_size");
  if (offset * item + Rows::span(t, item).width > bytes) {
    c.fail(std::string(t.name) + " reaches beyond its storage, which was freed or made smaller");
  }
}

/* Each output has memory of its own, or lies on an input whose rows are read before that row is written. */
void check_overlaps(const Call& c) {
  const auto item = [](const Tensor& t) { return static_cast<int64_t>(aoti_torch_dtype_element_size(t.dtype)); };
  const bool x_in_place = c.raw.op == ARF_OP_ALLREDUCE;
  const struct Input {
    const Tensor& t;
    bool in_place;
    int64_t stride;
  } inputs[] = {
      {c.x, x_in_place, c.raw.x_stride}, {c.residual, true, c.raw.residual_stride}, {c.shared, true, c.raw.hidden},
      {c.weight, false, 0}, {c.scale, false, 0}, {c.addend, false, 0}, {c.epsilon_tensor, false, 0},
      {c.factor, false, 0},
      {c.expert_scale, false, 0}, {c.index, false, 0},
  };
  const Tensor* outputs[] = {&c.allreduce_out, &c.residual_out, &c.norm_out, &c.quant_out, &c.scale_out};
  for (const Input& in : inputs) need_memory(c, in.t, in.t ? item(in.t) : 0);
  for (const Tensor* t : outputs) need_memory(c, *t, *t ? item(*t) : 0);
  Rows spans[5];
  for (int i = 0; i < 5; ++i) {
    if (!*outputs[i]) continue;
    spans[i] = Rows::span(*outputs[i], item(*outputs[i]));
    const uintptr_t first = spans[i].start, end = first + spans[i].width;
    for (int j = 0; j < i; ++j) {
      if (spans[j].overlaps(first, end)) {
        c.fail(std::string(outputs[j]->name) + " and " + outputs[i]->name + " share memory: every output needs its own");
      }
    }
    for (const Input& in : inputs) {
      if (!in.t) continue;
      const Rows rows = in.in_place ? Rows::of(in.t, in.stride, item(in.t)) : Rows::span(in.t, item(in.t));
      if (!rows.overlaps(first, end)) continue;
      if (in.in_place && i < 3 && rows.coincides(Rows::of(*outputs[i], c.raw.hidden, item(*outputs[i])))) continue;
      c.fail(std::string(outputs[i]->name) + " shares memory with " + in.t.name);
    }
  }
}

void read_x(Call& c) {
  if (c.x.dim < 1) c.fail(std::string(c.x.name) + " must be [..., hidden], got a scalar");
  c.raw.dtype = arf_dtype_of(c, c.x);
  c.raw.hidden = c.x.size_from_end(0);
  c.raw.x = c.x.data;
  if (c.raw.hidden < 1) c.fail(std::string(c.x.name) + " must have a hidden size, got " + c.x.shape());
}

struct AllReduce {
  static constexpr const char* kOp = "allreduce_rms_norm";
  static constexpr int kArguments = 1, kBetween = 0;
  static constexpr const char* kKinds = "T" ARF_EPILOGUE_KINDS;
  static void take(Call& c, const StableIValue* stack) { read_tensor(c.x, "x", stack[0]); }
  static void read(Call& c) {
    read_x(c);
    c.raw.op = ARF_OP_ALLREDUCE;
    c.raw.tokens = c.x.numel / c.raw.hidden;
    c.raw.x_stride = c.x.row_stride();
    need_row_stride(c, c.x, c.raw.x_stride);
  }
};

struct MoeReduce {
  static constexpr const char* kOp = "moe_reduce_allreduce_rms_norm";
  static constexpr int kArguments = 3, kBetween = 0;
  static constexpr const char* kKinds = "TTt" ARF_EPILOGUE_KINDS;
  static void take(Call& c, const StableIValue* stack) {
    read_tensor(c.x, "expert_x", stack[0]);
    read_tensor(c.expert_scale, "expert_scale", stack[1]);
    read_optional(c.shared, "token_input", stack[2]);
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
  static constexpr int kArguments = 5, kBetween = 0;
  static constexpr const char* kKinds = "TTttd" ARF_EPILOGUE_KINDS;
  static void take(Call& c, const StableIValue* stack) {
    read_tensor(c.x, "permuted_x", stack[0]);
    read_tensor(c.index, "index", stack[1]);
    read_optional(c.expert_scale, "expert_scale", stack[2]);
    read_optional(c.shared, "shared", stack[3]);
    c.raw.routed_scaling_factor = c.number(stack[4]);
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

/* Sequence parallelism: norm, codes and scales of all tokens, the rest of this rank's own. A launch of a sharded residual. */
struct Scatter {
  static constexpr const char* kOp = "reduce_scatter_rms_norm_all_gather";
  static constexpr int kArguments = 1, kBetween = 1;
  static constexpr const char* kKinds = "T" ARF_GIVEN_KINDS "i" ARF_RARE_KINDS;
  static void take(Call& c, const StableIValue* stack) {
    AllReduce::take(c, stack);
    c.raw.block = word_to<int64_t>(stack[kArguments + kAddend]); /* where the others have their addend */
  }
  static void read(Call& c) {
    AllReduce::read(c);
    if (c.raw.block < 0) c.fail("block must not be negative, got " + std::to_string(c.raw.block));
    for (const Tensor* t : {&c.residual, &c.residual_out, &c.allreduce_out, &c.addend}) {
      if (*t && (t != &c.addend || t->dim != 1) && !c.raw.own_rows) c.raw.own_rows = t->numel / c.raw.hidden;
    }
    if (c.factor && c.factor.numel != 1 && !c.raw.own_rows) c.raw.own_rows = c.factor.numel;
  }
  /* Whether the kernels have the call, by what all ranks know of it: one sum of a row is read. */
  static bool fits(const Call& c) {
    const bool summed = c.allreduce_out && (c.residual || c.addend || c.factor || c.raw.factor_value != 1.0f || c.residual_out);
    return *c.group && c.raw.tokens && !summed && (c.norm_out || c.quant_out);
  }
  static void make_blocks(Call& c) {
    constexpr uint32_t kKept = kRoundingFlags | kNoPdl | kTriggerEarly;
    constexpr uint32_t kBlocks = kSharded | kResidualInSharded | kResidualOutSharded | kOwnerBlocks;
    c.raw.flags = static_cast<int32_t>((static_cast<uint32_t>(c.flags) & kKept) | kBlocks);
    if (!c.raw.allreduce_out) return;
    c.raw.residual_out = c.raw.allreduce_out; /* without a residual the sum is the residual's */
    c.raw.residual_out_fp32 = c.raw.dtype == ARF_FP32;
    c.raw.allreduce_out = nullptr;
  }
};

/* Everything about a call that can be wrong, before anything is asked of the group or the device. */
template <typename Op>
void read_call(Call& c, const StableIValue* stack) {
  c.op = Op::kOp;
  Op::take(c, stack);
  read_arguments(c, stack + Op::kArguments, Op::kBetween);
  Op::read(c);
  if (c.shared) {
    need_device(c, c.shared);
    need_rows(c, c.shared, c.raw.hidden);
    need_contiguous(c, c.shared);
    is_fp32(c, c.shared, false);
    c.raw.shared = c.shared.data;
  }
  read_epilogue(c);
  if (!c.finite) c.fail("epsilon, weight_bias and every other factor must be finite in fp32");
  if (c.raw.epsilon < 0) c.fail("epsilon must not be negative");
  if (!c.weight && c.raw.weight_bias != 0.0f) c.fail("weight_bias needs a weight");
  if (c.raw.quant && !c.quant_out) c.fail("a quantiser needs quant_out");
  check_overlaps(c);
}

/* What does not change from call to call of one place in a program: all but shapes, strides, addresses and factors. */
uint64_t kind_of(const Call& c, double bound) {
  uint64_t hash = static_cast<uint64_t>(c.raw.op) + 1;
  const auto mix = [&hash](uint64_t word) {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 29;
  };
  mix(static_cast<uint64_t>(c.flags));
  mix(static_cast<uint64_t>(c.raw.quant));
  mix(to_word(bound));
  for (const Tensor* t : {&c.x, &c.residual, &c.weight, &c.scale, &c.addend, &c.epsilon_tensor, &c.factor, &c.expert_scale, &c.index,
                          &c.shared, &c.allreduce_out, &c.residual_out, &c.norm_out, &c.quant_out, &c.scale_out}) {
    mix(*t ? static_cast<uint64_t>(t->dtype) + 1 : 0);
  }
  for (const char* p = c.group; *p; ++p) mix(static_cast<unsigned char>(*p));
  return hash;
}

}  // namespace
}  // namespace arf
