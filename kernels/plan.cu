/* See plan.h. */
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <mutex>
#include <vector>

namespace arf {

#define ARF_DECLARE(D)                                                                                    \
  const void* kernels_##D##_local(int, int);                                                              \
  const void* kernels_##D##_two(int, int);                                                                \
  const void* kernels_##D##_four(int, int);                                                               \
  const void* kernels_##D##_eight(int, int);                                                              \
  const void* kernels_##D##_any(int, int);                                                                \
  const void* kernels_##D##_simulated(int, int);                                                          \
  const void* kernels_##D##_sharded(int, int);
ARF_DECLARE(bf16)
ARF_DECLARE(fp16)
ARF_DECLARE(fp32)
#define ARF_GETTERS(D) \
  {kernels_##D##_local, kernels_##D##_two, kernels_##D##_four, kernels_##D##_eight, kernels_##D##_any, kernels_##D##_simulated, \
   kernels_##D##_sharded}
static const KernelGetter kGetters[3][kWorlds] = {ARF_GETTERS(bf16), ARF_GETTERS(fp16), ARF_GETTERS(fp32)};

const void* find_kernel(int dtype, const Plan& plan, uint32_t most_rows) {
  return kGetters[dtype][plan.kernels](plan.one_row && most_rows == 1 ? plan.one_row : plan.kernel_row, plan.family);
}

namespace {

std::atomic<bool> cast_saturates{false};
std::atomic<int> override_threads{0}, override_ctas{0};

/* One-shot sends W - 1 times the message a rank, two-shot 2 (W - 1) / W times and one hop more. With two ranks both send
 * the same; two-shot pays for wide rows in long messages, as its scatter is half as long (46.6 against 49.3 us for 7168 x
 * 1024). Built-in values: see README.md for the measurement. */
const arf_threshold kBuiltIn[] = {
    {2, 0, int64_t{1} << 40}, {2, 4224, 6 << 20}, {3, 0, 512 << 10}, {4, 0, 256 << 10}, {5, 0, 128 << 10},
    {6, 0, 128 << 10},        {7, 0, 64 << 10},  {8, 0, 64 << 10},
};
std::mutex table_mutex;
/* Replaced whole and never freed, so that a launch reads it without a lock. */
std::atomic<const std::vector<arf_threshold>*> table{nullptr};

}  // namespace

int64_t search_thresholds(const arf_threshold* rows, size_t count, int world, int64_t hidden) {
  const arf_threshold *below = nullptr, *smallest = nullptr;
  for (size_t i = 0; i < count; ++i) {
    const arf_threshold& row = rows[i];
    if (row.world != world) continue;
    if (row.hidden <= hidden && (!below || row.hidden > below->hidden)) below = &row;
    if (!smallest || row.hidden < smallest->hidden) smallest = &row;
  }
  if (below) return below->oneshot_max_bytes;
  return smallest ? smallest->oneshot_max_bytes : -1;
}

namespace {

int64_t oneshot_limit(int world, int64_t hidden) {
  if (const auto* rows = table.load(std::memory_order_acquire)) {
    const int64_t found = search_thresholds(rows->data(), rows->size(), world, hidden);
    if (found >= 0) return found;
  }
  return search_thresholds(kBuiltIn, sizeof kBuiltIn / sizeof *kBuiltIn, world, hidden);
}

std::string number(int64_t n) { return std::to_string(n); }

bool misaligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes != 0; }

constexpr int kMaxCluster = 8;    /* the portable limit */
constexpr int kClusterCtas = 128; /* CTAs that a split may make: about one a multiprocessor */
constexpr int kSplitCtas = 264;   /* CTAs that two-shot's split may make: two a multiprocessor */
/* Warps that a part keeps at least, about: 7168 x 1 among four takes 4.16 us in 7 parts, 4.28 in 4. */
constexpr int kClusterTiles = 3;

/* More tokens than this among more than two ranks, and one lane of a warp polls for all, so that polls leave room in L2 for
 * what arrives. Among two all lanes polling is never slower and gains 0.1 to 0.5 us of one-shot, two-shot and sharded calls of
 * 96 to 1024 tokens (H200, benchmarks/NOTES.md); more ranks poll as many more vectors, which was not measured. */
constexpr int kLoudTokens = 64;
/* CTAs that only push, and for how many tokens (H200, hidden 7168 and 8192): 21.2 against 22.7 us for 7168 x 256 among four
 * in two-shot, 74.0 against 76.7 for 7168 x 1024; 14.5 against 15.2 for 7168 x 256 among two in one-shot, and no gain from
 * 512 tokens on. Narrower rows lose by it: there CTAs that push and CTAs that finish share a multiprocessor anyway. */
constexpr int kTwoshotPushers = 32, kTwoshotPushTokens = 256;
/* With a sharded residual none: contributions pushed ahead of all rows stand on the link in front of the first codes (7168 x 2048,
 * static FP8: 77.8 us with 32 such CTAs, 69.7 without). From so many rows a rank a CTA has two, so that one's payload is on its
 * way while it finishes the other: 68.2 against 69.7 there, 22.0 against 23.4 for 8192 x 512. Not narrower rows: two of their
 * CTAs share a multiprocessor (4096 x 2048: 41.8 with a row a CTA, 42.3 with two). H200, benchmarks/NOTES.md. */
constexpr int kShardedPairs = 256;
constexpr int kOneshotPushers = 16, kOneshotPushTokens = 160, kOneshotPushMost = 448;

/* A FP8 group must be a power of two of lanes within a warp. */
bool group_fits(int64_t group, int elements) {
  const int64_t lanes = group / elements;
  return group % elements == 0 && lanes >= 1 && lanes <= kWarp && (lanes & (lanes - 1)) == 0;
}

std::string check_quant(const arf_call& c) {
  const Quant q{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)};
  const int64_t group = (c.quant >> 32) - 1;
  const int elements = kVectorBytes / item_bytes(c.dtype);
  const Layout layout = q.layout();
  const bool column = layout == Layout::kColumn || layout == Layout::kColumnTma || layout == Layout::kPackedUe8m0;
  if (!c.quant_out) return "a quantiser needs quant_out";
  if (!std::isfinite(c.quant_bound)) return "quant_bound must be finite";
  const bool is_static = q.format() == Format::kFp8 && group == 0;
  if (is_static != (c.scale_out == nullptr)) {
    return is_static ? "static FP8 writes no scale: scale_out must be None" : "this quantiser needs scale_out";
  }
  const bool takes_scale = is_static || q.format() == Format::kNvfp4;
  if (c.scale && !takes_scale) return "scale is for static FP8 and NVFP4 only";
  if (!is_static && q.apply() == Apply::kMultiply) return "Apply.MULTIPLY is for a static scale";
  if (is_static && q.apply() == Apply::kMaxOverAmax) return "Apply.MAX_OVER_AMAX needs a dynamic scale";
  switch (q.format()) {
    case Format::kFp8:
      if (group == 0) return "";
      if (group == -1) return layout == Layout::kRow ? "" : "per-token FP8 scales come in ROW";
      if (group < -1 || !group_fits(group, elements)) {
        return "FP8 groups must be a power of two from " + number(elements) + " to " + number(elements * kWarp) +
               " elements, got " + number(group);
      }
      if (layout != Layout::kRow && !column) return "FP8 group scales come in ROW, COLUMN, COLUMN_TMA or PACKED_UE8M0";
      if (layout == Layout::kPackedUe8m0 && q.round() != ScaleRound::kPow2 && q.round() != ScaleRound::kPow2Log2) {
        return "packed UE8M0 scales are powers of two: use ScaleRound.POW2 or POW2_LOG2";
      }
      break;
    case Format::kInt8:
      if (group != -1 || layout != Layout::kRow) return "INT8 is quantised per token, with scales in ROW";
      return "";
    case Format::kNvfp4:
      if (group != 16) return "NVFP4 has groups of 16, got " + number(group);
      break;
    case Format::kMxfp8:
      if (group != 32) return "MXFP8 has groups of 32, got " + number(group);
      break;
    default:
      return "quant=" + number(c.quant) + " is no packed QuantSpec";
  }
  if (q.format() != Format::kFp8 && (layout < Layout::kSwizzled128x4 || layout > Layout::kLinear)) {
    return "NVFP4 and MXFP8 scales come in SWIZZLED_128X4, SWIZZLED_8X4 or LINEAR";
  }
  if (c.hidden % group) return "hidden size " + number(c.hidden) + " is no multiple of the group " + number(group);
  return "";
}

}  // namespace

