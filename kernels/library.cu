/* The state behind the C ABI (api.h): workspaces by (group, device), and launching. Host code. */
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "plan.h"

namespace arf {
namespace {

constexpr int kMaxDevices = 64;
/* Eager launches of a device for which it is remembered on which stream a workspace was used: more than can be queued. */
constexpr int64_t kRemembered = 1 << 14;
constexpr int64_t kDefaultTimeout = int64_t{600} * 1000 * 1000 * 1000;

thread_local char message[768];

int fail(int status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  vsnprintf(message, sizeof message, format, args);
  va_end(args);
  return status;
}

int cuda_failed(cudaError_t error, const char* what) {
  cudaGetLastError(); /* a non-sticky error is ours to report, not the next caller's to find */
  return fail(ARF_CUDA, "%s failed: %s", what, cudaGetErrorString(error));
}

uint32_t timeout_us(int64_t ns) { return static_cast<uint32_t>(std::min<int64_t>(ns / 1000 + 1, INT32_MAX)); }

/* One (group, device). Shared: a launch may hold it while another thread destroys it. */
struct Workspace {
  std::string group;
  int device = 0;
  std::atomic<int> state{0}; /* as arf_group_state, without expiry */

  int rank = 0, world = 0;
  void* peers[kMaxWorld] = {};
  int64_t bytes = 0;
  Control* control = nullptr;
  arf_error_record* error = nullptr;
  bool owns_control = false, owns_error = false;
  std::atomic<int64_t> timeout_ns{kDefaultTimeout};
  std::atomic<int> max_ctas{INT32_MAX};

  /* Launches of a workspace follow one another, whatever streams they are on; see `order`. */
  std::mutex launches;
  cudaEvent_t event = nullptr;
  /* Guarded by the device's Neighbours, whose other workspaces read it. */
  cudaStream_t eager_stream = nullptr, captured_stream = nullptr;
  bool eager_used = false;
  int64_t last = 0;               /* the device's eager launch that was its last; at first the one before it was made */
  unsigned long long capture = 0; /* the capture that captured_stream belongs to; 0 none */
};

/* The workspaces of a device: kernels of two that run at once, on two streams, share its multiprocessors. */
struct Neighbours {
  std::mutex mutex;
  std::vector<Workspace*> workspaces;
  int64_t launches = 0;               /* eager ones */
  int64_t apart = -kRemembered - 1;   /* the last of them that found another workspace on another stream */
  unsigned long long apart_capture = 0; /* a capture in which that was so */
};
Neighbours neighbours[kMaxDevices];

std::mutex registry_mutex;
std::vector<std::shared_ptr<Workspace>>& registry() {
  static auto* all = new std::vector<std::shared_ptr<Workspace>>;
  return *all;
}
std::atomic<uint64_t> registry_version{1};
std::atomic<arf_prepare_fn> prepare{nullptr};
thread_local std::string prepare_problem;
thread_local bool prepare_is_value_error = false;

std::shared_ptr<Workspace> find_locked(const char* group, int device) {
  for (const auto& w : registry()) {
    if (w->device == device && w->group == group) return w;
  }
  return nullptr;
}

/* One string comparison on a hit: an engine's thread uses one group, or two in turn. */
std::shared_ptr<Workspace> find(const char* group, int device) {
  struct Hit {
    uint64_t version = 0;
    std::shared_ptr<Workspace> workspace;
  };
  thread_local Hit hits[2];
  const uint64_t version = registry_version.load(std::memory_order_acquire);
  for (Hit& hit : hits) {
    if (hit.version == version && hit.workspace->device == device && hit.workspace->group == group) return hit.workspace;
  }
  const std::lock_guard<std::mutex> lock(registry_mutex);
  std::shared_ptr<Workspace> found = find_locked(group, device);
  if (found) {
    hits[1] = std::move(hits[0]);
    hits[0] = {registry_version.load(), found};
  }
  return found;
}

/* An entry for (group, device) in its blank state, the old one retired. Caller holds registry_mutex. */
Workspace* renew_locked(const char* group, int device) {
  auto& all = registry();
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i]->device != device || all[i]->group != group) continue;
    const std::shared_ptr<Workspace> old = all[i];
    const std::lock_guard<std::mutex> lock(old->launches);
    {
      const std::lock_guard<std::mutex> list(neighbours[device].mutex);
      auto& there = neighbours[device].workspaces;
      there.erase(std::remove(there.begin(), there.end(), old.get()), there.end());
    }
    old->state = 0;
    if (old->owns_control) cudaFree(old->control);
    if (old->owns_error) cudaFreeHost(old->error);
    if (old->event) cudaEventDestroy(old->event);
    old->control = nullptr, old->error = nullptr, old->event = nullptr;
    all.erase(all.begin() + i);
    break;
  }
  all.push_back(std::make_shared<Workspace>());
  all.back()->group = group;
  all.back()->device = device;
  ++registry_version;
  return all.back().get();
}

