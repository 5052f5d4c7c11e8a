/* Everything after the sum over ranks: residual, RMSNorm, outputs, quantiser. A CTA works on one row at a time; thread i
 * holds vectors i, i + blockDim, ... (`per_thread` of them), so that a warp always holds whole tiles of 32 vectors.
 *
 *   reduced = T(sum)                                              -> allreduce_out
 *   total   = float(reduced) + float(residual)                    -> residual_out, rounded once to its dtype
 *   norm    = value * rsqrt(mean(value^2) + epsilon) * weight     value: total, rounded to T unless UNROUNDED_SUM
 *
 * The mean's summation tree is a function of (hidden, T) alone: squares of a vector in order, a butterfly over the 32
 * vectors of a tile, tiles i, i + 32, ... in order, a butterfly over those. Thread count, strategy, batch and grid do
 * not appear in it, so a token has the same bits wherever and with whomever it is computed. */
#pragma once
#include "quantise.cuh"

namespace arf {

constexpr int kMaxTiles = ARF_MAX_HIDDEN / 4 / kWarp; /* fp32 */

/* Two copies, used by alternate rows: a row's barrier also says that all are done with the row before the last. */
struct Scratch {
  float squares[2][kMaxTiles];
  float amax[2][kMaxThreads / kWarp];
};

extern __shared__ uint4 weight_storage[]; /* the CTA's copy of the weight; each thread reads back what it fetched */

ARF_DEVICE void fetch_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory"); /* past L1, no register */
}

ARF_DEVICE void await_fetches() {
  asm volatile("cp.async.wait_all;" ::: "memory"); /* this thread's cp.async are done and visible to it */
}

ARF_DEVICE float butterfly_sum(float s, uint32_t span) {
  for (uint32_t step = span >> 1; step; step >>= 1) s = __fadd_rn(s, __shfl_xor_sync(~0u, s, step));
  return s;
}

template <int D, int F, int K>
struct Epilogue {
  static constexpr int N = kElements<D>;
  static constexpr bool kWide = N == 8; /* an fp32 row beside T takes two 16-byte loads a vector */
  using Q = Quantiser<D>;
  using Row = float[K][N];

  struct Residual {
    uint4 a, b;
  };

  /* The residual of token t at vector v. Plain loads: residual_out may alias it. */
  ARF_DEVICE static Residual load_residual(const Params& p, uint32_t t, uint32_t v) {
    Residual r = {};
    if (p.residual) {
      const uint4* row = static_cast<const uint4*>(p.residual) + t * p.residual_stride;
      if (kWide && p.residual_fp32) {
        r.a = row[2 * v];
        r.b = row[2 * v + 1];
      } else {
        r.a = row[v];
      }
    }
    return r;
  }

  /* Starts fetching the weight of this thread's vectors; once a launch. */
  ARF_DEVICE static void fetch_weight(const Params& p) {
    if (!p.weight || !p.need_norm) return;
    const uint4* weight = static_cast<const uint4*>(p.weight);
    for (uint32_t v = threadIdx.x; v < p.vectors; v += blockDim.x) {
      if (kWide && p.weight_fp32) {
        fetch_async(weight_storage + 2 * v, weight + 2 * v);
        fetch_async(weight_storage + 2 * v + 1, weight + 2 * v + 1);
      } else {
        fetch_async(weight_storage + v, weight + v);
      }
    }
  }

  ARF_DEVICE static void read_weight(const Params& p, uint32_t v, float (&w)[N]) {
    if (kWide && p.weight_fp32) {
      widen(weight_storage[2 * v], weight_storage[2 * v + 1], w);
    } else {
      unpack<D>(weight_storage[v], w);
    }
  }

  ARF_DEVICE static void widen(const uint4& a, const uint4& b, float (&f)[N]) {
    if constexpr (kWide) {
      f[0] = float_of(a.x), f[1] = float_of(a.y), f[2] = float_of(a.z), f[3] = float_of(a.w);
      f[4] = float_of(b.x), f[5] = float_of(b.y), f[6] = float_of(b.z), f[7] = float_of(b.w);
    }
  }

  /* A vector of a T or fp32 output. */
  ARF_DEVICE static void store_vector(const Params& p, void* out, bool fp32, uint32_t t, uint32_t v, const float (&f)[N]) {
    uint4* at = static_cast<uint4*>(out);
    const uint64_t i = static_cast<uint64_t>(t) * p.vectors + v;
    if constexpr (kWide) {
      if (fp32) {
        at[2 * i] = make_uint4(bits_of(f[0]), bits_of(f[1]), bits_of(f[2]), bits_of(f[3]));
        at[2 * i + 1] = make_uint4(bits_of(f[4]), bits_of(f[5]), bits_of(f[6]), bits_of(f[7]));
        return;
      }
    }
    at[i] = pack<D>(f);
  }

