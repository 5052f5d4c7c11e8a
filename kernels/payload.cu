/* When a residual is kept sharded, and what then crosses the link behind the owner of a token (sharded.cuh). Host code. */
#include <atomic>
#include <mutex>
#include <vector>

#include "plan.h"

namespace arf {
namespace {

constexpr int64_t kNever = int64_t{1} << 62;

/* Kept sharded from this message on, tokens * hidden * itemsize, where a chain's marks allow it: where neither a norm alone nor
 * a quantiser is slower (benchmarks/results/sharded.md). Narrower rows and other worlds were not measured. */
const arf_threshold kBuiltIn[] = {{2, 0, kNever}, {2, 2048, 2 << 20}};
std::mutex table_mutex;
/* Replaced whole and never freed, so that a launch reads it without a lock. */
std::atomic<const std::vector<arf_threshold>*> table{nullptr};

int64_t smallest_message(int world, int64_t hidden) {
  const auto* rows = table.load(std::memory_order_acquire);
  const int64_t found = rows ? search_thresholds(rows->data(), rows->size(), world, hidden) : -1;
  if (found >= 0) return found;
  const int64_t built_in = search_thresholds(kBuiltIn, sizeof kBuiltIn / sizeof *kBuiltIn, world, hidden);
  return built_in >= 0 ? built_in : kNever;
}

uint32_t up(int64_t bytes, int64_t to) { return static_cast<uint32_t>((bytes + to - 1) / to * to); }

/* More than any call sends of a row, in rows of x: norm and residual in fp32 beside a 16-bit x, codes, a scale for eight. */
constexpr int64_t kMostPayload = 6;

}  // namespace

bool keeps_sharded(const arf_call& c, int world, int64_t workspace_bytes) {
  if (!(c.flags & (kResidualInSharded | kResidualOutSharded)) || c.flags & (kOneshot | kTwoshot)) return false;
  if (c.flags & kOwnerBlocks) return true; /* no chain's member */
  /* Nothing here may depend on what the call writes: the members of a chain write different things. */
  const int64_t row = c.hidden * item_bytes(c.dtype);
  if (workspace_bytes / 2 < (world - 1) * (1 + kMostPayload) * row + 256) return false;
  if (c.flags & kSharded) return true;
  /* Wider rows take the kernels for any world, which were not measured. */
  return row <= kMaxThreads * kVectorBytes && c.tokens * row >= smallest_message(world, c.hidden);
}

std::string check_marks(const arf_call& c) {
  if (c.flags & kSharded && c.flags & (kOneshot | kTwoshot)) return "flags SHARDED and ONESHOT or TWOSHOT exclude each other";
  if (c.flags & kOwnerBlocks && (~c.flags & (kSharded | kResidualInSharded | kResidualOutSharded))) {
    return "flag OWNER_BLOCKS needs SHARDED and both RESIDUAL_*_SHARDED";
  }
  const bool marked = c.flags & (kResidualInSharded | kResidualOutSharded);
  if (marked && (c.addend || c.factor_kind > ARF_FACTOR_VALUE) && !(c.flags & kOwnerBlocks)) {
    return "a residual may be sharded without an addend, or a factor in memory, only";
  }
  if (!marked || (!c.allreduce_out && (c.norm_out || c.quant_out))) return "";
  return "a residual may be sharded beside norm_out or quant_out, and without allreduce_out";
}

Payload payload_of(const arf_call& c) {
  Payload payload = {};
  const int item = item_bytes(c.dtype), norm_item = c.norm_out_fp32 ? 4 : item;
  const Quant q{static_cast<uint32_t>(c.quant & 0xFFFFFFFF)};
  const int64_t group = (c.quant >> 32) - 1;
  const bool nibbles = q.format() == Format::kNvfp4, int8 = q.format() == Format::kInt8;
  payload.norm = c.norm_out;
  payload.total = c.residual_out && !(c.flags & kResidualOutSharded);
  /* Who has the norm quantises it for himself, unless the quantiser reads more of it than was written. */
  payload.codes = c.quant_out && (!c.norm_out || (q.unrounded() && norm_item < 4));
  payload.marks = payload.codes && (nibbles || int8 || (!q.clamp() && !cast_saturates_now()));
  int64_t end = payload.norm ? c.hidden * norm_item : 0;
  payload.total_at = static_cast<uint32_t>(end);
  if (payload.total) end += c.hidden * (c.residual_out_fp32 ? 4 : item);
  payload.codes_at = static_cast<uint32_t>(end);
  if (payload.codes) end = up(end + (nibbles ? c.hidden / 2 : c.hidden), 8);
  payload.scales_at = static_cast<uint32_t>(end);
  const int64_t groups = group > 0 ? c.hidden / group : 1;
  if (payload.codes && c.scale_out) end = up(end + (nibbles ? (groups + 3) / 4 : groups) * 4, 8);
  payload.marks_at = static_cast<uint32_t>(end);
  const int64_t vectors = c.hidden * item / kVectorBytes, tiles = (vectors + kWarp - 1) / kWarp;
  if (payload.marks) end += tiles * (nibbles || c.dtype == ARF_FP32 ? 8 : 16);
  payload.bytes = up(end, kVectorBytes);
  return payload;
}

int64_t sharded_capacity(const arf_call& c, int world, int64_t workspace_bytes) {
  const int64_t generation = workspace_bytes / 2 / 256 * 256, row = c.hidden * item_bytes(c.dtype);
  return generation / ((world - 1) * (row + payload_of(c).bytes)) * world;
}

int set_sharded_thresholds(const arf_threshold* rows, int count) {
  const std::lock_guard<std::mutex> lock(table_mutex);
  table.store(count > 0 ? new std::vector<arf_threshold>(rows, rows + count) : nullptr, std::memory_order_release);
  return ARF_OK;
}

int get_sharded_thresholds(arf_threshold* rows, int capacity) {
  const auto* set = table.load(std::memory_order_acquire);
  const int count = set ? static_cast<int>(set->size()) : static_cast<int>(sizeof kBuiltIn / sizeof *kBuiltIn);
  const arf_threshold* from = set ? set->data() : kBuiltIn;
  for (int i = 0; i < count && i < capacity; ++i) rows[i] = from[i];
  return count;
}

}  // namespace arf