struct DeviceFacts {
  std::atomic<int> ready{0};
  int multiprocessors = 0;
  int major = 0;
};
DeviceFacts device_facts[kMaxDevices];

cudaError_t facts_of(int device, const DeviceFacts** out) {
  DeviceFacts& facts = device_facts[device];
  if (!facts.ready.load(std::memory_order_acquire)) {
    cudaError_t e = cudaDeviceGetAttribute(&facts.multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (e == cudaSuccess) e = cudaDeviceGetAttribute(&facts.major, cudaDevAttrComputeCapabilityMajor, device);
    if (e != cudaSuccess) return e;
    facts.ready.store(1, std::memory_order_release);
  }
  *out = &facts;
  return cudaSuccess;
}

/* CTAs that fit on the device at once, cached by kernel and launch shape. */
cudaError_t resident_ctas(const void* kernel, const Plan& plan, int device, const DeviceFacts& facts, int* out) {
  struct Entry {
    const void* kernel;
    int threads, shared_bytes, device, ctas;
  };
  thread_local Entry cache[8] = {};
  thread_local unsigned next = 0;
  for (const Entry& e : cache) {
    if (e.kernel == kernel && e.threads == plan.threads && e.shared_bytes == plan.shared_bytes && e.device == device) {
      *out = e.ctas;
      return cudaSuccess;
    }
  }
  int per_multiprocessor = 0;
  cudaError_t e = cudaSuccess;
  if (plan.shared_bytes > 46 * 1024) { /* beyond what every kernel gets unasked, its static arrays counted */
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, ARF_MAX_HIDDEN * 4); /* the most there is */
    if (e != cudaSuccess) return e;
  }
  e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, plan.threads, plan.shared_bytes);
  if (e != cudaSuccess) return e;
  *out = facts.multiprocessors * (per_multiprocessor > 0 ? per_multiprocessor : 1);
  cache[next++ % 8] = {kernel, plan.threads, plan.shared_bytes, device, *out};
  return cudaSuccess;
}

cudaError_t launch_kernel(const void* kernel, const Plan& plan, int ctas, bool pdl, cudaStream_t stream, void** args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ctas);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (pdl) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (plan.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  }
  return cudaLaunchKernelExC(&config, kernel, args);
}

/* The parts of the device that a launch on `stream` leaves room for, its own counted: 1, or as many as there are workspaces.
 *
 * Launches of two workspaces that run at once, on two streams, may begin in one order here and in the other on a peer. With whole
 * grids each rank would then be full of CTAs that wait for a launch which finds no room on the other. It is enough that one of
 * the two leaves room. So a launch has its whole grid only where every other workspace was used on this very stream, and all
 * launches before it that may still be queued found the same. Where the streams of a call correspond on all ranks, two whole
 * launches are then on one stream, in one order. A workspace just made may be used on any stream; one unused for long is
 * forgotten. In a capture only its own launches count: what runs beside a replay, the host does not see. Caller holds the mutex. */
