/* What a rank contributes: its row of x, or what a MoE prologue makes of its experts' rows, rounded once to T.
 *
 * moe_reduce:   T(sum over e of expert_x[e, t] * expert_scale[e, t], plus token_input[t])
 * moe_finalize: T(routed_scaling_factor * (sum over k of permuted_x[index[t, k]] * expert_scale[t, k]), plus shared[t])
 * All in fp32 in that order, no fused multiply-add; MOE_ROUND_* flags round in between as spec.py says. */
#pragma once
#include "formats.cuh"

namespace arf {

template <int kDtype>
ARF_DEVICE void accumulate(const Params& p, float (&sum)[kElements<kDtype>], const uint4& row, bool weighted, float weight) {
  float f[kElements<kDtype>];
  unpack<kDtype>(row, f);
#pragma unroll
  for (int i = 0; i < kElements<kDtype>; ++i) {
    float product = weighted ? __fmul_rn(f[i], weight) : f[i];
    if (p.flags & kMoeRoundProduct) product = round_to<kDtype>(product);
    sum[i] = __fadd_rn(sum[i], product);
    if (p.flags & kMoeRoundPartial) sum[i] = round_to<kDtype>(sum[i]);
  }
}

/* Out of line: inlined at every load it doubled the compile time of the kernels, and a decode step waits for the gather's
 * loads anyway. */
template <int kDtype>
__device__ __noinline__ uint4 moe_contribution(const Params& p, uint32_t t, uint32_t v) {
  constexpr int N = kElements<kDtype>;
  const uint4* x = static_cast<const uint4*>(p.x);
  float sum[N] = {};
  if (p.op == ARF_OP_MOE_REDUCE) {
#pragma unroll 4
    for (int e = 0; e < p.experts; ++e) {
      const uint64_t row = static_cast<uint64_t>(e) * p.expert_stride + t;
      accumulate<kDtype>(p, sum, x[row * p.vectors + v], true, static_cast<const float*>(p.expert_scale)[row]);
    }
  } else {
    for (int k = 0; k < p.experts; ++k) {
      const uint64_t at = static_cast<uint64_t>(t) * p.experts + k;
      const int32_t row = p.index[at];
      if (static_cast<uint32_t>(row) >= p.permuted_rows) continue;
      const bool weighted = p.expert_scale != nullptr;
      const float weight = weighted ? load_number(p.expert_scale, at, p.expert_scale_fp32 ? ARF_FP32 : kDtype) : 1.0f;
      accumulate<kDtype>(p, sum, x[static_cast<uint64_t>(row) * p.vectors + v], weighted, weight);
    }
  }
  float shared[N] = {};
  if (p.shared) unpack<kDtype>(static_cast<const uint4*>(p.shared)[static_cast<uint64_t>(t) * p.vectors + v], shared);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (p.flags & kMoeRoundSum) sum[i] = round_to<kDtype>(sum[i]);
    if (p.op == ARF_OP_MOE_FINALIZE && p.routed_scaling_factor != 1.0f) {
      sum[i] = __fmul_rn(sum[i], p.routed_scaling_factor);
      if (p.flags & kMoeRoundScaled) sum[i] = round_to<kDtype>(sum[i]);
    }
    if (p.shared) sum[i] = __fadd_rn(sum[i], shared[i]);
  }
  return pack<kDtype>(sum);
}

/* Vector v of token t. A plain load, not ld.global.nc: outputs may alias x. */
template <int kDtype, bool kCommon>
ARF_DEVICE uint4 contribution(const Params& p, uint32_t t, uint32_t v) {
  if (kCommon || p.op == ARF_OP_ALLREDUCE) return static_cast<const uint4*>(p.x)[t * p.x_stride + v];
  return moe_contribution<kDtype>(p, t, v);
}

}  // namespace arf
