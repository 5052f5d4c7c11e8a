/* Everything after the sum over ranks: residual, RMSNorm, outputs, quantiser. A CTA, or a cluster of them, works on one row at a
 * time; thread i of a CTA holds its vectors i, i + blockDim, ... (`per_thread` of them), so that a warp always holds
 * whole tiles of 32 vectors.
 *
 *   reduced = T(sum)                                              -> allreduce_out
 *   total   = float(reduced) + float(residual)                    -> residual_out, rounded once to its dtype
 *   norm    = value * rsqrt(mean(value^2) + epsilon) * weight     value: total, rounded to T unless UNROUNDED_SUM
 *
 * and, in few calls: a factor of the sum over ranks; an addend before the residual or behind it; each rounded to T before the
 * next; epsilon in memory; a division by the root, or a product with its reciprocal.
 *
 * The mean's summation tree is a function of (hidden, T) alone: squares of a vector by fours, a butterfly over the 32
 * vectors of a tile, tiles i, i + 32, ... in order, a butterfly over those. Thread count, strategy, batch and grid do
 * not appear in it, so a token has the same bits wherever and with whomever it is computed. */
#pragma once
#include "cluster.cuh"
#include "exchange.cuh"
#include "quantise.cuh"

namespace arf {

constexpr int kMaxTiles = ARF_MAX_HIDDEN / 4 / kWarp; /* fp32 */

/* Two copies, used by alternate rows: a row's barrier also says that all are done with the row before the last. */
struct alignas(16) Scratch {
  uint32_t squares[2][kMaxTiles]; /* bits of fp32 */
  uint32_t amax[2][kMaxTiles];
  uint64_t barriers[4]; /* in a cluster: squares, amax, for either parity */
  uint32_t known[4];    /* Epilogue::know */
};

/* A Scratch by its shared-memory address. From the variable itself the compiler works its address out anew at every use,
 * from a special register, some 40 cycles each behind the last arrival. */
struct Shared {
  uint32_t base;

  ARF_DEVICE explicit Shared(const Scratch& scratch) : base(shared_address(&scratch)) {
    asm volatile("" : "+r"(base)); /* nothing; the value is now opaque, so it is kept */
  }
  ARF_DEVICE uint32_t squares(uint32_t parity) const { return base + offsetof(Scratch, squares) + parity * kMaxTiles * 4; }
  ARF_DEVICE uint32_t amax(uint32_t parity) const { return base + offsetof(Scratch, amax) + parity * kMaxTiles * 4; }
  ARF_DEVICE uint32_t barriers(uint32_t i) const { return base + offsetof(Scratch, barriers) + i * 8; }
  ARF_DEVICE uint32_t known() const { return base + offsetof(Scratch, known); }
};

/* Where a thread stands: its CTA's part of the rows, and which row this is for the CTA. */
struct Place {
  Part part;
  uint32_t tiles; /* of a row */
  uint32_t flags; /* the call's */
  uint32_t first; /* first vector of the part */
  uint32_t row;

  ARF_DEVICE uint32_t parity() const { return row & 1u; }
  ARF_DEVICE uint32_t phase() const { return row >> 1 & 1u; } /* of the mbarriers of this parity */
  ARF_DEVICE uint32_t slot(int k) const { return threadIdx.x + k * blockDim.x; } /* of a thread's k-th vector in the CTA */
  ARF_DEVICE uint32_t vector(int k) const { return first + slot(k); }           /* and in the row */
};

extern __shared__ uint4 weight_storage[]; /* the CTA's copy of the weight; each thread reads back what it fetched */

ARF_DEVICE void fetch_async(void* shared, const void* global) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory"); /* past L1, no register */
}

ARF_DEVICE void await_fetches() {
  asm volatile("cp.async.wait_all;" ::: "memory"); /* this thread's cp.async are done and visible to it */
}

ARF_DEVICE float butterfly_sum(float s) {
#pragma unroll
  for (int step = kWarp / 2; step; step >>= 1) s = __fadd_rn(s, __shfl_xor_sync(~0u, s, step));
  return s;
}