int parts(Neighbours* here, const Workspace* w, cudaStream_t stream, unsigned long long capture) {
  bool whole = true;
  for (const Workspace* other : here->workspaces) {
    if (other == w) continue;
    if (capture) {
      if (other->capture == capture && other->captured_stream != stream) here->apart_capture = capture;
    } else if (here->launches - other->last <= kRemembered) {
      if (!other->eager_used) whole = false;
      else if (other->eager_stream != stream) here->apart = here->launches;
    }
  }
  whole = whole && (capture ? here->apart_capture != capture : here->launches - here->apart > kRemembered);
  return whole ? 1 : static_cast<int>(here->workspaces.size()); /* w is one of them */
}

/* Makes `stream` wait for the workspace's last launch where that was on another stream: eager after eager, and within
 * one capture. Between a capture and anything outside it there is nothing to wait on; graphs that share a group have to
 * be replayed in one order, as every user of a collective keeps. `share` is of `parts`. Caller holds w->launches. */
int order(Workspace* w, cudaStream_t stream, int* share) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long id = 0;
  cudaError_t e = cudaStreamGetCaptureInfo(stream, &status, &id);
  if (e == cudaErrorStreamCaptureImplicit) { /* the legacy default stream, while another one is captured */
    cudaGetLastError();
    e = cudaSuccess;
  }
  if (e != cudaSuccess) return cuda_failed(e, "cudaStreamGetCaptureInfo");
  if (status == cudaStreamCaptureStatusInvalidated) return fail(ARF_CAPTURE, "the stream's capture has been invalidated");
  const bool capturing = status == cudaStreamCaptureStatusActive;
  cudaStream_t previous = nullptr;
  bool wait = false;
  {
    Neighbours& here = neighbours[w->device];
    const std::lock_guard<std::mutex> lock(here.mutex);
    if (capturing) {
      wait = w->capture == id && w->captured_stream != stream;
      previous = w->captured_stream;
      w->capture = id;
      w->captured_stream = stream;
    } else {
      wait = w->eager_used && w->eager_stream != stream;
      previous = w->eager_stream;
      w->capture = 0;
      w->eager_stream = stream;
      w->eager_used = true;
      w->last = ++here.launches;
    }
    *share = parts(&here, w, stream, capturing ? id : 0);
  }
  if (!wait) return ARF_OK;
  if (!w->event && (e = cudaEventCreateWithFlags(&w->event, cudaEventDisableTiming)) != cudaSuccess) {
    return cuda_failed(e, "cudaEventCreate");
  }
  e = cudaEventRecord(w->event, previous);
  if (e != cudaSuccess && capturing) {
    return fail(ARF_CAPTURE, "group '%s' is used on two streams of one capture and the first cannot be waited for (%s); "
                "let the second stream wait for the first", w->group.c_str(), cudaGetErrorString(e));
  }
  if (e != cudaSuccess) { /* the old stream is being captured, or is gone: all we can do is wait for the device */
    cudaGetLastError();
    e = cudaDeviceSynchronize();
    return e == cudaSuccess ? ARF_OK : cuda_failed(e, "cudaDeviceSynchronize");
  }
  e = cudaStreamWaitEvent(stream, w->event, 0);
  return e == cudaSuccess ? ARF_OK : cuda_failed(e, "cudaStreamWaitEvent");
}

const char* op_name(uint32_t op) {
  return op == ARF_OP_MOE_REDUCE     ? "moe_reduce_allreduce_rms_norm"
         : op == ARF_OP_MOE_FINALIZE ? "moe_finalize_allreduce_rms_norm"
                                     : "allreduce_rms_norm";
}

int expired(const Workspace* w) {
  const arf_error_record& r = *w->error;
  if (r.state == ARF_OVERLAPPED) {
    return fail(ARF_EXPIRED,
                "ExchangeOverlap: rank %u ran two launches of group '%s' at once (arfusion::%s, launch %u): graphs that share a "
                "group are replayed one after the other, and not beside eager calls. What both computed is undefined, and the "
                "group's workspace refuses work until it is made anew",
                r.rank, w->group.c_str(), op_name(r.op), r.generation);
  }
  return fail(ARF_EXPIRED,
              "ExchangeTimeout: rank %u of group '%s' waited longer than %.3g s for rank %u in arfusion::%s (launch %u, %s, "
              "row %u); the outputs of that launch are NaN and the group's workspace refuses work until it is made anew",
              r.rank, w->group.c_str(), static_cast<double>(w->timeout_ns.load()) * 1e-9, r.peer, op_name(r.op), r.generation,
              r.strategy == ARF_ONESHOT ? "contribution" : r.strategy == ARF_SHARDED ? "row" : "sum", r.token);
}

