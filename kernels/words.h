/* Arguments as torch's dispatcher gives them to a boxed kernel: 64-bit words on a stack, and the tensors behind them. */
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace arf {
namespace {

void check(AOTITorchError error, const char* what) {
  if (error != 0) throw std::runtime_error(std::string("arfusion: torch's ") + what + " failed");
}

struct Dtypes {
  int32_t bf16 = aoti_torch_dtype_bfloat16(), fp16 = aoti_torch_dtype_float16(), fp32 = aoti_torch_dtype_float32();
  int32_t fp64 = aoti_torch_dtype_float64();
  int32_t fp8 = aoti_torch_dtype_float8_e4m3fn(), int8 = aoti_torch_dtype_int8(), uint8 = aoti_torch_dtype_uint8();
  int32_t int32 = aoti_torch_dtype_int32();
};
const Dtypes& dtypes() {
  static const Dtypes all;
  return all;
}

/* A tensor argument, read once; the handle stays the stack's. */
struct Tensor {
  const char* name = "";
  AtenTensorHandle handle = nullptr;
  void* data = nullptr;
  int32_t dtype = -1, device = -1, device_type = -1;
  int64_t dim = 0, numel = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;

  explicit operator bool() const { return handle != nullptr; }

  void read(const char* called, AtenTensorHandle given) {
    name = called;
    handle = given;
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

  bool contiguous() const {
    int64_t expected = 1;
    if (numel == 0) return true;
    for (int64_t i = dim - 1; i >= 0; --i) {
      if (sizes[i] != 1 && strides[i] != expected) return false;
      expected *= sizes[i];
    }
    return true;
  }

  /* Rows of [tokens, hidden] at one distance of at least hidden, in elements; 0 where there is none: the rows of an
   * expanded tensor are one. */
  int64_t row_stride() const {
    if (contiguous()) return size_from_end(0);
    if (dim < 2 || strides[dim - 1] != 1) return 0;
    int64_t stride = 0, expected = 0;
    for (int64_t i = dim - 2; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (stride == 0) {
        stride = strides[i];
        if (stride < sizes[dim - 1]) return 0;
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

template <typename T>
T word_to(StableIValue word) {
  T value;
  std::memcpy(&value, &word, sizeof value);
  return value;
}

template <typename T>
StableIValue to_word(T value) {
  StableIValue word = 0;
  std::memcpy(&word, &value, sizeof value);
  return word;
}

/* A call's words on the dispatcher's stack, ours to free unless another op takes them. `kinds` has a letter a word, by
 * the schema: T tensor, t optional tensor (a pointer to a word, or null), s string (torch's own boxing leaks it in 2.11
 * and 2.13), anything else a number. */
struct Words {
  const char* kinds;
  StableIValue* stack;
  bool ours = true;

  Words(const char* k, StableIValue* s) : kinds(k), stack(s) {}
  Words(const Words&) = delete;
  Words& operator=(const Words&) = delete;
  ~Words() {
    for (int i = 0; ours && kinds[i]; ++i) {
      if (kinds[i] == 'T') aoti_torch_delete_tensor_object(word_to<AtenTensorHandle>(stack[i]));
      if (kinds[i] == 's') torch_delete_string(word_to<StringHandle>(stack[i]));
      if (auto* inner = kinds[i] == 't' ? word_to<StableIValue*>(stack[i]) : nullptr) {
        aoti_torch_delete_tensor_object(word_to<AtenTensorHandle>(*inner));
        delete inner;
      }
    }
  }

  /* The same arguments once more, in words of their own. */
  void copy(StableIValue* to) const {
    for (int i = 0; kinds[i]; ++i) {
      AtenTensorHandle tensor = nullptr;
      const char* text = "";
      auto* inner = kinds[i] == 't' ? word_to<StableIValue*>(stack[i]) : nullptr;
      if (kinds[i] == 'T' || inner) {
        check(aoti_torch_new_tensor_handle(word_to<AtenTensorHandle>(inner ? *inner : stack[i]), &tensor), "new_tensor_handle");
        to[i] = to_word(tensor);
        if (inner) to[i] = to_word(new StableIValue(to[i]));
      } else if (kinds[i] == 's') {
        StringHandle string = nullptr;
        check(torch_string_c_str(word_to<StringHandle>(stack[i]), &text), "string_c_str");
        check(torch_new_string_handle(text, std::strlen(text), &string), "new_string_handle");
        to[i] = to_word(string);
      } else {
        to[i] = stack[i];
      }
    }
  }
};

}  // namespace
}  // namespace arf
