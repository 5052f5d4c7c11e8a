/* What one launch needs, by value in its parameters, and how the host finds the kernel for it. */
#pragma once
#include <stddef.h>
#include <stdint.h>

#include "api.h"
#include "spec.h"

namespace arf {

constexpr int kMaxWorld = ARF_MAX_WORLD;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kVectorBytes = 16;
/* One pair of words a CTA: {generation, poisoned}. Every launch leaves all pairs equal, so the next may have any grid.
 * Behind them, one pair a CTA for the clock of its waits, and behind those a word a CTA: 1 while a launch's CTA runs. */
constexpr unsigned kMaxCtas = ARF_CONTROL_BYTES / (8 + 8 + 4);

struct Vec4 {
  uint32_t w[4];
};

struct Control {
  uint32_t generation;
  uint32_t poisoned;
};

/* The slot of sender `from` in the buffer of receiver `to`. */
ARF_HD int slot_of(int from, int to) { return from - (from > to); }

/* Lengths called "vectors" count 16 bytes of T (8 or 4 elements). Row pointers are at the piece's first token. */
struct Params {
  /* Exchange. Slot of sender s in receiver r: s - (s > r), so world - 1 slots of `slot_bytes`. */
  char* push[kMaxWorld - 1]; /* peer (rank + 1 + i) % world: its buffer plus my slot, generation 0 */
  char* own;                 /* my buffer, generation 0 */
  uint64_t generation_bytes;
  uint32_t slot_bytes;
  int32_t rank;
  int32_t world;
  Control* control;
  arf_error_record* error;
  uint32_t timeout_us; /* below 2^31 */

  /* Shape */
  uint32_t tokens;       /* of this piece */
  uint32_t vectors;      /* of a row */
  uint32_t per_thread;   /* vectors a thread holds of a row */
  uint32_t split;        /* two-shot: CTAs (clusters) that share a row of tokens, 1, a power of two or world */
  uint32_t split_shift;
  uint32_t cluster;      /* CTAs that share a row; 1 unless per_thread is 1 */
  uint32_t pushers;      /* CTAs that only push; 0: every CTA pushes the rows that it finishes */
  uint32_t rows_each;    /* neighbours, that a CTA (a cluster) finishes; the first finish one more, if some are left */
  bool quiet;            /* one lane of a warp polls, not all */
  uint8_t factor_kind;   /* ARF_FACTOR_* */
  bool factor_fp32;
  uint32_t tiles;        /* of 32 vectors in a row: the leaves of the variance's tree */
  float inverse_hidden;

  /* Epilogue */
  uint32_t flags;
  uint32_t op;
  bool residual_fp32, residual_out_fp32, weight_fp32, norm_out_fp32;
  bool need_norm;
  bool cast_saturates;
  bool addend_rows;
  uint8_t epsilon_dtype;
  float epsilon;
  float weight_bias;
  const void* x;
  uint64_t x_stride; /* 16-byte units */
  const void* residual;
  uint64_t residual_stride; /* 16-byte units */
  const void* weight;
  void* allreduce_out;
  void* residual_out;
  void* norm_out;

  /* Quantiser */
  Quant quant;
  int32_t group; /* -1: a token */
  uint32_t lane_shift; /* log2 of the vectors in a group */
  float amax_bound;    /* lower bounds, 0 for none */
  float scale_bound;
  float scale_value;
  const void* scale;
  int32_t scale_dtype;
  float factor_value; /* the epilogue's, as factor_kind: here they take no room */
  void* quant_out; /* at the piece's first token */
  void* scale_out; /* at the tensor's first token */
  uint32_t first_token;
  uint32_t total_tokens;
  uint32_t groups;         /* of a token */
  uint32_t scale_stride_t; /* elements, for the strided layouts */
  uint32_t scale_stride_g;
  bool pad;          /* this piece writes the padding of scale_out */
  bool pad_last;     /* column layouts: the last column's padding lies in the storage */