/* The workspace, made by the callback if need be. */
int resolve(const char* group, int device, long long tokens, long long hidden, int dtype, cudaStream_t stream,
            std::shared_ptr<Workspace>* out) {
  std::shared_ptr<Workspace> w = find(group, device);
  if (!w || w->state.load(std::memory_order_acquire) == 0) {
    const arf_prepare_fn make = prepare.load();
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaError_t e = cudaStreamIsCapturing(stream, &status);
    if (e != cudaSuccess) return cuda_failed(e, "cudaStreamIsCapturing");
    if (status != cudaStreamCaptureStatusNone) {
      return fail(ARF_CAPTURE, "group '%s' has no workspace yet and none can be made while a CUDA graph is captured: call "
                  "arfusion_pass.prepare(group, max_token_num, hidden_dim, dtype), or run once, before the capture", group);
    }
    if (!make) return fail(ARF_NO_WORKSPACE, "group '%s' has no workspace: call arfusion_pass.prepare(...)", group);
    prepare_problem.clear();
    make(group, device, tokens, hidden, dtype);
    if (!prepare_problem.empty()) {
      return fail(prepare_is_value_error ? ARF_INVALID : ARF_NO_WORKSPACE, "%s", prepare_problem.c_str());
    }
    w = find(group, device);
    if (!w || w->state.load(std::memory_order_acquire) == 0) {
      return fail(ARF_NO_WORKSPACE, "group '%s' still has no workspace on device %d after arfusion_pass.prepare", group, device);
    }
  }
  const int state = w->state.load(std::memory_order_acquire);
  *out = std::move(w);
  return state == 2 ? ARF_FALLBACK : ARF_OK;
}

/* With a grid for at most 1 / share of the device's multiprocessors. */
int launch_pieces(Workspace* w, int device, const arf_call& call, cudaStream_t stream, int share) {
  const int world = w ? w->world : 1;
  const DeviceFacts* facts;
  cudaError_t e = facts_of(device, &facts);
  if (e != cudaSuccess) return cuda_failed(e, "cudaDeviceGetAttribute");
  Plan plan;
  std::string problem = make_plan(world, w ? w->bytes : 0, call, false, facts->major, &plan);
  if (!problem.empty()) return fail(ARF_INVALID, "%s", problem.c_str());
  int resident;
  e = resident_ctas(find_kernel(call.dtype, plan), plan, device, *facts, &resident);
  if (e != cudaSuccess) return cuda_failed(e, "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const bool pdl = facts->major >= 9 && !(call.flags & kNoPdl);
  int most = w ? w->max_ctas.load(std::memory_order_relaxed) : INT32_MAX;
  if (share > 1) most = std::min(most, resident / share);
  for (int64_t number = 0; number < plan.pieces; ++number) {
    const Piece piece = piece_of(call, plan, world, number);
    if (!piece.tokens) break;
    ShardedParams all; /* a kernel takes as much of it as its own parameter is */
    Params& params = all.base;
    fill_params(call, plan, w ? w->rank : 0, world, w ? w->peers : nullptr, w ? w->bytes : 0, piece, &all);
    if (w) {
      params.control = w->control;
      params.error = w->error;
      params.timeout_us = timeout_us(w->timeout_ns.load(std::memory_order_relaxed));
    }
    const Grid grid = grid_of(plan, world, piece.tokens, resident, most);
    params.rows_each = grid.rows_each;
    void* args[] = {&all};
    e = launch_kernel(find_kernel(call.dtype, plan, grid.most_rows), plan, grid.ctas, pdl, stream, args);
    if (e != cudaSuccess) return cuda_failed(e, "the kernel's launch");
  }
  return ARF_OK;
}

}  // namespace
}  // namespace arf

