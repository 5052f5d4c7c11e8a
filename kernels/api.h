/* The plain C ABI of the kernel library: what Python (ctypes), the torch binding and a bare CUDA harness may call.
 *
 * The same shared object is loaded twice over: torch.ops.load_library runs its op registrations, ctypes.CDLL on the
 * same path returns the same handle and calls the functions below. Nothing here names torch.
 *
 * Conventions: functions that can fail return ARF_OK (0) or an arf_status, and arf_last_error() gives the sentence
 * (thread-local, valid until this thread's next call). Sizes are bytes unless the name says otherwise. All functions
 * are thread-safe. Layout of a workspace and the ordering argument: README.md.
 */
#ifndef ARF_API_H
#define ARF_API_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ARF_API __attribute__((visibility("default")))
#define ARF_ABI_VERSION 6

#define ARF_MAX_WORLD 8
#define ARF_MAX_HIDDEN 16384 /* elements of a token; hidden * itemsize is a multiple of 16 bytes */

typedef enum arf_status {
  ARF_OK = 0,
  ARF_INVALID = 1,     /* an argument is wrong: ValueError */
  ARF_NO_WORKSPACE = 2,/* the group has no workspace on that device and none could be made */
  ARF_FALLBACK = 3,    /* the group is marked as fallback: the caller has to use another path */
  ARF_EXPIRED = 4,     /* a wait of this workspace expired earlier, or two launches of it overlapped; it refuses work until
                          made anew */
  ARF_CUDA = 5,        /* a CUDA call failed; the message names it */
  ARF_CAPTURE = 6      /* not possible during stream capture; the message says what to do */
} arf_status;

/* ARF_FP64: of epsilon_tensor alone. */
typedef enum arf_dtype { ARF_BF16 = 0, ARF_FP16 = 1, ARF_FP32 = 2, ARF_FP64 = 3 } arf_dtype;

ARF_API int arf_abi_version(void);
ARF_API const char* arf_last_error(void);
/* The library's own list of ops, one a line: "name(schema) -> ()", spelt as arfusion_pass/ops/schema.py spells it. */
ARF_API const char* arf_schemas(void);
/* Mirror of spec.py for the comparing test: lines "Flags.UNROUNDED_SUM=1", "ScaleLayout.ROW=0", ... */
ARF_API const char* arf_spec_constants(void);
/* __CUDA_ARCH_LIST__ of the build: "900", or "900,1000". */
ARF_API const char* arf_architectures(void);

/* What the CUDA ops hand to Python, all with the op's own schema and arguments, defined by Python:
 *   arfusion::_fallback_<op>  the group is marked as fallback (below);
 *   arfusion::_python_<op>    flags has REFERENCE, FLASHINFER or RECORD. It must not call arfusion::<op> with that flag again;
 *   arfusion::_first_<op>     runs nothing: raises what is wrong with the call. Asked once a thread for each kind of call
 *                             (all arguments but shapes, strides, addresses and factors), and where the library refuses one.
 * torch keeps no exception across that boundary: before one leaves them they say it here, in the same thread. */
ARF_API void arf_call_failed(const char* message, int is_value_error);

/* ---- Workspaces ------------------------------------------------------------------------------------------------- */

/* What a launch writes to host-mapped memory when a wait expires, or when it finds that another launch of the workspace is
 * running. `state` is written last. */
typedef struct arf_error_record {
  uint32_t state;      /* ARF_FINE, ARF_WAITED, ARF_OVERLAPPED; any other value is never written */
  uint32_t rank;       /* who waited, or ran two launches at once */
  uint32_t peer;       /* for whom */
  uint32_t op;         /* ARF_OP_* below */
  uint32_t generation; /* launch count of this workspace, modulo 2^32 */
  uint32_t strategy;   /* ARF_ONESHOT / ARF_TWOSHOT; ARF_TWOSHOT_GATHER, ARF_SHARDED: for an owner's sum, its finished row */
  uint32_t token;      /* which row of the launch's piece; of an overlap, which CTA */
  uint32_t reserved[9];
} arf_error_record; /* 64 bytes */

enum { ARF_FINE = 0, ARF_WAITED = 1, ARF_OVERLAPPED = 2 };
enum { ARF_OP_ALLREDUCE = 0, ARF_OP_MOE_REDUCE = 1, ARF_OP_MOE_FINALIZE = 2 };
enum { ARF_FACTOR_NONE = 0, ARF_FACTOR_VALUE = 1, ARF_FACTOR_ELEMENT = 2, ARF_FACTOR_ROWS = 3 };
enum { ARF_AUTO = 0, ARF_ONESHOT = 1, ARF_TWOSHOT = 2, ARF_TWOSHOT_GATHER = 3, ARF_SHARDED = 4 };