/* What a kernel's calls cannot ask for (params.h: Calls) costs it neither a branch nor a register. */
template <int kDtype, int kFamily, int kHeld, int kCalls>
struct Epilogue {
  static constexpr bool kNear = kCalls == kNearCalls;
  static constexpr bool kStraight = kCalls == kStraightCalls || kNear, kCommon = kStraight || kCalls == kCommonCalls;
  static constexpr bool kKnowsEpsilon = kCommon && !kNear;
  static constexpr int N = kElements<kDtype>;
  static constexpr bool kWide = N == 8 && !kCommon; /* an fp32 row beside T takes two 16-byte loads a vector */
  using Q = Quantiser<kDtype>;
  using Row = float[kHeld][N];
  static constexpr bool kOneExchange = kFamily == kToken; /* straight calls per token: find_amax, or a second exchange */
  static constexpr bool kTwoExchanges = kFamily == kTokenRounded;

  struct Residual {
    uint4 a, b;
    uint4 addend; /* of near calls; -0.0, which changes nothing, where there is none, and a factor of 1 */
    float factor;
  };

  ARF_DEVICE static bool has_weight(const Params& p) { return kCommon || p.weight; }
  ARF_DEVICE static bool needs_norm(const Params& p) { return kCommon || p.need_norm; }

  /* Vector v of what is added to token t beside the residual. It and a factor are fetched into L2 with the residual and loaded
   * where they are used, so that calls without them hold no register for them; those of near calls are loaded with it. */
  ARF_DEVICE static const uint4* addend_at(const Params& p, uint32_t t, uint32_t v) {
    return static_cast<const uint4*>(p.addend) + (p.addend_rows ? static_cast<uint64_t>(t) * p.vectors : 0) + v;
  }

  ARF_DEVICE static uint32_t factor_index(const Params& p, uint32_t t) { return p.factor_kind == ARF_FACTOR_ROWS ? t : 0; }

  ARF_DEVICE static void prefetch_rare(const Params& p, uint32_t t, uint32_t v) {
    if (kCommon) return;
    if (p.addend) prefetch(addend_at(p, t, v));
    if (p.factor) prefetch(static_cast<const char*>(p.factor) + factor_index(p, t) * (p.factor_fp32 ? 4 : 16 / N));
  }