using namespace arf;

extern "C" {

int arf_abi_version(void) { return ARF_ABI_VERSION; }
const char* arf_last_error(void) { return message; }

int arf_register_workspace(const arf_workspace_desc* d) {
  if (!d || !d->group || !*d->group) return fail(ARF_INVALID, "a workspace needs a group name");
  if (d->world < 2 || d->world > kMaxWorld || d->rank < 0 || d->rank >= d->world) {
    return fail(ARF_INVALID, "rank %d of world %d: a workspace is for 2 to %d ranks", d->rank, d->world, kMaxWorld);
  }
  if (d->device < 0 || d->device >= kMaxDevices) return fail(ARF_INVALID, "device %d is out of range", d->device);
  if (d->bytes < 4096 || d->bytes / 2 >= int64_t{1} << 32) {
    const long long bytes = d->bytes;
    return fail(ARF_INVALID, "a workspace of %lld bytes is too small, or 8 GiB and more", bytes);
  }
  for (int r = 0; r < d->world; ++r) {
    if (!d->peers[r] || reinterpret_cast<uintptr_t>(d->peers[r]) % 256) {
      return fail(ARF_INVALID, "the buffer of rank %d must be given and 256-byte aligned", r);
    }
  }
  int previous = 0;
  cudaError_t e = cudaGetDevice(&previous);
  if (e != cudaSuccess) return cuda_failed(e, "cudaGetDevice");
  void* control = d->control;
  void* error = d->error;
  if (previous != d->device) cudaSetDevice(d->device);
  if (!control) {
    e = cudaMalloc(&control, ARF_CONTROL_BYTES);
    if (e == cudaSuccess) e = cudaMemset(control, 0, ARF_CONTROL_BYTES);
    if (e == cudaSuccess) e = cudaDeviceSynchronize();
  }
  if (e == cudaSuccess && !error) {
    e = cudaHostAlloc(&error, sizeof(arf_error_record), cudaHostAllocMapped | cudaHostAllocPortable);
    if (e == cudaSuccess) std::memset(error, 0, sizeof(arf_error_record));
  }
  if (e != cudaSuccess) {
    if (!d->control) cudaFree(control);
    if (!d->error) cudaFreeHost(error);
  }
  if (previous != d->device) cudaSetDevice(previous);
  if (e != cudaSuccess) return cuda_failed(e, "allocating control words");
  const std::lock_guard<std::mutex> lock(registry_mutex);
  Workspace* w = renew_locked(d->group, d->device);
  w->rank = d->rank;
  w->world = d->world;
  std::copy(d->peers, d->peers + d->world, w->peers);
  w->bytes = d->bytes;
  w->control = static_cast<Control*>(control);
  w->error = static_cast<arf_error_record*>(error);
  w->owns_control = !d->control;
  w->owns_error = !d->error;
  w->timeout_ns = d->timeout_ns > 0 ? d->timeout_ns : kDefaultTimeout;
  {
    Neighbours& here = neighbours[d->device];
    const std::lock_guard<std::mutex> list(here.mutex);
    w->last = here.launches;
    here.workspaces.push_back(w);
  }
  w->state.store(1, std::memory_order_release);
  return ARF_OK;
}

int arf_destroy_workspace(const char* group, int device) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  if (!find_locked(group, device)) return ARF_OK;
  renew_locked(group, device);
  return ARF_OK;
}

int arf_mark_fallback(const char* group, int device) {
  if (!group || !*group) return fail(ARF_INVALID, "a fallback needs a group name");
  const std::lock_guard<std::mutex> lock(registry_mutex);
  renew_locked(group, device)->state.store(2, std::memory_order_release);
  return ARF_OK;
}

int arf_group_state(const char* group, int device) {
  const std::lock_guard<std::mutex> lock(registry_mutex); /* else the record could be freed while it is read */
  const std::shared_ptr<Workspace> w = find_locked(group, device);
  if (!w) return 0;
  const int state = w->state.load(std::memory_order_acquire);
  const volatile arf_error_record* error = w->error;
  return state == 1 && error && error->state ? 3 : state;
}

