/* What the kernels use of CUDA, for a C++ compiler: the types and functions of the runtime that library.cu calls, and what
 * device code has without asking. One GPU in one thread of the CPU: emulator.cpp. translate.py turns what a C++ compiler
 * cannot read (keywords, shared memory, inline PTX) into calls of what stands here. */
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <tuple>
#include <utility>

/* ---- Types --------------------------------------------------------------------------------------------------------- */

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct uint3 { uint32_t x, y, z; };
struct dim3 {
  uint32_t x, y, z;
  dim3(uint32_t x_ = 1, uint32_t y_ = 1, uint32_t z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

/* ---- The runtime's functions, those that library.cu calls ---------------------------------------------------------- */

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorStreamCaptureImplicit = 906 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeClusterDimension };
enum { cudaEventDisableTiming = 2, cudaHostAllocPortable = 1, cudaHostAllocMapped = 2 };
using cudaStream_t = struct EmulatedStream*;
using cudaEvent_t = struct EmulatedEvent*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
    struct { unsigned x, y, z; } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* ctas, const void*, int, size_t) { return *ctas = 1, cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
template <class T>
cudaError_t cudaMalloc(T** p, size_t bytes) { return *p = static_cast<T*>(aligned_alloc(256, (bytes + 255) / 256 * 256)), cudaSuccess; }
template <class T>
cudaError_t cudaHostAlloc(T** p, size_t bytes, unsigned) { return cudaMalloc(p, bytes); }
inline cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return memset(p, byte, bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaFreeHost(void* p) { return free(p), cudaSuccess; }
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* s) { return *s = cudaStreamCaptureStatusNone, cudaSuccess; }
inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* s, unsigned long long* id) {
  return *s = cudaStreamCaptureStatusNone, *id = 0, cudaSuccess;
}
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned) { return *e = nullptr, cudaErrorInvalidValue; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaErrorInvalidValue; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaErrorInvalidValue; }

/* ---- Device code ---------------------------------------------------------------------------------------------------- */

namespace emulated {

struct Thread { /* where the code that runs now stands */
  uint3 thread, block;
  dim3 block_size, grid_size;
};
extern Thread* current;

/* Memory of the CTA that runs, by a number of the declaration, and by the 32-bit addresses that PTX has for it. */
void* shared_memory(int declaration, size_t bytes);
void* dynamic_shared_memory();
uint32_t shared_address(const void* p);
template <class T>
T& shared(int declaration) { return *static_cast<T*>(shared_memory(declaration, sizeof(T))); }

/* All lanes of `mask` meet; each gives a value and gets what `kind` makes of all. */
enum Collective { kSyncWarp, kBallot, kAny, kReduceMax, kShuffleXor };
uint32_t meet(Collective kind, uint32_t mask, uint32_t value, int step = 0);
void sync_threads();
void yield();

/* A kernel by its address, with copies of its arguments. */
using Call = void (*)(const void* kernel, const void* arguments);
using Copy = std::shared_ptr<void> (*)(void** arguments);
void add_kernel(const void* kernel, Call call, Copy copy);

template <class... A>
const void* kernel(void (*function)(A...)) {
  using Arguments = std::tuple<A...>;
  const void* address = reinterpret_cast<const void*>(function);
  add_kernel(
      address,
      [](const void* k, const void* a) { std::apply(reinterpret_cast<void (*)(A...)>(const_cast<void*>(k)), *static_cast<const Arguments*>(a)); },
      [](void** from) -> std::shared_ptr<void> {
        int i = 0;
        return std::make_shared<Arguments>(Arguments{*static_cast<A*>(from[i++])...});
      });
  return address;
}

}  // namespace emulated

#ifdef __CUDA_ARCH__ /* host code calls fields so */
#define threadIdx (::emulated::current->thread)
#define blockIdx (::emulated::current->block)
#define blockDim (::emulated::current->block_size)
#define gridDim (::emulated::current->grid_size)
#endif

inline uint32_t __float_as_uint(float x) { uint32_t b; return memcpy(&b, &x, 4), b; }
inline float __uint_as_float(uint32_t b) { float x; return memcpy(&x, &b, 4), x; }
/* Without contraction, and with the GPU's only NaN. */
inline float one_nan(float x) { return x == x ? x : __uint_as_float(0x7FFFFFFFu); }
inline float __fadd_rn(float a, float b) { return one_nan(a + b); }
inline float __fmul_rn(float a, float b) { return one_nan(a * b); }
inline float __fmaf_rn(float a, float b, float c) { return one_nan(fmaf(a, b, c)); }
inline float __fdiv_rn(float a, float b) { return one_nan(a / b); }
inline float __frcp_rn(float a) { return one_nan(1.0f / a); }
inline float __fsqrt_rn(float a) { return one_nan(sqrtf(a)); }
inline float __frsqrt_rn(float a) { return one_nan(static_cast<float>(1.0 / sqrt(static_cast<double>(a)))); }
inline int __float2int_rn(float x) {
  if (x != x) return 0;
  return x >= 2147483648.0f ? INT32_MAX : x <= -2147483648.0f ? INT32_MIN : static_cast<int>(nearbyintf(x));
}
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(uint32_t x) { return x ? __builtin_clz(x) : 32; }
inline uint32_t max(uint32_t a, uint32_t b) { return a > b ? a : b; }
inline uint32_t min(uint32_t a, uint32_t b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int min(int a, int b) { return a < b ? a : b; }
inline uint32_t __vmaxu2(uint32_t a, uint32_t b) { return max(a & 0xFFFF0000u, b & 0xFFFF0000u) | max(a & 0xFFFFu, b & 0xFFFFu); }
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<uint32_t>(both >> (selector >> 4 * i & 7u) * 8 & 0xFFu) << 8 * i;
  return y;
}
template <class T>
T __ldg(const T* p) { return *p; }
inline uint32_t atomicExch(uint32_t* p, uint32_t value) { return std::exchange(*p, value); }
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) { return std::exchange(*p, *p + value); }
inline uint32_t atomicAnd(uint32_t* p, uint32_t value) { return std::exchange(*p, *p & value); }
inline void __threadfence_system() {}
inline void __nanosleep(uint32_t) { emulated::yield(); }
inline void __syncthreads() { emulated::sync_threads(); }
inline void __syncwarp(uint32_t mask = ~0u) { emulated::meet(emulated::kSyncWarp, mask, 0); }
inline uint32_t __ballot_sync(uint32_t mask, bool p) { return emulated::meet(emulated::kBallot, mask, p); }
inline int __any_sync(uint32_t mask, uint32_t p) { return emulated::meet(emulated::kAny, mask, p != 0); }
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t x) { return emulated::meet(emulated::kReduceMax, mask, x); }
inline uint32_t __shfl_xor_sync(uint32_t mask, uint32_t x, int step) { return emulated::meet(emulated::kShuffleXor, mask, x, step); }
inline float __shfl_xor_sync(uint32_t mask, float x, int step) {
  return __uint_as_float(__shfl_xor_sync(mask, __float_as_uint(x), step));
}
inline size_t __cvta_generic_to_shared(const void* p) { return emulated::shared_address(p); }