  /* The residual of token t at vector v. Plain loads: residual_out may alias it. */
  ARF_DEVICE static Residual load_residual(const Params& p, uint32_t t, uint32_t v, bool holds) {
    Residual r = {};
    if (holds) prefetch_rare(p, t, v);
    if constexpr (kNear) {
      constexpr uint32_t kNegativeZeros = 0x80008000u;
      r.addend = p.addend && holds ? *addend_at(p, t, v) : make_uint4(kNegativeZeros, kNegativeZeros, kNegativeZeros, kNegativeZeros);
      r.factor = p.factor_kind ? factor_of(p, t) : 1.0f;
    }
    if ((kStraight || p.residual) && holds) {
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

  /* Ahead of load_residual by the time of an exchange: from L2 it hides behind the row in front, from memory it does not. */
  ARF_DEVICE static void prefetch_residual(const Params& p, uint32_t t, uint32_t v) {
    prefetch_rare(p, t, v);
    if (p.residual) prefetch(static_cast<const uint4*>(p.residual) + t * p.residual_stride + (kWide && p.residual_fp32 ? 2 * v : v));
  }

  /* The weight of this thread's vectors: of a common call in registers, else in shared memory, from which each thread
   * reads what it fetched. */
  struct Weight {
    uint4 raw;
  };

  /* Starts fetching it; once a launch. */
  ARF_DEVICE static Weight fetch_weight(const Params& p, const Place& at) {
    Weight none = {};
    if (!has_weight(p) || !needs_norm(p)) return none;
    const uint4* weight = static_cast<const uint4*>(p.weight);
    if constexpr (kCommon) {
      return {at.vector(0) < p.vectors ? __ldg(weight + at.vector(0)) : none.raw};
    } else {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        const uint32_t v = at.vector(k), slot = at.slot(k);
        if ((k && k >= p.per_thread) || v >= p.vectors) break;
        if (kWide && p.weight_fp32) {
          fetch_async(weight_storage + 2 * slot, weight + 2 * v);
          fetch_async(weight_storage + 2 * slot + 1, weight + 2 * v + 1);
        } else {
          fetch_async(weight_storage + slot, weight + v);
        }
      }
      return none;
    }
  }

  /* What the epilogue needs once, fetched while the first row is on its way. */
  struct Given {
    Weight weight;
    float epsilon; /* of other common calls than near ones it is a parameter */
    float bias;    /* of near calls: to the weight; -0.0 for none */
    typename Q::Factor factor; /* of static FP8 its scale and how it is applied, of NVFP4 the encode scale */
    uint32_t usual; /* of kUsual: how it quantises */
  };

  ARF_DEVICE static float epsilon(const Params& p) {
    if (!p.epsilon_tensor) return p.epsilon;
    if (p.epsilon_dtype == ARF_FP64) return static_cast<float>(*static_cast<const double*>(p.epsilon_tensor)); /* rounds */
    return load_number(p.epsilon_tensor, 0, p.epsilon_dtype);
  }

  ARF_DEVICE static Given given(const Params& p, const Place& at) {
    Given g = {fetch_weight(p, at), kKnowsEpsilon ? p.epsilon : epsilon(p), 0.0f, {}, 0};
    if constexpr (kNear) g.bias = p.weight_bias != 0.0f ? p.weight_bias : -0.0f;
    if constexpr (kFamily == kStatic) g.factor = Q::static_factor(p, Q::given_scale(p));
    if constexpr (kFamily == kFp4) g.factor = Q::encode_factor(Q::given_scale(p));
    if constexpr (kFamily == kUsual || kTwoExchanges) g.usual = usual(p);
    return g;
  }

  /* How kUsual quantises: scales are products; x is multiplied by 1 / scale; by token. */
  enum Usual : uint32_t { kProduct = 1, kByReciprocal = 2, kByToken = 4 };
  ARF_DEVICE static uint32_t usual(const Params& p) {
    return (p.quant.rule() == ScaleRule::kMultiply ? kProduct : 0) | (p.quant.apply() == Apply::kReciprocal ? kByReciprocal : 0) |
           (p.group < 0 ? kByToken : 0);
  }

  /* What stands behind the last arrival of straight calls, by way of shared memory: the assembler would read it from the
   * parameters there and then, some 40 cycles each, as it sees through every register. A barrier stands between the two. */
  ARF_DEVICE static void tell(const Params& p, Shared scratch) {
    if (!kStraight || threadIdx.x) return;
    store_shared(scratch.known(), p.cluster);
    store_shared(scratch.known() + 4, p.tiles);
    store_shared(scratch.known() + 8, p.flags);
    if constexpr (kFamily == kUsual || kOneExchange || kTwoExchanges) store_shared(scratch.known() + 12, usual(p));
  }
  ARF_DEVICE static void know(Shared scratch, Place& at, Given& given) {
    if constexpr (kStraight) {
      const uint4 known = load_shared_vector(scratch.known());
      at.part.count = known.x, at.tiles = known.y, at.flags = known.z;
      if constexpr (kFamily == kUsual || kTwoExchanges) given.usual = known.w;
    }
  }
  /* With one exchange, read where it is needed: in a register until then it made four ranks spill a word. */
  ARF_DEVICE static uint32_t known_usual(Shared scratch) { return load_shared(scratch.known() + 12); }

  /* Where this thread's part of row t goes: worked out before the row arrives where a thread has one vector. */
  struct Targets {
    void* scale;
    uint4 *total, *norm; /* of straight calls */
    void* codes;         /* of straight calls, but for FP8 per token, which has no registers left */
    uint32_t flags;
    uint32_t holds; /* whether this thread has a vector */
  };

  ARF_DEVICE static Targets targets(const Params& p, const Place& at, uint32_t t) {
    Targets to = {nullptr, nullptr, nullptr, nullptr, at.flags, at.vector(0) < p.vectors};
    if constexpr (kCommon && kFamily >= kDynamic) {
      to.scale = Q::scale_target(p, t, at.vector(0));
      asm volatile("" : "+l"(to.scale)); /* nothing; opaque, as above */
    }
    if constexpr (kStraight) {
      const uint64_t i = static_cast<uint64_t>(t) * p.vectors + at.vector(0);
      to.total = static_cast<uint4*>(p.residual_out) + i;
      asm volatile("" : "+l"(to.total)); /* as above */
      if constexpr (kFamily == kPlain) {
        to.norm = static_cast<uint4*>(p.norm_out) + i;
        asm volatile("" : "+l"(to.norm)); /* as above */
      } else if constexpr (!kOneExchange && !kTwoExchanges) {
        to.codes = codes_at(p, t, at.vector(0));
        asm volatile("" : "+l"(to.codes)); /* as above */
      }
      asm volatile("" : "+r"(to.holds)); /* as above */
    }
    return to;
  }

  /* Before the first row is finished. */
  ARF_DEVICE static void await_weight() {
    if constexpr (!kCommon) await_fetches();
  }

  ARF_DEVICE static void read_weight(const Params& p, const Weight& weight, uint32_t slot, float (&w)[N]) {
    if constexpr (kCommon) {
      unpack<kDtype>(weight.raw, w);
    } else if (kWide && p.weight_fp32) {
      widen(weight_storage[2 * slot], weight_storage[2 * slot + 1], w);
    } else {
      unpack<kDtype>(weight_storage[slot], w);
    }
  }

  ARF_DEVICE static void widen(const uint4& a, const uint4& b, float (&f)[N]) {
    if constexpr (kWide) {
      f[0] = float_of(a.x), f[1] = float_of(a.y), f[2] = float_of(a.z), f[3] = float_of(a.w);
      f[4] = float_of(b.x), f[5] = float_of(b.y), f[6] = float_of(b.z), f[7] = float_of(b.w);
    }
  }

  /* A vector of T. */
  ARF_DEVICE static void store_packed(const Params& p, void* out, uint32_t t, uint32_t v, const uint4& packed) {
    static_cast<uint4*>(out)[static_cast<uint64_t>(t) * p.vectors + v] = packed;
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
    at[i] = pack<kDtype>(f);
  }

  ARF_DEVICE static void add_addend(const Params& p, uint32_t t, uint32_t v, float (&value)[N]) {
    float addend[N];
    unpack<kDtype>(*addend_at(p, t, v), addend);
#pragma unroll
    for (int i = 0; i < N; ++i) value[i] = __fadd_rn(value[i], addend[i]);
  }

  /* What is added and multiplied in front of the residual, but for an addend behind it. */
  ARF_DEVICE static void scale_and_add(const Params& p, uint32_t t, uint32_t v, float (&value)[N]) {
    const bool scaled_last = p.flags & kAddendScaled;
    if (scaled_last) {
      add_addend(p, t, v, value);
      unpack<kDtype>(pack<kDtype>(value), value);
    }
    if (p.factor_kind) {
      const float factor = factor_of(p, t);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = __fmul_rn(value[i], factor);
      unpack<kDtype>(pack<kDtype>(value), value);
    }
    if (p.addend && !scaled_last && !(p.flags & kAddendLast)) {
      add_addend(p, t, v, value);
      if (p.residual) unpack<kDtype>(pack<kDtype>(value), value);
    }
  }

  ARF_DEVICE static uint4 scale_and_add_straight(uint4 reduced, const Residual& r, uint32_t flags) {
    if (flags & kAddendScaled) reduced = add<kDtype>(reduced, r.addend);
    float x[N];
    unpack<kDtype>(reduced, x);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], r.factor);
    reduced = pack<kDtype>(x);
    return flags & kAddendScaled ? reduced : add<kDtype>(reduced, r.addend);
  }

  ARF_DEVICE static float factor_of(const Params& p, uint32_t t) {
    if (p.factor_kind == ARF_FACTOR_VALUE) return p.factor_value;
    return load_number(p.factor, factor_index(p, t), p.factor_fp32 ? ARF_FP32 : kDtype);
  }

  /* From the sum over ranks to the value that the norm reads; writes allreduce_out and residual_out. */
  ARF_DEVICE static void add_residual(const Params& p, uint32_t t, uint32_t v, const uint4& reduced, const Residual& r,
                                      float (&value)[N], const Targets& to) {
    if constexpr (kNear) return add_residual_straight(scale_and_add_straight(reduced, r, to.flags), r.a, value, to);
    if constexpr (kStraight) return add_residual_straight(reduced, r.a, value, to);
    if (p.allreduce_out) store_packed(p, p.allreduce_out, t, v, reduced);
    unpack<kDtype>(reduced, value);
    const bool addend_last = !kCommon && (p.flags & kAddendLast);
    if constexpr (!kCommon) scale_and_add(p, t, v, value);
    if (p.residual) {
      float residual[N];
      if (kWide && p.residual_fp32) {
        widen(r.a, r.b, residual);
      } else {
        unpack<kDtype>(r.a, residual);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = __fadd_rn(value[i], residual[i]);
    }
    if (addend_last) {
      unpack<kDtype>(pack<kDtype>(value), value);
      add_addend(p, t, v, value);
    }
    if constexpr (kCommon) {
      const uint4 total = pack<kDtype>(value); /* for both */
      if (p.residual_out) store_packed(p, p.residual_out, t, v, total);
      if (!(to.flags & kUnroundedSum)) unpack<kDtype>(total, value);
    } else {
      if (p.residual_out) store_vector(p, p.residual_out, p.residual_out_fp32, t, v, value);
      if (!(p.flags & kUnroundedSum)) unpack<kDtype>(pack<kDtype>(value), value);
    }
  }

  /* residual_out in the tensors' own arithmetic: a third of the instructions, and as many registers. */
  ARF_DEVICE static void add_residual_straight(const uint4& reduced, const uint4& residual, float (&value)[N], const Targets& to) {
    const uint4 total = add<kDtype>(reduced, residual);
    *to.total = total;
    if (to.flags & kUnroundedSum) {
      float r[N];
      unpack<kDtype>(reduced, value), unpack<kDtype>(residual, r);
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] = __fadd_rn(value[i], r[i]);
    } else {
      unpack<kDtype>(total, value);
    }
  }

  /* Of a vector: fours in order, added. */
  ARF_DEVICE static float squares(const float (&x)[N]) {
    float s[N / 4];
#pragma unroll
    for (int j = 0; j < N / 4; ++j) {
      s[j] = __fmul_rn(x[4 * j], x[4 * j]);
#pragma unroll
      for (int i = 1; i < 4; ++i) s[j] = __fmaf_rn(x[4 * j + i], x[4 * j + i], s[j]);
    }
    return N == 8 ? __fadd_rn(s[0], s[N / 4 - 1]) : s[0];
  }

  /* Sum of the row's squares, the same in every thread of every part. */
  ARF_DEVICE static float sum_of_squares(const Params& p, Shared scratch, const Place& at, const Row& row) {
    const uint32_t lane = threadIdx.x % kWarp, parity = at.parity();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k && k >= p.per_thread) break;
      float s = butterfly_sum(squares(row[k]));
      const uint32_t tile = at.vector(k) / kWarp;
      deliver(at, scratch.squares(parity) + 4 * word_of(tile), scratch.barriers(parity), tile, bits_of(s));
    }
    meet(scratch.barriers(parity), at);
    if constexpr (kHeld == 1) return few_tiles(scratch.squares(parity));
    float s = 0.0f;
    for (uint32_t tile = lane; tile < p.tiles; tile += kWarp) {
      s = __fadd_rn(s, float_of(load_shared(scratch.squares(parity) + 4 * tile)));
    }
    return butterfly_sum(s);
  }

  /* As sum_of_squares, and beside it the row's largest |value * weight|, NaN if it has one. A thread's only row: the buffer of
   * the other parity is free. */
  ARF_DEVICE static float sum_and_largest(Shared scratch, const Place& at, const Weight& weight, const float (&x)[N], float& largest) {
    const uint32_t lane = threadIdx.x % kWarp, parity = at.parity(), tile = at.vector(0) / kWarp;
    float w[N], most = 0.0f;
    unpack<kDtype>(weight.raw, w);
#pragma unroll
    for (int i = 0; i < N; ++i) most = max_nan(most, fabsf(__fmul_rn(x[i], w[i])));
    const uint32_t of_tile = __reduce_max_sync(~0u, bits_of(most)), s = bits_of(butterfly_sum(squares(x)));
    const bool second = lane & 8;
    const uint32_t word = second ? of_tile : s;
    const uint32_t slot = second ? scratch.amax(!parity) + 4 * tile : scratch.squares(parity) + 4 * word_of(tile);
    deliver<2>(at, slot, scratch.barriers(parity), tile, word);
    meet(scratch.barriers(parity), at);
    largest = float_of(__reduce_max_sync(~0u, lane < at.tiles ? load_shared(scratch.amax(!parity) + 4 * lane) : 0u));
    return few_tiles(scratch.squares(parity));
  }

  /* The largest |T(x * rstd * weight)| of a row from `largest`, its |x * weight|, without the row, where it is certain: the three
   * roundings to fp32 in front of the one to T move it by less than 2^-21 of itself, and by 2^-22 where x * rstd is subnormal
   * under an enormous weight. One bf16 row in some 5,000, one of fp16 in some 700, lies so near a boundary of T. */
  ARF_DEVICE static bool find_amax(float largest, float rstd, float& amax) {
    const float about = __fmul_rn(largest, rstd);
    const float low = __fmaf_rn(about, 1.0f - 0x1p-21f, -0x1p-22f), high = __fmaf_rn(about, 1.0f + 0x1p-21f, 0x1p-22f);
    amax = round_to<kDtype>(high);
    return round_to<kDtype>(low) == amax && amax < 0x1p120f;
  }

  /* Of at most 32 tiles, with zeros for those that are not there, which change no sum: the eight whose numbers are equal
   * modulo 4 lie side by side, so that a thread does the butterfly's first three steps in registers. */
  ARF_DEVICE static uint32_t word_of(uint32_t tile) { return kHeld == 1 ? tile % 4 * 8 + tile / 4 : tile; }

  /* The butterfly's bits: the same pairs are added. */
  ARF_DEVICE static float few_tiles(uint32_t words) {
    const uint32_t from = words + threadIdx.x % 4 * 32;
    const uint4 a = load_shared_vector(from), b = load_shared_vector(from + 16); /* tiles 0, 4, 8, 12; 16, 20, 24, 28; and on */
    const float s0 = __fadd_rn(float_of(a.x), float_of(b.x)), s4 = __fadd_rn(float_of(a.y), float_of(b.y));
    const float s8 = __fadd_rn(float_of(a.z), float_of(b.z)), s12 = __fadd_rn(float_of(a.w), float_of(b.w));
    float s = __fadd_rn(__fadd_rn(s0, s8), __fadd_rn(s4, s12));
    s = __fadd_rn(s, __shfl_xor_sync(~0u, s, 2));
    return __fadd_rn(s, __shfl_xor_sync(~0u, s, 1));
  }

  /* Before the first row; a barrier of the CTA stands between this and few_tiles. */
  ARF_DEVICE static void clear_tiles(const Params& p, Shared scratch) {
    if constexpr (kHeld == 1) {
      if (threadIdx.x < p.tiles || threadIdx.x >= kWarp) return;
      for (uint32_t parity = 0; parity < 2; ++parity) store_shared(scratch.squares(parity) + 4 * word_of(threadIdx.x), 0);
    }
  }

  /* The row's largest magnitude, NaN if it has one, from those of this thread's vectors; in whatever order. */
  template <class AmaxOf>
  ARF_DEVICE static float row_amax(const Params& p, Shared scratch, const Place& at, const AmaxOf& amax_of) {
    const uint32_t lane = threadIdx.x % kWarp, parity = at.parity();
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k && k >= p.per_thread) break;
      const uint32_t amax = __reduce_max_sync(~0u, amax_of(k));
      const uint32_t tile = at.vector(k) / kWarp;
      deliver(at, scratch.amax(parity) + 4 * tile, scratch.barriers(2 + parity), tile, amax);
    }
    meet(scratch.barriers(2 + parity), at);
    uint32_t amax = 0;
    if constexpr (kHeld == 1) {
      if (lane < at.tiles) amax = load_shared(scratch.amax(parity) + 4 * lane);
    } else {
      for (uint32_t tile = lane; tile < p.tiles; tile += kWarp) amax = max(amax, load_shared(scratch.amax(parity) + 4 * tile));
    }
    return float_of(__reduce_max_sync(~0u, amax));
  }

  /* A tile's word, or two (publish), to `slot` wherever the row is worked on, and the wait for all of them. In a cluster
   * per_thread is 1. */
  template <uint32_t kWords = 1>
  ARF_DEVICE static void deliver(const Place& at, uint32_t slot, uint32_t barrier, uint32_t tile, uint32_t word) {
    if (at.part.count > 1) {
      publish<kWords>(slot, barrier, word, tile < at.tiles, kWords * at.tiles, at.part);
    } else if ((threadIdx.x % kWarp & ~(8 * (kWords - 1))) == 0) {
      store_shared(slot, word);
    }
  }

  ARF_DEVICE static void meet(uint32_t barrier, const Place& at) {
    if (at.part.count > 1) {
      await_published(barrier, at.phase());
    } else {
      __syncthreads();
    }
  }

  /* What a row is multiplied by; with kDivideByRoot divided by. rsqrtf: 2 ulp, half of what an fp32 norm may be off. */
  ARF_DEVICE static float rstd_of(const Params& p, float spread) {
    if (kCommon || !(p.flags & (kDivideByRoot | kReciprocalRoot))) return __frsqrt_rn(spread);
    const float root = __fsqrt_rn(spread);
    return p.flags & kDivideByRoot ? root : __frcp_rn(root);
  }

  /* Normalises a vector in place, writes norm_out, and leaves what the quantiser reads. */
  ARF_DEVICE static void normalise(const Params& p, const Given& given, uint32_t t, uint32_t v, uint32_t slot, float rstd,
                                   float (&x)[N], const Targets& to) {
    const bool round_first = p.flags & kRoundBeforeWeight;
    if (!kCommon && (p.flags & kDivideByRoot)) {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fdiv_rn(x[i], rstd);
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], rstd);
    }
    if (round_first) unpack<kDtype>(pack<kDtype>(x), x);
    if (has_weight(p)) {
      float w[N];
      read_weight(p, given.weight, slot, w);
      if (p.weight_bias != 0.0f) { /* not for 0: -0.0 + 0 is +0.0 */
#pragma unroll
        for (int i = 0; i < N; ++i) w[i] = __fadd_rn(w[i], p.weight_bias);
      }
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], w[i]);
      /* A T weight without bias multiplies in T (Hugging Face Llama's second rounding). */
      if (round_first && (kCommon || !p.weight_fp32) && p.weight_bias == 0.0f) unpack<kDtype>(pack<kDtype>(x), x);
    }
    if (p.norm_out) store_vector(p, p.norm_out, p.norm_out_fp32, t, v, x);
    if (kFamily != kPlain && !p.quant.unrounded()) unpack<kDtype>(pack<kDtype>(x), x);
  }

  /* One rounding behind the product serves norm_out, the quantiser and a model's second rounding alike. */
  ARF_DEVICE static uint4 normalise_straight(const Given& given, float rstd, float (&x)[N], const Targets& to) {
    uint4 weight = given.weight.raw;
    /* Nothing; but not unpacked before the row arrives, where eight registers more made static FP8 spill one. It was read back
     * behind the acquire of the row's sum, which empties L1: 0.25 us. */
    asm volatile("" : "+r"(weight.x), "+r"(weight.y), "+r"(weight.z), "+r"(weight.w));
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], rstd);
    const bool round_first = kTwoExchanges || (!kOneExchange && to.flags & kRoundBeforeWeight);
    if constexpr (kNear) return multiply_near(given.bias, weight, round_first, x);
    if (round_first) return multiply<kDtype>(pack<kDtype>(x), weight);
    float w[N];
    unpack<kDtype>(weight, w);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], w[i]);
    return pack<kDtype>(x);
  }

  /* With a bias the product is of fp32, whatever is rounded before; without one the product of two values of T is, as in T. */
  ARF_DEVICE static uint4 multiply_near(float bias, const uint4& weight, bool round_first, float (&x)[N]) {
    if (round_first) unpack<kDtype>(pack<kDtype>(x), x);
    float w[N];
    unpack<kDtype>(weight, w);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = __fmul_rn(x[i], __fadd_rn(w[i], bias));
    return pack<kDtype>(x);
  }

  /* A straight call's norm to where it goes, as it is or quantised; all threads call. */
  ARF_DEVICE static void write_straight(const Params& p, Shared scratch, const Place& at, const Given& given, uint32_t t,
                                        const uint4& norm, const Targets& to) {
    float x[N];
    if constexpr (kFamily != kPlain) unpack<kDtype>(norm, x);
    if constexpr (kFamily == kPlain) {
      if (to.holds) *to.norm = norm;
    } else if constexpr (kFamily == kStatic) {
      if (to.holds) Q::usual_static_vector(to.codes, x, given.factor);
    } else if constexpr (kFamily == kFp4) {
      const uint32_t amax = Q::template few_lanes_amax<Q::kFp4Lanes>(largest_magnitude<kDtype>(norm));
      if (to.holds) Q::nvfp4_vector(float_of(amax), to.scale, to.codes, x, given.factor);
    } else if constexpr (kFamily == kMx) {
      const uint32_t amax = Q::template few_lanes_amax<Q::kMxLanes>(largest_magnitude<kDtype>(norm));
      if (to.holds) Q::mx_vector(amax, to.scale, to.codes, x);
    } else {
      const uint32_t own = max(largest_magnitude<kDtype>(norm), bits_of(p.amax_bound));
      const float amax = kTwoExchanges ? row_amax(p, scratch, at, [&](int) { return own; }) : Q::usual_amax(own);
      if (to.holds) {
        Q::usual_vector(given.usual & kProduct, given.usual & kByReciprocal, amax, p.scale_bound, to.scale,
                        kTwoExchanges ? codes_at(p, t, at.vector(0)) : to.codes, x);
      }
    }
  }

  /* The end of a straight call's row with a scale a token, where one exchange among its threads settles all but a few rows. Where
   * the norm is rounded before the weight too, two elements may change places: kTwoExchanges. */
  ARF_DEVICE static void finish_token(const Params& p, Shared scratch, const Place& at, const Given& given, uint32_t t, float largest,
                                      float rstd, Row& row, const Targets& to) {
    float amax;
    const bool certain = find_amax(largest, rstd, amax);
    const uint32_t usual = known_usual(scratch);
    uint4 norm = {};
    if (to.holds) norm = normalise_straight(given, rstd, row[0], to);
    if (!certain) amax = row_amax(p, scratch, at, [&](int) { return largest_magnitude<kDtype>(norm); });
    if (!to.holds) return;
    float x[N];
    unpack<kDtype>(norm, x);
    Q::usual_vector(usual & kProduct, usual & kByReciprocal, float_of(max(bits_of(amax), bits_of(p.amax_bound))), p.scale_bound,
                    to.scale, codes_at(p, t, at.vector(0)), x);
  }

  /* Norm and quantiser of row t; all threads call. Lanes without a vector hold zeros. */
  ARF_DEVICE static void norm_and_quantise(const Params& p, Shared scratch, const Place& at, const Given& given, uint32_t t,
                                           Row& row, const Targets& to) {
    if (!needs_norm(p)) return;
    float sum, largest;
    if constexpr (kOneExchange) {
      sum = sum_and_largest(scratch, at, given.weight, row[0], largest);
    } else {
      sum = sum_of_squares(p, scratch, at, row);
    }
    const float mean = __fmul_rn(sum, p.inverse_hidden);
    if (at.row == 0) stamp(kReduced);
    const float rstd = rstd_of(p, __fadd_rn(mean, kKnowsEpsilon ? p.epsilon : given.epsilon));
    if constexpr (kOneExchange) {
      finish_token(p, scratch, at, given, t, largest, rstd, row, to);
    } else if constexpr (kStraight) {
      uint4 norm = {};
      if (to.holds) norm = normalise_straight(given, rstd, row[0], to);
      write_straight(p, scratch, at, given, t, norm, to);
    } else {
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (k && k >= p.per_thread) break;
        if (k ? at.vector(k) < p.vectors : to.holds) normalise(p, given, t, at.vector(k), at.slot(k), rstd, row[k], to);
      }
      if constexpr (kFamily != kPlain) quantise(p, scratch, at, given, t, row, to);
    }
  }

  ARF_DEVICE static void* codes_at(const Params& p, uint32_t t, uint32_t v) {
    return Q::codes_at(p, t, v, kFamily == kFp4 ? N / 2 : N);
  }

  /* The quantiser alone, of a row as it reads it; all threads call. */
  ARF_DEVICE static void quantise(const Params& p, Shared scratch, const Place& at, const Given& given, uint32_t t, Row& row,
                                  const Targets& to) {
    void* scale_at = to.scale;
    typename Q::Factor factor = given.factor;
    const bool by_token = kFamily == kUsual ? given.usual & kByToken : kFamily == kDynamic && p.group < 0;
    float token_scale = 0.0f;
    const auto amax_of = [&](int k) { return Q::amax_of(row[k]); };
    if (kFamily == kDynamic && by_token) token_scale = Q::dynamic_scale(p, p.quant, row_amax(p, scratch, at, amax_of), factor);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (k && k >= p.per_thread) break;
      const uint32_t v = at.vector(k);
      const bool active = k ? v < p.vectors : to.holds;
      if constexpr (kFamily >= kDynamic && !kCommon) scale_at = Q::scale_target(p, t, v);
      if constexpr (kFamily == kUsual) {
        const uint32_t bound = bits_of(p.amax_bound);
        const float amax = by_token ? float_of(max(bits_of(row_amax(p, scratch, at, amax_of)), bound))
                                    : Q::usual_amax(max(Q::amax_of(row[k]), bound));
        if (active) {
          Q::usual_vector(given.usual & kProduct, given.usual & kByReciprocal, amax, p.scale_bound, scale_at, codes_at(p, t, v),
                          row[k]);
        }
      } else if constexpr (kFamily == kFp4) {
        const float amax = Q::lanes_amax(Q::amax_of(row[k]), Q::kFp4Lanes);
        if (active) Q::nvfp4_vector(amax, scale_at, codes_at(p, t, v), row[k], factor);
      } else if constexpr (kFamily == kStatic && kCommon) {
        if (active) Q::usual_static_vector(codes_at(p, t, v), row[k], factor);
      } else if (kFamily == kStatic || by_token) {
        if (active) Q::store_bytes(p, p.quant, t, v, row[k], factor);
        if (by_token && scale_at) store_float(scale_at, token_scale);
      } else {
        Q::group_vector(p, scale_at, t, v, active, row[k]);
      }
    }
  }
};

}  // namespace arf