int arf_prepare_group(const char* group, int device, long long tokens, long long hidden, int dtype, void* stream) {
  std::shared_ptr<Workspace> w;
  return resolve(group, device, tokens, hidden, dtype, static_cast<cudaStream_t>(stream), &w);
}

int arf_read_error(const char* group, int device, arf_error_record* out) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const std::shared_ptr<Workspace> w = find_locked(group, device);
  if (!w || !w->error) return 0;
  const int state = static_cast<volatile arf_error_record*>(w->error)->state;
  if (out) *out = *w->error;
  return state != 0;
}

int arf_set_timeout(const char* group, int device, int64_t timeout_ns) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const std::shared_ptr<Workspace> w = find_locked(group, device);
  if (!w) return fail(ARF_NO_WORKSPACE, "group '%s' has no workspace", group);
  w->timeout_ns = timeout_ns > 0 ? timeout_ns : kDefaultTimeout;
  return ARF_OK;
}

int arf_set_max_ctas(const char* group, int device, int ctas) {
  const std::lock_guard<std::mutex> lock(registry_mutex);
  const std::shared_ptr<Workspace> w = find_locked(group, device);
  if (!w) return fail(ARF_NO_WORKSPACE, "group '%s' has no workspace", group);
  w->max_ctas = ctas > 0 ? ctas : INT32_MAX;
  return ARF_OK;
}

int64_t arf_workspace_bytes(int world, int64_t message_bytes, int strategy) {
  if (world < 2) return 0;
  const int64_t share = (message_bytes + world - 1) / world;
  const int64_t generation = strategy == ARF_ONESHOT ? (world - 1) * message_bytes : 2 * (world - 1) * share;
  const int64_t unit = int64_t{2} << 20;
  return (2 * (generation + 256) + unit - 1) / unit * unit;
}

int64_t arf_workspace_capacity(int world, int64_t bytes, int strategy) {
  if (world < 2) return INT64_MAX;
  return piece_capacity(world, bytes, 1, strategy == ARF_ONESHOT ? ARF_ONESHOT : ARF_TWOSHOT);
}

void arf_set_prepare(arf_prepare_fn fn) { prepare = fn; }

void arf_prepare_failed(const char* text, int is_value_error) {
  prepare_problem = text && *text ? text : "the workspace could not be prepared";
  prepare_is_value_error = is_value_error;
}

int arf_set_thresholds(const arf_threshold* rows, int count) { return set_thresholds(rows, count); }
int arf_get_thresholds(arf_threshold* rows, int capacity) { return get_thresholds(rows, capacity); }
int arf_set_sharded_thresholds(const arf_threshold* rows, int count) { return set_sharded_thresholds(rows, count); }
int arf_get_sharded_thresholds(arf_threshold* rows, int capacity) { return get_sharded_thresholds(rows, capacity); }
void arf_set_cast_saturates(int saturates) { set_cast_saturates(saturates != 0); }
void arf_set_launch_override(int threads, int ctas) { set_launch_override(threads, ctas); }

int arf_launch(const char* group, int device, const arf_call* call, void* stream_handle) {
  if (device < 0 || device >= kMaxDevices) return fail(ARF_INVALID, "device %d is out of range", device);
  const std::string problem = check_call(*call);
  if (!problem.empty()) return fail(ARF_INVALID, "%s", problem.c_str());
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_handle);
  if (!*group) return launch_pieces(nullptr, device, *call, stream, 1);
  std::shared_ptr<Workspace> w;
  int status = resolve(group, device, call->tokens, call->hidden, call->dtype, stream, &w);
  if (status != ARF_OK) return status;
  const std::lock_guard<std::mutex> lock(w->launches);
  if (w->state.load(std::memory_order_acquire) != 1) {
    return fail(ARF_NO_WORKSPACE, "the workspace of group '%s' was destroyed", group);
  }
  if (static_cast<volatile arf_error_record*>(w->error)->state) return expired(w.get());
  if (call->tokens == 0) return ARF_OK;
  int share = 1;
  status = order(w.get(), stream, &share);
  return status == ARF_OK ? launch_pieces(w.get(), device, *call, stream, share) : status;
}