std::string check_call(const arf_call& c) {
  if (c.dtype < ARF_BF16 || c.dtype > ARF_FP32) return "dtype must be bf16, fp16 or fp32";
  const int item = item_bytes(c.dtype);
  if (c.tokens < 0 || c.tokens > INT32_MAX) return "token count " + number(c.tokens) + " is out of range";
  if (c.hidden < 1 || c.hidden > ARF_MAX_HIDDEN || c.hidden * item % kVectorBytes) {
    return "hidden size must be at most " + number(ARF_MAX_HIDDEN) + " elements and a multiple of 16 bytes (" +
           number(kVectorBytes / item) + " elements), got " + number(c.hidden);
  }
  if (static_cast<uint32_t>(c.flags) & ~kAllFlags) return "flags has bits that mean nothing: " + number(c.flags);
  if (c.tokens == 0) return ""; /* an empty tensor has no address, so a missing output cannot be told from a given one */
  if (!c.allreduce_out && !c.residual_out && !c.norm_out && !c.quant_out) return "at least one output must be given";
  if (!c.quant && (c.quant_out || c.scale_out)) return "quant_out and scale_out need a quantiser, got quant=0";
  if (c.residual && c.residual_fp32 && c.dtype != ARF_FP32 && !(c.flags & kUnroundedSum)) {
    return "an fp32 residual beside a 16-bit x needs flags UNROUNDED_SUM";
  }
  if (!c.weight && c.weight_bias != 0.0f) return "weight_bias needs a weight";
  if (!std::isfinite(c.epsilon) || c.epsilon < 0) return "epsilon must be finite and not negative";
  if ((c.flags & kDivideByRoot) && (c.flags & kReciprocalRoot)) return "flags DIVIDE_BY_ROOT and RECIPROCAL_ROOT exclude each other";
  if ((c.flags & kAddendLast) && (!c.addend || !c.residual || (c.residual_fp32 && c.dtype != ARF_FP32))) {
    return "flag ADDEND_LAST needs an addend, and a residual of x's dtype";
  }
  if (c.factor_kind < ARF_FACTOR_NONE || c.factor_kind > ARF_FACTOR_ROWS) return "factor_kind must be ARF_FACTOR_*";
  if (c.factor_kind >= ARF_FACTOR_ELEMENT && !c.factor) return "factor is missing";
  if ((c.flags & kAddendScaled) && (!c.addend || !c.factor_kind || c.flags & kAddendLast)) {
    return "flag ADDEND_SCALED needs an addend and a factor, and excludes ADDEND_LAST";
  }
  if ((c.flags & kOneshot) && (c.flags & kTwoshot)) return "flags ONESHOT and TWOSHOT exclude each other";
  if (const std::string problem = check_marks(c); !problem.empty()) return problem;
  if (c.quant) {
    const std::string problem = check_quant(c);
    if (!problem.empty()) return problem;
  }
  const bool nothing_to_read = (c.op == ARF_OP_MOE_FINALIZE && c.permuted_rows == 0) || (c.op != ARF_OP_ALLREDUCE && c.experts == 0);
  if (!c.x && !nothing_to_read) return "x is missing";
  if (c.op == ARF_OP_MOE_REDUCE && (c.experts < 0 || (c.experts > 0 && !c.expert_scale))) return "expert_scale is missing";
  if (c.op == ARF_OP_MOE_FINALIZE && c.experts > 0 && !c.index) return "index is missing";
  const struct { const char* name; const void* p; } vectors[] = {
      {"x", c.x}, {"residual", c.residual}, {"weight", c.weight}, {"allreduce_out", c.allreduce_out},
      {"residual_out", c.residual_out}, {"norm_out", c.norm_out}, {"shared", c.shared}, {"addend", c.addend},
  };
  for (const auto& v : vectors) {
    if (misaligned(v.p)) return std::string(v.name) + " must be 16-byte aligned";
  }
  if (reinterpret_cast<uintptr_t>(c.quant_out) % 8) return "quant_out must be 8-byte aligned";
  const Layout layout = Quant{static_cast<uint32_t>(c.quant)}.layout();
  const int scale_alignment = layout == Layout::kSwizzled128x4 ? 16 : layout == Layout::kLinear ? 1 : 4;
  if (reinterpret_cast<uintptr_t>(c.scale_out) % scale_alignment) {
    return "scale_out must be " + number(scale_alignment) + "-byte aligned";
  }
  if (c.x_stride * item % kVectorBytes || c.residual_stride * (c.residual_fp32 ? 4 : item) % kVectorBytes) {
    return "row strides of x and residual must be multiples of 16 bytes";
  }
  return "";
}