  /* From the fp32 sum over ranks to the value that the norm reads; writes allreduce_out and residual_out. */
  ARF_DEVICE static void finish_sum(const Params& p, uint32_t t, uint32_t v, const float (&sum)[N], const Residual& r,
                                    float (&value)[N]) {
    const uint4 reduced = pack<D>(sum);
    if (p.allreduce_out) static_cast<uint4*>(p.allreduce_out)[static_cast<uint64_t>(t) * p.vectors + v] = reduced;
    unpack<D>(reduced, value);
    if (p.residual) {
      float residual[N];
      if (kWide && p.residual_fp32) {
        widen(r.a, r.b, residual);
      } else {
        unpack<D>(r.a, residual);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = __fadd_rn(value[i], residual[i]);
    }
    if (p.residual_out) store_vector(p, p.residual_out, p.residual_out_fp32, t, v, value);
    if (!(p.flags & kUnroundedSum)) unpack<D>(pack<D>(value), value);
  }

  /* Sum of the row's squares, the same in every thread. */
  ARF_DEVICE static float sum_of_squares(const Params& p, Scratch& scratch, uint32_t parity, const Row& row) {
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k && k >= p.per_thread) break;
      float s = 0.0f;
#pragma unroll
      for (int i = 0; i < N; ++i) s = __fmaf_rn(row[k][i], row[k][i], s);
      s = butterfly_sum(s, kWarp);
      if (lane == 0) scratch.squares[parity][k * warps + warp] = s;
    }
    __syncthreads();
    float s = 0.0f;
    for (uint32_t tile = lane & (p.tile_span - 1); tile < p.tiles; tile += kWarp) {
      s = __fadd_rn(s, scratch.squares[parity][tile]);
    }
    return butterfly_sum(s, p.tile_span);
  }

  /* The row's largest magnitude, NaN if it has one. The order does not matter to a maximum. */
  ARF_DEVICE static float row_amax(const Params& p, Scratch& scratch, uint32_t parity, const Row& row) {
    const uint32_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    float amax = Q::amax_of(row[0]);
#pragma unroll
    for (int k = 1; k < K; ++k) {
      if (k < p.per_thread) amax = max_nan(amax, Q::amax_of(row[k]));
    }
#pragma unroll
    for (int step = kWarp / 2; step; step >>= 1) amax = max_nan(amax, __shfl_xor_sync(~0u, amax, step));
    if (lane == 0) scratch.amax[parity][warp] = amax;
    __syncthreads();
    amax = lane < warps ? scratch.amax[parity][lane] : 0.0f;
#pragma unroll
    for (int step = kWarp / 2; step; step >>= 1) amax = max_nan(amax, __shfl_xor_sync(~0u, amax, step));
    return amax;
  }

  /* Normalises a vector in place, writes norm_out, and leaves what the quantiser reads. */
  ARF_DEVICE static void normalise(const Params& p, uint32_t t, uint32_t v, float rstd, float (&x)[N]) {
    const bool round_first = p.flags & kRoundBeforeWeight;
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], rstd);
    if (round_first) unpack<D>(pack<D>(x), x);
    if (p.weight) {
      float w[N];
      read_weight(p, v, w);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (p.weight_bias != 0.0f) w[i] = __fadd_rn(w[i], p.weight_bias); /* not for 0: -0.0 + 0 is +0.0 */
        x[i] = __fmul_rn(x[i], w[i]);
      }
      /* A T weight without bias multiplies in T (Hugging Face Llama's second rounding). */
      if (round_first && !p.weight_fp32 && p.weight_bias == 0.0f) unpack<D>(pack<D>(x), x);
    }
    if (p.norm_out) store_vector(p, p.norm_out, p.norm_out_fp32, t, v, x);
    if (F != kPlain && !p.quant.unrounded()) unpack<D>(pack<D>(x), x);
  }

  /* Norm and quantiser of row t; all threads call. Lanes without a vector hold zeros. given: the scale input. */
  ARF_DEVICE static void finish_row(const Params& p, Scratch& scratch, uint32_t parity, uint32_t t, Row& row, float given) {
    if (!p.need_norm) return;
    const float mean = __fdiv_rn(sum_of_squares(p, scratch, parity, row), p.hidden);
    const float rstd = __frsqrt_rn(__fadd_rn(mean, p.epsilon)); /* rsqrtf: 2 ulp, half of what an fp32 norm may be off */
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k && k >= p.per_thread) break;
      const uint32_t v = threadIdx.x + k * blockDim.x;
      if (v < p.vectors) normalise(p, t, v, rstd, row[k]);
    }
    if constexpr (F == kPlain) return;
    typename Q::Factor factor = {};
    if constexpr (F == kStatic) factor = Q::static_factor(p, given);
    const bool by_token = F == kDynamic && p.group < 0;
    if (by_token) {
      const float scale = Q::dynamic_scale(p, row_amax(p, scratch, parity, row), factor);
      if (threadIdx.x == 0) store_scale(p, t, 0, scale);
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (k && k >= p.per_thread) break;
      const uint32_t v = threadIdx.x + k * blockDim.x;
      const bool active = v < p.vectors;
      if constexpr (F == kFp4) {
        Q::nvfp4_vector(p, t, v, active, row[k], given);
      } else if (F == kStatic || by_token) {
        if (active) Q::store_bytes(p, t, v, row[k], factor);
      } else {
        Q::group_vector(p, t, v, active, row[k]);
      }
    }
  }
};

}  // namespace arf