int arf_launch_simulated(int world, const arf_call* calls, void* const* buffers, int64_t bytes, void* const* controls,
                         arf_error_record* const* errors, int64_t timeout_ns, void* stream) {
  if (world < 2 || world > kMaxWorld) return fail(ARF_INVALID, "world must be 2 to %d, got %d", kMaxWorld, world);
  static thread_local SimulatedParams all;
  static thread_local SimulatedShardedParams sharded;
  Plan plan;
  int device = 0;
  cudaError_t e = cudaGetDevice(&device);
  const DeviceFacts* facts = nullptr;
  if (e == cudaSuccess) e = facts_of(device, &facts);
  if (e != cudaSuccess) return cuda_failed(e, "querying the device");
  for (int r = 0; r < world; ++r) {
    std::string problem = check_call(calls[r]);
    if (problem.empty() && r == 0) problem = make_plan(world, bytes, calls[0], true, facts->major, &plan);
    if (problem.empty() && r == 0 && plan.pieces > 1) problem = "the call does not fit in one piece";
    if (!problem.empty()) return fail(ARF_INVALID, "%s", problem.c_str());
    fill_params(calls[r], plan, r, world, buffers, bytes, piece_of(calls[r], plan, world, 0), &sharded.rank[r]);
    Params& params = sharded.rank[r].base;
    params.control = static_cast<Control*>(controls[r]);
    params.error = errors[r];
    params.timeout_us = timeout_us(timeout_ns > 0 ? timeout_ns : kDefaultTimeout);
    all.rank[r] = params;
  }
  if (calls[0].tokens == 0) return ARF_OK;
  int resident = 0;
  e = resident_ctas(find_kernel(calls[0].dtype, plan), plan, device, *facts, &resident);
  if (e != cudaSuccess) return cuda_failed(e, "querying the device");
  if (resident < world * plan.cluster) return fail(ARF_INVALID, "%d ranks do not fit on the device at once", world);
  const Grid grid = grid_of(plan, world, calls[0].tokens, resident / world);
  for (int r = 0; r < world; ++r) all.rank[r].rows_each = sharded.rank[r].base.rows_each = grid.rows_each;
  void* const ranks = plan.strategy == ARF_SHARDED ? static_cast<void*>(&sharded) : &all;
  void* args[] = {ranks, &world};
  const bool pdl = facts->major >= 9 && !(calls[0].flags & kNoPdl);
  e = launch_kernel(find_kernel(calls[0].dtype, plan, grid.most_rows), plan, grid.ctas * world, pdl, static_cast<cudaStream_t>(stream), args);
  return e == cudaSuccess ? ARF_OK : cuda_failed(e, "the kernel's launch");
}

int arf_plan(int world, int64_t workspace_bytes, const arf_call* call, int device, arf_plan_info* out) {
  std::string problem = check_call(*call);
  const DeviceFacts* facts = nullptr;
  cudaError_t e = device < 0 ? cudaSuccess : facts_of(device, &facts);
  if (e != cudaSuccess) return cuda_failed(e, "querying the device");
  Plan plan;
  if (problem.empty()) problem = make_plan(world, workspace_bytes, *call, false, facts ? facts->major : 9, &plan);
  if (!problem.empty()) return fail(ARF_INVALID, "%s", problem.c_str());
  *out = {};
  out->strategy = plan.strategy;
  out->threads = plan.threads;
  out->vectors = plan.per_thread;
  out->pieces = plan.pieces;
  out->piece_tokens = plan.piece_tokens;
  if (device < 0) return ARF_OK; /* no device asked about: no grid */
  int resident;
  e = resident_ctas(find_kernel(call->dtype, plan), plan, device, *facts, &resident);
  if (e != cudaSuccess) return cuda_failed(e, "querying the device");
  out->ctas = grid_of(plan, world, plan.piece_tokens, resident).ctas;
  return ARF_OK;
}

}  // extern "C"