int64_t piece_capacity(int world, int64_t workspace_bytes, int64_t row_bytes, int strategy) {
  const int64_t generation = workspace_bytes / 2 / 256 * 256;
  if (strategy == ARF_ONESHOT) return generation / ((world - 1) * row_bytes);
  return generation / (2 * (world - 1) * row_bytes) * world;
}

namespace {

/* A row over the CTAs of a cluster, where there are multiprocessors to spare (cluster.cuh). */
void split_rows(int64_t tokens, int major, Plan* plan) {
  if (plan->per_thread != 1 || major < 9 || tokens < 1) return;
  const int forced = override_threads.load(std::memory_order_relaxed);
  const int tiles = plan->threads / kWarp;
  int parts = 1;
  if (forced) {
    parts = (plan->threads + forced - 1) / forced;
  } else {
    while (parts < kMaxCluster && tokens * parts * 2 <= kClusterCtas && tiles / (parts * 2) >= kClusterTiles) parts *= 2;
  }
  parts = std::min(parts, kMaxCluster);
  const int tiles_each = (tiles + parts - 1) / parts;
  plan->cluster = (tiles + tiles_each - 1) / tiles_each; /* no part without a tile */
  plan->threads = tiles_each * kWarp;
}

constexpr uint32_t kUncommon = kAddendLast | kDivideByRoot | kReciprocalRoot;
constexpr int kStraightRow = 4, kNearRow = 5; /* of a kernel table */

/* What most models' graphs ask for: tensors of one dtype and a weight; but for what near calls may have (params.h: Calls). */
bool is_usual_norm(const arf_call& c) {
  const bool fp32_beside = c.residual_fp32 || c.residual_out_fp32 || c.weight_fp32 || c.norm_out_fp32;
  return c.op == ARF_OP_ALLREDUCE && c.weight && (c.norm_out || c.quant_out) && !(c.flags & kUncommon) &&
         (c.dtype == ARF_FP32 || !fp32_beside);
}

/* Kernels of their own (template parameter kCalls) do without the branches and registers of everything else. */
bool is_common(const arf_call& c) { return is_usual_norm(c) && !c.addend && !c.factor_kind && !c.epsilon_tensor; }

/* Of a usual norm with the quantiser's family set: a straight call (params.h: Calls), but for what near ones may have. */
bool goes_straight(const arf_call& c, int family) {
  const bool writes = family == kPlain ? c.norm_out && !c.quant_out : family != kDynamic && !c.norm_out;
  return c.dtype != ARF_FP32 && c.residual && c.residual_out && !c.allreduce_out && writes;
}

bool saturates(const arf_call& c) {
  return Quant{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)}.clamp() || cast_saturates.load(std::memory_order_relaxed);
}

