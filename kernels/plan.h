/* From a call to launches: checks, strategy, pieces, launch shape and parameters. Host code without state but the
 * threshold table. Everything here depends on (tokens, hidden, world, dtype, epilogue, workspace size, table) only, so
 * all ranks decide alike. */
#pragma once
#include <string>

#include "params.h"

namespace arf {

struct Plan {
  int strategy;         /* ARF_ONESHOT, ARF_TWOSHOT, ARF_SHARDED, ARF_AUTO for a world of one */
  World kernels;
  int family;
  int kernel_row;       /* of the kernel table */
  uint32_t vectors;
  uint32_t per_thread;
  int threads;
  int cluster;
  int split;
  bool common; /* what the kernels know of the call (params.h: Calls) */
  int one_row; /* of the kernel table, for CTAs that finish one row each; 0: none of its own */
  int pushers;  /* CTAs that only push */
  int rows_each; /* rows that a CTA finishes at least */
  bool quiet;
  int shared_bytes;
  int64_t piece_tokens;
  int64_t pieces;
};

/* Whether ranks own blocks of consecutive tokens; one rank owns all in any case. */
inline bool has_blocks(const arf_call& call, int world) { return (call.flags & kOwnerBlocks) && world > 1; }
inline int64_t block_of(const arf_call& call, int world) { return call.block ? call.block : call.tokens / world; }
inline int item_bytes(int dtype) { return dtype == ARF_FP32 ? 4 : 2; }

/* Empty, or what is wrong with the call. */
std::string check_call(const arf_call& call);
/* Empty, or why no plan exists (a workspace too small for one token, tokens that are no whole number of blocks). major: of the
 * device's compute capability. */
std::string make_plan(int world, int64_t workspace_bytes, const arf_call& call, bool simulated, int major, Plan* plan);
struct Grid {
  int ctas;
  uint32_t rows_each; /* as in Params; of an exchange */
  uint32_t most_rows; /* that one of them finishes */
};
/* For a piece of `tokens`, when `resident` CTAs fit on the device at once. */
Grid grid_of(const Plan& plan, int world, int64_t tokens, int resident, int allowed = INT32_MAX);
/* One launch's part of a call. */
struct Piece {
  int64_t first;  /* token; with kOwnerBlocks, of rank 0's rows, where rank r's begin r * block later */
  int64_t tokens; /* 0: behind the last piece */
  int64_t own;    /* with kOwnerBlocks: tokens in front of it in what holds a rank's own alone */
  bool last;
};
Piece piece_of(const arf_call& call, const Plan& plan, int world, int64_t index);
/* Everything of `params` but control words, error record, timeout and the grid's. */
void fill_params(const arf_call& call, const Plan& plan, int rank, int world, void* const* buffers, int64_t workspace_bytes,
                 const Piece& piece, ShardedParams* params);
/* For CTAs (clusters) that finish so many rows at most: the kernels for straight calls finish one. */
const void* find_kernel(int dtype, const Plan& plan, uint32_t most_rows = 1);

int64_t piece_capacity(int world, int64_t workspace_bytes, int64_t row_bytes, int strategy); /* tokens */

/* A sharded residual (payload.cu). Whether the calls of a chain keep it so: the same for all of them, on all ranks. */
bool keeps_sharded(const arf_call& call, int world, int64_t workspace_bytes);
/* Empty, or what speaks against the call's marks. */
std::string check_marks(const arf_call& call);
/* What an owner sends of a row; without `first`, which depends on the piece. */
Payload payload_of(const arf_call& call);
int64_t sharded_capacity(const arf_call& call, int world, int64_t workspace_bytes); /* tokens of a piece */

void set_cast_saturates(bool saturates);
bool cast_saturates_now();
void set_launch_override(int threads, int ctas);
int set_thresholds(const arf_threshold* rows, int count);
int get_thresholds(arf_threshold* rows, int capacity);
int set_sharded_thresholds(const arf_threshold* rows, int count);
int get_sharded_thresholds(arf_threshold* rows, int capacity);
/* The row's value for (world, hidden) by the rule of arf_set_thresholds; -1: none. */
int64_t search_thresholds(const arf_threshold* rows, size_t count, int world, int64_t hidden);

}  // namespace arf