/* A rank's workspace is
 *  - `bytes` of symmetric memory at peers[rank], mapped at peers[r] for every rank r (same size on all ranks, 256-byte
 *    aligned). Two generations of bytes / 2 each; within a generation any strategy lays itself out anew, there are no
 *    separate one-shot and two-shot regions. BEFORE registering: every byte 0xFF on every rank, then a barrier.
 *  - `control`: ARF_CONTROL_BYTES of plain device memory, zeroed; NULL: the library allocates, zeroes and frees it.
 *  - `error`: 64 bytes of host-mapped, portable pinned memory (device-accessible at the same address), zeroed;
 *    NULL: the library allocates and frees it.
 * All pointers stay valid until arf_destroy_workspace. Registering a (group, device) again replaces the old one
 * (its state of fallback or expiry too). */
#define ARF_CONTROL_BYTES 20480

typedef struct arf_workspace_desc {
  const char* group; /* as the ops' group_name; not "" */
  int device;
  int rank;
  int world; /* 2 to ARF_MAX_WORLD */
  void* peers[ARF_MAX_WORLD];
  int64_t bytes;
  void* control;
  arf_error_record* error;
  int64_t timeout_ns; /* of one wait inside a kernel; <= 0: 600 s */
} arf_workspace_desc;

ARF_API int arf_register_workspace(const arf_workspace_desc* desc);
/* Forgets it. The caller has synchronised the device (and its peers) first, and frees the symmetric memory after. */
ARF_API int arf_destroy_workspace(const char* group, int device);
/* No P2P, several hosts, more than 8 ranks: the ops call arfusion::_fallback_<op> with the same arguments instead. */
ARF_API int arf_mark_fallback(const char* group, int device);
/* 0 unknown, 1 workspace, 2 fallback, 3 expired. */
ARF_API int arf_group_state(const char* group, int device);
/* Copies the error record; returns 1 if a wait of it has expired or launches overlapped, 0 if not (or no such workspace). */
ARF_API int arf_read_error(const char* group, int device, arf_error_record* out);
ARF_API int arf_set_timeout(const char* group, int device, int64_t timeout_ns);
/* At most so many CTAs in a launch of the group, so that other groups' launches, or other kernels, find room beside it; 0: as
 * many as pay. Ranks' grids need not be equal. */
ARF_API int arf_set_max_ctas(const char* group, int device, int ctas);

/* Symmetric memory a rank needs so that messages of `message_bytes` (tokens * hidden * itemsize) go in one piece of
 * the given strategy (ARF_AUTO: two-shot), rounded up to 2 MiB; and the other way round: the largest message that a
 * workspace of `bytes` takes in one piece. Larger messages go in several pieces, always. The smallest usable
 * workspace holds one token: arf_workspace_bytes(world, world * hidden * itemsize, ARF_AUTO) is a sane minimum. */
ARF_API int64_t arf_workspace_bytes(int world, int64_t message_bytes, int strategy);
ARF_API int64_t arf_workspace_capacity(int world, int64_t bytes, int strategy);

/* Called by an op whose group has no workspace and no fallback mark on that device. It has to register a workspace, or
 * mark the group as fallback, or call arf_prepare_failed; it may take the GIL. Not called while the stream is captured:
 * there the op raises an error that names arf.prepare. `dtype` is an arf_dtype. */
typedef void (*arf_prepare_fn)(const char* group, int device, long long tokens, long long hidden, int dtype);
ARF_API void arf_set_prepare(arf_prepare_fn fn);
/* ARF_OK or ARF_FALLBACK for a known group; asks the callback about an unknown one, unless `stream` is captured. */
ARF_API int arf_prepare_group(const char* group, int device, long long tokens, long long hidden, int dtype, void* stream);
/* From inside the callback: why not. is_value_error: the op raises ValueError (an unknown group), else RuntimeError. */
ARF_API void arf_prepare_failed(const char* message, int is_value_error);

/* ---- Strategy --------------------------------------------------------------------------------------------------- */

/* One-shot up to `oneshot_max_bytes` of message (tokens * hidden * itemsize), two-shot above. The row with this world
 * and the largest hidden not above the call's is used, else the row with the smallest hidden, else the built-in table.
 * Setting replaces the whole table; count 0 restores the built-in one. All ranks have to set the same. */
typedef struct arf_threshold {
  int32_t world;
  int32_t hidden;
  int64_t oneshot_max_bytes;
} arf_threshold;
ARF_API int arf_set_thresholds(const arf_threshold* rows, int count);
/* Up to `capacity` rows of the table in force; returns how many there are. */
ARF_API int arf_get_thresholds(arf_threshold* rows, int capacity);

/* Calls that a chain's marks allow it (spec.py: RESIDUAL_*_SHARDED) keep their residual sharded from `oneshot_max_bytes` of
 * message on, by the same rule for the row; 2^62: never. What a call writes plays no part, so a chain's calls decide
 * alike. All ranks have to set the same, between chains. */
ARF_API int arf_set_sharded_thresholds(const arf_threshold* rows, int count);
ARF_API int arf_get_sharded_thresholds(arf_threshold* rows, int capacity);

/* Whether the running torch's float32 -> float8_e4m3fn cast on CUDA saturates beyond 448 (1) or gives NaN (0); an
 * unclamped quantiser does as it does. The binding sets it from torch's version when it is loaded (saturates from 2.13
 * on, as its headers say); a caller that measures the cast may overrule it. */