/* The FP8 that most models use: static, per token, or groups of 128 with fp32 scales. Layouts differ only in their strides,
 * and a cast that saturates clamps. Common calls know it at compile time. */
bool is_usual(const arf_call& c) {
  const Quant q{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)};
  const int64_t group = (c.quant >> 32) - 1;
  const uint32_t free = Quant::kRule | 3u << 8 /* bound */ | (group ? 15u << 4 : 0) /* layout */ | 3u << 14 /* apply */;
  if (!saturates(c) || ((q.bits | 1u << 18) & ~free) != Quant::kUsual) return false;
  if (group == 0) return true;
  const bool bounded = q.bound() == Bound::kNone || (c.quant_bound >= 0.0f && c.quant_bound <= 0x1p80f);
  return (group == 128 || group == -1) && q.layout() != Layout::kPackedUe8m0 && bounded &&
         q.rule() != ScaleRule::kReciprocal && (q.apply() == Apply::kDivide || q.apply() == Apply::kReciprocal);
}

/* MXFP8 as its callers define it: of the norm as it is written, by a division, without a bound. */
bool is_usual_mx(const arf_call& c) {
  const uint32_t bits = static_cast<uint32_t>(c.quant & 0xFFFFFFFF) & ~(15u << 4 /* layout */ | 1u << 18 /* clamp */);
  return bits == static_cast<uint32_t>(Format::kMxfp8) && (c.quant >> 32) - 1 == 32 && c.dtype != ARF_FP32 && saturates(c);
}

int family_of(const arf_call& c) {
  const Quant q{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)};
  if (q.format() == Format::kNone) return kPlain;
  if (q.format() == Format::kNvfp4) return kFp4;
  return q.format() == Format::kFp8 && (c.quant >> 32) - 1 == 0 ? kStatic : kDynamic;
}

int usual_family(const arf_call& c) {
  if ((c.quant >> 32) - 1 != -1 || c.dtype == ARF_FP32) return kUsual;
  return c.flags & kRoundBeforeWeight ? kTokenRounded : kToken;
}

/* A kernel for CTAs of one row each, or 0. `family` as set_common leaves it. */
int one_row_kernel(const arf_call& c, const Plan& plan) {
  if (!is_usual_norm(c) || !goes_straight(c, plan.family)) return 0;
  if (plan.common && c.weight_bias == 0.0f) return kStraightRow;
  return plan.family == kPlain || (plan.family == kStatic && is_usual(c)) ? kNearRow : 0;
}

/* Among the kernels for common calls there is one static FP8, the usual; the usual dynamic ones have a family of their own. */
void set_common(const arf_call& c, Plan* plan) {
  plan->common = is_common(c) && (plan->family != kStatic || is_usual(c));
  if (plan->common && plan->family == kDynamic) plan->family = is_usual(c) ? usual_family(c) : is_usual_mx(c) ? kMx : kDynamic;
}