  /* MoE prologue */
  bool expert_scale_fp32;
  int32_t experts;
  uint32_t expert_stride; /* tokens between experts of expert_x and expert_scale */
  const void* expert_scale;
  const int32_t* index;
  const void* shared;
  float routed_scaling_factor;
  uint32_t permuted_rows; /* as many as an index can name, at most */

  /* Of few calls, and of no common one. */
  const void* factor;         /* at the piece's first token where it has rows */
  const void* addend;         /* likewise; else one row for all */
  const void* epsilon_tensor; /* stands for epsilon */
};
/* The kernels touch each 64 bytes of it before they begin (kernels.cuh: begin). */
static_assert(sizeof(Params) <= 6 * 64, "one line more, which every launch would pay");

/* All ranks of a simulated launch. */
struct SimulatedParams {
  Params rank[kMaxWorld];
};

/* What the owner of a token sends of its row (sharded.cuh); places in bytes from the row's start, where the norm lies. */
struct Payload {
  uint32_t first; /* of a slot's rows of payload, behind its rows of x */
  uint32_t bytes; /* of a row, a multiple of 16 */
  uint32_t total_at, codes_at, scales_at, marks_at;
  bool norm, total, codes, marks; /* which of them there are; scales beside codes that have some */
};

/* A sharded launch's; other kernels are given the front of it. Row q, of `rows`, of owner r is token q * row_stride + r *
 * owner_stride: world and 1, token mod world; with kOwnerBlocks 1 and the block, of which a piece holds some rows. */
struct ShardedParams {
  Params base;
  Payload payload;
  uint32_t row_stride, owner_stride, rows;
};

struct SimulatedShardedParams {
  ShardedParams rank[kMaxWorld];
};
static_assert(sizeof(SimulatedShardedParams) + sizeof(int) <= 4096, "a kernel's parameters");

/* Quantiser families: one template parameter, so that a norm alone carries no quantiser's registers. kUsual: of
 * kDynamic the specs that most models use (plan.cu: is_usual), in kernels for common calls only. kMx: MXFP8 of 16 bits, in
 * those for straight calls; there kUsual is of groups alone, kToken per token of a norm that is rounded once, kTokenRounded
 * of one that is rounded before the weight too. */
enum Family { kPlain = 0, kStatic = 1, kDynamic = 2, kFp4 = 3, kUsual = 4, kMx = 5, kToken = 6, kTokenRounded = 7, kFamilies = 8 };

/* What a kernel takes for granted of its calls (plan.cu). Straight calls, of the common: what a decode step asks for between
 * two GEMMs: residual in and out, the norm or its codes and nothing else, no bias to the weight. One-shot only. Near
 * calls are straight but for a factor, an addend in front of the residual, a bias to the weight or epsilon in memory; norms and
 * static FP8 alone. */
enum Calls { kAnyCalls = 0, kCommonCalls = 1, kStraightCalls = 2, kNearCalls = 3 };

/* Which set of kernels. Two, four and eight ranks have their own for rows of at most 1024 vectors; any other world, and
 * wider rows, take kAny. */
enum World { kLocal = 0, kTwo = 1, kFour = 2, kEight = 3, kAny = 4, kSimulated = 5, kShardedAll = 6, kWorlds = 7 };

/* Rows of the kernels for a sharded residual: two ranks, common calls and others; more ranks and wider rows; simulated. */
enum ShardedRow { kShardedCommon = 0, kShardedTwo = 1, kShardedAny = 2, kShardedSimulated = 3, kShardedSimulatedCommon = 4,
                  kShardedRows = 5 };

/* Row 0 one-shot, 1 two-shot, 2 and 3 the same for common calls, 4 and 5 one-shot for straight and near ones (not kAny); local:
 * 0 rows of more than 1024 vectors, 1 narrower, 2 common calls; sharded: ShardedRow. Each .cu has one. */
using KernelGetter = const void* (*)(int row, int family);

}  // namespace arf