ARF_API void arf_set_cast_saturates(int saturates);

/* ---- Launches --------------------------------------------------------------------------------------------------- */

/* One op call, every pointer given; the torch binding fills this from tensors. NULL means none. Rows are contiguous
 * within; x and residual may have a row stride (0: hidden). All 16-byte aligned, strides multiples of 16 bytes. */
typedef struct arf_call {
  int32_t op;         /* ARF_OP_* */
  int32_t dtype;      /* T */
  int64_t tokens;
  int64_t hidden;
  const void* x;      /* [tokens, hidden] T; MoE reduce: expert_x [experts, tokens, hidden]; finalize: permuted_x [P, hidden] */
  int64_t x_stride;   /* elements between rows (allreduce op only) */
  const void* residual;
  int64_t residual_stride;
  int32_t residual_fp32;     /* residual is fp32 though T is not */
  int32_t residual_out_fp32;
  const void* weight;
  int32_t weight_fp32;
  int32_t norm_out_fp32;
  const void* scale;         /* one element: static FP8 scale or NVFP4 global scale; NULL: scale_value */
  int32_t scale_dtype;       /* arf_dtype of scale */
  float scale_value;
  float epsilon;
  float weight_bias;
  int32_t flags;             /* spec.py Flags */
  float quant_bound;
  int64_t quant;             /* spec.py QuantSpec.pack() */
  void* allreduce_out;       /* T [tokens, hidden] */
  void* residual_out;
  void* norm_out;
  void* quant_out;
  void* scale_out;
  /* Column-major layouts: 1 where scale_out is the transpose [G, pad4(T)], whose last column is padded in storage. */
  int32_t scale_pad_last;
  /* MoE */
  int32_t experts;           /* reduce: E; finalize: K */
  const void* expert_scale;  /* reduce: fp32 [E, T]; finalize: [T, K] fp32 or T, or NULL */
  int32_t expert_scale_fp32;
  float routed_scaling_factor;
  const int32_t* index;      /* finalize: [T, K], -1 for none */
  int64_t permuted_rows;     /* finalize: P; an index outside [0, P) is read as none */
  const void* shared;        /* reduce: token_input; finalize: shared_expert_output; [T, hidden] or NULL */
  /* What a graph adds beside the residual: T [hidden], or with addend_rows [tokens, hidden] */
  const void* addend;
  int32_t addend_rows;
  int32_t epsilon_dtype;      /* arf_dtype of epsilon_tensor */
  const void* epsilon_tensor; /* one element that stands for epsilon, or NULL */
  /* What a graph multiplies the sum over ranks by, before or (ADDEND_SCALED) behind the addend; T or fp32 */
  const void* factor;
  int32_t factor_kind;        /* ARF_FACTOR_* */
  int32_t factor_fp32;        /* factor is fp32 though T is not */
  float factor_value;
  /* With OWNER_BLOCKS: token t is rank t / block mod world's (0: tokens / world); residual, residual_out, an addend and a
   * factor of rows hold this rank's tokens alone, one block behind the other. */
  int64_t block;
  int64_t own_rows; /* how many those are, for the check; 0: none, or the caller knows */
} arf_call;

/* Runs the call on `stream` (a cudaStream_t) of `device` in the group's workspace; group "": no exchange. Checks what it
 * can (not pointers' extents), loops over pieces, serialises streams. No device guard: `device` must be current. */
ARF_API int arf_launch(const char* group, int device, const arf_call* call, void* stream);

/* Simulated ranks: calls[r] is rank r's call; all `world` ranks run in ONE kernel launch on the current device, rank r
 * with buffer buffers[r] (`bytes` each, all 0xFF at first), control words controls[r] (zeroed at first) and error
 * records errors[r]. Same shapes, flags and spec in all calls. One piece only: ARF_INVALID when it does not fit.
 * This is how world sizes 5 to 8 and compute-sanitizer are tested. The kernels are the run-time-world ones. */
ARF_API int arf_launch_simulated(int world, const arf_call* calls, void* const* buffers, int64_t bytes,
                                 void* const* controls, arf_error_record* const* errors, int64_t timeout_ns, void* stream);

/* What a call would do: for tests, reports and the benchmark. Depends on nothing but these arguments, the device's
 * architecture and the threshold table. */
typedef struct arf_plan_info {
  int32_t strategy;   /* ARF_ONESHOT, ARF_TWOSHOT, ARF_SHARDED; ARF_AUTO where world is 1 */
  int32_t threads;    /* of a CTA */
  int32_t ctas;
  int32_t vectors;    /* 16-byte vectors a thread */
  int64_t pieces;
  int64_t piece_tokens;
} arf_plan_info;
ARF_API int arf_plan(int world, int64_t workspace_bytes, const arf_call* call, int device, arf_plan_info* out);

/* Forces threads a CTA and the number of CTAs of every later launch; 0: automatic. For tuning runs, not for users. */
ARF_API void arf_set_launch_override(int threads, int ctas);

#ifdef __cplusplus
}
#endif
#endif /* ARF_API_H */