/* Whether an output lies in x. In one-shot a row may be finished here before a CTA that only pushes has read it; in two-shot
 * it is not, as its sum contains what was pushed. */
bool writes_x(const arf_call& c) {
  const int item = item_bytes(c.dtype);
  const uintptr_t x = reinterpret_cast<uintptr_t>(c.x);
  const uintptr_t x_end = x + c.tokens * (c.x_stride ? c.x_stride : c.hidden) * item;
  const struct { const void* out; int item; } outputs[] = {
      {c.allreduce_out, item}, {c.residual_out, c.residual_out_fp32 ? 4 : item},
      {c.norm_out, c.norm_out_fp32 ? 4 : item}, {c.quant_out, 1},
  };
  for (const auto& o : outputs) {
    const uintptr_t out = reinterpret_cast<uintptr_t>(o.out);
    if (out && out < x_end && x < out + c.tokens * c.hidden * o.item) return true;
  }
  return false;
}

int weight_bytes(const arf_call& c, const Plan& plan) {
  if (!c.weight || !(c.norm_out || c.quant_out) || plan.common) return 0;
  const bool wide = c.weight_fp32 && c.dtype != ARF_FP32;
  return plan.threads * static_cast<int>(plan.per_thread) * kVectorBytes * (wide ? 2 : 1);
}

}  // namespace

std::string make_plan(int world, int64_t workspace_bytes, const arf_call& c, bool simulated, int major,
                      Plan* plan) {
  const int item = item_bytes(c.dtype);
  const int64_t row_bytes = c.hidden * item;
  plan->vectors = row_bytes / kVectorBytes;
  plan->per_thread = (plan->vectors + kMaxThreads - 1) / kMaxThreads;
  const uint32_t wanted = (plan->vectors + plan->per_thread - 1) / plan->per_thread;
  plan->threads = (wanted + kWarp - 1) / kWarp * kWarp;
  const bool wide = plan->per_thread > 1;
  plan->cluster = 1;
  plan->split = 1;
  plan->pushers = 0;
  plan->rows_each = 1;
  plan->quiet = false;
  plan->common = false;
  plan->one_row = 0;
  plan->family = family_of(c);
  if (world == 1) {
    plan->strategy = ARF_AUTO;
    plan->kernels = kLocal;
    if (!wide) set_common(c, plan);
    plan->kernel_row = wide ? 0 : plan->common ? 2 : 1;
    plan->piece_tokens = c.tokens;
    plan->pieces = c.tokens ? 1 : 0;
    split_rows(c.tokens, major, plan);
    plan->shared_bytes = weight_bytes(c, *plan);
    return "";
  }
  int strategy = c.flags & kOneshot ? ARF_ONESHOT : c.flags & kTwoshot ? ARF_TWOSHOT : ARF_AUTO;
  if (keeps_sharded(c, world, workspace_bytes)) strategy = ARF_SHARDED;
  if (strategy == ARF_AUTO) {
    const int64_t message = c.tokens * row_bytes;
    strategy = message <= oneshot_limit(world, c.hidden) ? ARF_ONESHOT : ARF_TWOSHOT;
    /* A table made for a larger workspace: what does not fit one-shot goes two-shot if that takes fewer pieces. */
    const int64_t one = piece_capacity(world, workspace_bytes, row_bytes, ARF_ONESHOT);
    const int64_t two = piece_capacity(world, workspace_bytes, row_bytes, ARF_TWOSHOT);
    if (strategy == ARF_ONESHOT && one < c.tokens && two > one) strategy = ARF_TWOSHOT;
  }
  const bool blocks = has_blocks(c, world);
  const int64_t chunk = blocks ? block_of(c, world) * world : c.tokens; /* tokens that pieces do not reach beyond */
  if (blocks && (strategy != ARF_SHARDED || chunk < 1 || c.tokens % chunk)) {
    return number(c.tokens) + " tokens are no whole number of blocks of " + number(block_of(c, world)) + " for each of " +
           number(world) + " ranks, in a sharded call";
  }
  if (blocks && c.own_rows && c.own_rows != c.tokens / world) {
    return "a residual, its sum, an addend or a factor has " + number(c.own_rows) + " rows, and " + number(c.tokens) + " tokens are " +
           number(c.tokens / world) + " for each of " + number(world) + " ranks";
  }
  const int64_t capacity = strategy == ARF_SHARDED ? sharded_capacity(c, world, workspace_bytes)
                                                   : piece_capacity(world, workspace_bytes, row_bytes, strategy);
  if (capacity < 1) {
    return "the workspace of " + number(workspace_bytes) + " bytes is too small for one token of " + number(row_bytes) +
           " bytes among " + number(world) + " ranks";
  }
  plan->strategy = strategy;
  plan->pieces = (chunk + capacity - 1) / capacity;
  plan->piece_tokens = plan->pieces ? (chunk + plan->pieces - 1) / plan->pieces : 0;
  if (strategy != ARF_ONESHOT) plan->piece_tokens = std::min(capacity, (plan->piece_tokens + world - 1) / world * world);
  if (blocks) plan->pieces = (chunk + plan->piece_tokens - 1) / plan->piece_tokens * (c.tokens / chunk);
  plan->kernel_row = strategy == ARF_TWOSHOT;
  plan->kernels = simulated ? kSimulated : wide ? kAny : world == 2 ? kTwo : world == 4 ? kFour : world == 8 ? kEight : kAny;
  if (!wide && plan->kernels != kAny) set_common(c, plan);
  if (plan->common) plan->kernel_row += 2;
  if (strategy == ARF_ONESHOT && !wide && plan->kernels != kAny) {
    plan->one_row = one_row_kernel(c, *plan);
  }
  if (strategy == ARF_SHARDED) {
    if (world > 2 && !simulated) plan->common = false, plan->family = family_of(c);
    plan->kernels = kShardedAll;
    plan->kernel_row = simulated           ? plan->common ? kShardedSimulatedCommon : kShardedSimulated
                       : world > 2 || wide ? kShardedAny
                       : plan->common      ? kShardedCommon
                                           : kShardedTwo;
  } else if (strategy == ARF_TWOSHOT) {
    /* A CTA a token while one wave holds them, then fewer: below that the multiprocessors would stand idle. */
    const int64_t rows = (plan->piece_tokens + world - 1) / world;
    if (rows * world <= kSplitCtas) {
      plan->split = world;
    } else {
      while (world % (plan->split * 2) == 0 && rows * plan->split * 2 <= kSplitCtas) plan->split *= 2;
    }
    split_rows(rows * plan->split, major, plan);
  } else {
    split_rows(plan->piece_tokens, major, plan);
  }
  plan->shared_bytes = weight_bytes(c, *plan);
  plan->quiet = world > 2 && plan->piece_tokens > kLoudTokens;
  /* Where a multiprocessor holds one row, its CTA's pushes hold up everything behind them, and rows arrive all at the end. */
  if (c.op == ARF_OP_ALLREDUCE && plan->cluster == 1 && plan->threads > kMaxThreads / 2) {
    if (strategy == ARF_TWOSHOT && plan->piece_tokens >= kTwoshotPushTokens) plan->pushers = kTwoshotPushers;
    if (strategy == ARF_SHARDED && (plan->piece_tokens + world - 1) / world >= kShardedPairs) plan->rows_each = 2;
    if (strategy == ARF_ONESHOT && plan->piece_tokens > kOneshotPushTokens && plan->piece_tokens <= kOneshotPushMost &&
        !writes_x(c)) {
      plan->pushers = kOneshotPushers;
    }
  }
  return "";
}

