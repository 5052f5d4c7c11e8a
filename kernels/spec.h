/* Mirror of arfusion_pass/ops/spec.py: the values that travel in an op's `flags` and `quant` arguments. A Python test
 * compares arf_spec_constants(), which lists this file's tables, with spec.py. */
#pragma once
#include <stdint.h>

namespace arf {

enum Flags : uint32_t {
  kUnroundedSum = 1u << 0,
  kRoundBeforeWeight = 1u << 1,
  kAddendLast = 1u << 2,
  kDivideByRoot = 1u << 3,
  kReciprocalRoot = 1u << 4,
  kAddendScaled = 1u << 5,
  kOneshot = 1u << 8,
  kTwoshot = 1u << 9,
  kNoPdl = 1u << 10,
  kTriggerEarly = 1u << 11,
  kReference = 1u << 12,
  kFlashinfer = 1u << 13,
  kRecord = 1u << 14, /* never reaches a launch: the binding hands such a call to Python */
  kSharded = 1u << 15,
  kMoeRoundProduct = 1u << 16,
  kMoeRoundPartial = 1u << 17,
  kMoeRoundSum = 1u << 18,
  kMoeRoundScaled = 1u << 19,
  kResidualInSharded = 1u << 20,
  kResidualOutSharded = 1u << 21,
  kOwnerBlocks = 1u << 22,
  kAllFlags = 0x007fbf3fu,
  kRoundingFlags = kUnroundedSum | kRoundBeforeWeight | kAddendLast | kDivideByRoot | kReciprocalRoot | kAddendScaled,
};

enum class Format : uint32_t { kNone = 0, kFp8 = 1, kInt8 = 2, kNvfp4 = 3, kMxfp8 = 4 };

enum class Layout : uint32_t {
  kRow = 0,
  kColumn = 1,
  kColumnTma = 2,
  kPackedUe8m0 = 3,
  kSwizzled128x4 = 4,
  kSwizzled8x4 = 5,
  kLinear = 6,
};

enum class Bound : uint32_t { kNone = 0, kAmax = 1, kScale = 2 };
enum class ScaleRule : uint32_t { kDivide = 0, kMultiply = 1, kReciprocal = 2 };
enum class ScaleRound : uint32_t { kFp32 = 0, kTensor = 1, kPow2 = 2, kPow2Log2 = 3 };
enum class Apply : uint32_t { kDivide = 0, kReciprocal = 1, kMultiply = 2, kMaxOverAmax = 3 };

#if defined(__CUDACC__)
#define ARF_HD __host__ __device__ __forceinline__
#else
#define ARF_HD inline
#endif

/* The low word of a packed QuantSpec; the group travels apart (QuantSpec.pack: bits 32 and up, plus 1). */
struct Quant {
  /* Clamped FP8 by division under fp32 scales, of the norm as it is written; the rule is left open. */
  static constexpr uint32_t kUsual = static_cast<uint32_t>(Format::kFp8) | 1u << 18;
  static constexpr uint32_t kRule = 3u << 10;

  uint32_t bits;
  ARF_HD Format format() const { return Format(bits & 15u); }
  ARF_HD Layout layout() const { return Layout(bits >> 4 & 15u); }
  ARF_HD Bound bound() const { return Bound(bits >> 8 & 3u); }
  ARF_HD ScaleRule rule() const { return ScaleRule(bits >> 10 & 3u); }
  ARF_HD ScaleRound round() const { return ScaleRound(bits >> 12 & 3u); }
  ARF_HD Apply apply() const { return Apply(bits >> 14 & 3u); }
  ARF_HD bool unrounded() const { return bits >> 16 & 1u; }
  ARF_HD bool in_dtype() const { return bits >> 17 & 1u; }
  ARF_HD bool clamp() const { return bits >> 18 & 1u; }
};

}  // namespace arf