Piece piece_of(const arf_call& c, const Plan& plan, int world, int64_t index) {
  if (!has_blocks(c, world)) {
    const int64_t first = index * plan.piece_tokens, tokens = std::min(plan.piece_tokens, c.tokens - first);
    return {first, std::max<int64_t>(tokens, 0), 0, first + tokens == c.tokens};
  }
  const int64_t block = block_of(c, world), each = (block * world + plan.piece_tokens - 1) / plan.piece_tokens;
  const int64_t chunk = index / each, row = index % each * (plan.piece_tokens / world);
  return {chunk * block * world + row, std::min(plan.piece_tokens, (block - row) * world), chunk * block + row,
          index + 1 == plan.pieces};
}

Grid grid_of(const Plan& plan, int world, int64_t tokens, int resident, int allowed) {
  const int64_t rows = plan.strategy == ARF_TWOSHOT || plan.strategy == ARF_SHARDED ? (tokens + world - 1) / world * plan.split
                                                                                    : tokens;
  const int forced = override_ctas.load(std::memory_order_relaxed);
  /* A CTA a row even where not all fit at once: 84.7 us against 93.7 for 4096 x 2048 among four in two-shot, 51.8 against
   * 53.9 among two in one-shot. The local kernel has its next row's loads in flight instead. */
  int64_t most = world == 1 ? std::min<int64_t>(resident, kMaxCtas) : kMaxCtas;
  if (forced) most = std::min<int64_t>(forced, kMaxCtas);
  most = std::min<int64_t>(most, allowed) / plan.cluster - plan.pushers;
  most = std::max<int64_t>(most, 1); /* a forced grid, too, has one that finishes rows */
  const int64_t clusters = std::max<int64_t>(1, std::min(most, (rows + plan.rows_each - 1) / plan.rows_each));
  return {static_cast<int>(clusters + plan.pushers) * plan.cluster, static_cast<uint32_t>(rows / clusters),
          static_cast<uint32_t>((rows + clusters - 1) / clusters)};
}

namespace {

template <typename Pointer>
Pointer advance(Pointer p, int64_t bytes) {
  return p ? reinterpret_cast<Pointer>(reinterpret_cast<uintptr_t>(p) + bytes) : nullptr;
}

void fill_quant(const arf_call& c, int64_t first, bool last, Params* p) {
  const int64_t group = (c.quant >> 32) - 1;
  p->quant = Quant{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)};
  p->group = static_cast<int32_t>(group);
  while (group > (int64_t{kVectorBytes / item_bytes(c.dtype)} << p->lane_shift)) ++p->lane_shift;
  (p->quant.bound() == Bound::kScale ? p->scale_bound : p->amax_bound) = p->quant.bound() == Bound::kNone ? 0.0f : c.quant_bound + 0.0f; /* -0.0 becomes 0 */
  p->scale_value = c.scale_value;
  p->scale = c.scale;
  p->scale_dtype = c.scale_dtype;
  const bool nibbles = p->quant.format() == Format::kNvfp4;
  p->quant_out = advance(c.quant_out, nibbles ? first * c.hidden / 2 : first * c.hidden);
  p->scale_out = c.scale_out;
  p->first_token = static_cast<uint32_t>(first);
  p->total_tokens = static_cast<uint32_t>(c.tokens);
  p->groups = static_cast<uint32_t>(group > 0 ? c.hidden / group : 1);
  const uint32_t padded = static_cast<uint32_t>((c.tokens + 3) / 4 * 4);
  bool pads = false;
  switch (p->quant.layout()) {
    case Layout::kColumn:
      p->scale_stride_t = 1, p->scale_stride_g = static_cast<uint32_t>(c.tokens);
      break;
    case Layout::kColumnTma:
    case Layout::kPackedUe8m0:
      p->scale_stride_t = 1, p->scale_stride_g = padded;
      pads = true;
      break;
    case Layout::kSwizzled128x4:
    case Layout::kSwizzled8x4:
      pads = true;
      [[fallthrough]];
    default:
      p->scale_stride_t = p->groups, p->scale_stride_g = 1;
  }
  p->pad = pads && c.scale_out && last;
  p->pad_last = c.scale_pad_last;
}

}  // namespace

void fill_params(const arf_call& c, const Plan& plan, int rank, int world, void* const* buffers, int64_t workspace_bytes,
                 const Piece& piece, ShardedParams* params) {
  *params = {};
  const auto [first, tokens, own, last] = piece;
  const bool blocks = has_blocks(c, world);
  Params* const p = &params->base;
  const int item = item_bytes(c.dtype);
  const int64_t row = c.hidden * item;
  p->rank = rank;
  p->world = world;
  if (world > 1) {
    const bool owned = plan.strategy == ARF_TWOSHOT || plan.strategy == ARF_SHARDED;
    const int64_t rows = owned ? (tokens + world - 1) / world : tokens;
    if (plan.strategy == ARF_SHARDED) {
      params->payload = payload_of(c);
      params->payload.first = static_cast<uint32_t>(rows * row);
      params->row_stride = blocks ? 1 : world;
      params->owner_stride = blocks ? static_cast<uint32_t>(block_of(c, world)) : 1;
      params->rows = static_cast<uint32_t>(rows);
    }
    p->slot_bytes = static_cast<uint32_t>(rows * (row + params->payload.bytes));
    p->generation_bytes = workspace_bytes / 2 / 256 * 256;
    p->own = static_cast<char*>(buffers[rank]);
    for (int i = 0; i < world - 1; ++i) {
      const int peer = (rank + 1 + i) % world;
      p->push[i] = static_cast<char*>(buffers[peer]) + static_cast<int64_t>(slot_of(rank, peer)) * p->slot_bytes;
    }
  }
  p->tokens = blocks ? UINT32_MAX : static_cast<uint32_t>(tokens); /* every row of a block has a token */
  p->vectors = plan.vectors;
  p->per_thread = plan.per_thread;
  p->cluster = plan.cluster;
  p->split = plan.split;
  p->pushers = plan.pushers;
  p->quiet = plan.quiet;
  while (1 << p->split_shift < plan.split) ++p->split_shift;
  p->tiles = (plan.vectors + kWarp - 1) / kWarp;
  p->inverse_hidden = 1.0f / static_cast<float>(c.hidden);
  p->flags = static_cast<uint32_t>(c.flags);
  p->op = c.op;
  p->residual_fp32 = c.residual_fp32 && c.dtype != ARF_FP32;
  p->residual_out_fp32 = c.residual_out_fp32 && c.dtype != ARF_FP32;
  p->weight_fp32 = c.weight_fp32 && c.dtype != ARF_FP32;
  p->norm_out_fp32 = c.norm_out_fp32 && c.dtype != ARF_FP32;
  p->need_norm = c.norm_out || c.quant_out;
  p->cast_saturates = cast_saturates.load(std::memory_order_relaxed);
  p->epsilon = c.epsilon;
  p->weight_bias = c.weight_bias;
  p->weight = c.weight;
  p->allreduce_out = advance(c.allreduce_out, first * row);
  p->residual_out = advance(c.residual_out, first * c.hidden * (c.residual_out_fp32 ? 4 : item));
  p->norm_out = advance(c.norm_out, first * c.hidden * (c.norm_out_fp32 ? 4 : item));
  const int residual_item = c.residual_fp32 ? 4 : item;
  const int64_t residual_stride = (c.residual_stride ? c.residual_stride : c.hidden) * residual_item;
  p->residual = advance(c.residual, first * residual_stride);
  p->addend = advance(c.addend, c.addend_rows ? first * row : 0);
  const int64_t factor_stride = c.factor_kind == ARF_FACTOR_ROWS ? (c.factor_fp32 ? 4 : item) : 0;
  p->factor = advance(c.factor, first * factor_stride);
  if (blocks) { /* of these we have, read and write our own tokens alone */
    const int64_t from = own - rank * block_of(c, world);
    p->residual = advance(c.residual, from * residual_stride);
    p->residual_out = advance(c.residual_out, from * c.hidden * (c.residual_out_fp32 ? 4 : item));
    p->addend = advance(c.addend, c.addend_rows ? from * row : 0);
    p->factor = advance(c.factor, from * factor_stride);
  }
  p->residual_stride = residual_stride / kVectorBytes;
  const int64_t x_stride = (c.x_stride ? c.x_stride : c.hidden) * item;
  p->x_stride = x_stride / kVectorBytes;
  p->x = c.x;
  p->experts = c.experts;
  p->expert_scale = c.expert_scale;
  p->expert_scale_fp32 = c.expert_scale_fp32;
  p->index = c.index;
  p->routed_scaling_factor = c.routed_scaling_factor;
  p->permuted_rows = static_cast<uint32_t>(std::min<int64_t>(c.permuted_rows, int64_t{INT32_MAX} + 1));
  p->expert_stride = static_cast<uint32_t>(c.tokens);
  p->shared = advance(c.shared, first * row);
  p->addend_rows = c.addend_rows;
  p->factor_kind = static_cast<uint8_t>(c.factor_kind);
  p->factor_fp32 = c.factor_fp32 || c.dtype == ARF_FP32;
  p->factor_value = c.factor_value;
  p->epsilon_tensor = c.epsilon_tensor;
  p->epsilon_dtype = static_cast<uint8_t>(c.epsilon_dtype);
  if (c.op == ARF_OP_ALLREDUCE) p->x = advance(c.x, first * x_stride);
  if (c.op == ARF_OP_MOE_REDUCE) {
    p->x = advance(c.x, first * row);
    p->expert_scale = advance(c.expert_scale, first * 4);
  }
  if (c.op == ARF_OP_MOE_FINALIZE) {
    p->index = advance(c.index, first * c.experts * 4);
    p->expert_scale = advance(c.expert_scale, first * c.experts * (c.expert_scale_fp32 ? 4 : item));
  }
  fill_quant(c, first, last, p);
}

void set_cast_saturates(bool saturates) { cast_saturates = saturates; }
bool cast_saturates_now() { return cast_saturates.load(std::memory_order_relaxed); }

void set_launch_override(int threads, int ctas) {
  override_threads = threads;
  override_ctas = ctas;
}

int set_thresholds(const arf_threshold* rows, int count) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  table.store(count > 0 ? new std::vector<arf_threshold>(rows, rows + count) : nullptr, std::memory_order_release);
  return ARF_OK;
}

int get_thresholds(arf_threshold* rows, int capacity) {
  const auto* set = table.load(std::memory_order_acquire);
  const int count = set ? static_cast<int>(set->size()) : static_cast<int>(sizeof kBuiltIn / sizeof *kBuiltIn);
  const arf_threshold* from = set ? set->data() : kBuiltIn;
  std::copy(from, from + std::min(count, capacity), rows);
  return count;
}

}  // namespace arf
