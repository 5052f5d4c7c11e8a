/* The quantisers, on the vectors a thread holds: step by step what arfusion_pass/ops/quantisers.py computes.
 *
 * Every division is IEEE, no multiply-add is fused, nothing is flushed to zero: codes and scales are bit-equal to the
 * reference applied to the same norm. The spec's fields are uniform over a launch, so its branches never diverge, but behind
 * the last arrival each costs up to 0.05 us: the usual specs (plan.cu: is_usual) and NVFP4 have functions almost without. */
#pragma once
#include "layouts.cuh"

namespace arf {

constexpr float kFp8Max = 448.0f;
constexpr float kInt8Max = 127.0f;

template <int kDtype>
struct Quantiser {
  static constexpr int N = kElements<kDtype>;
  static constexpr uint32_t kUsualGroup = 128;

  /* How a scale meets a value: x / value, or x * value. */
  struct Factor {
    float value;
    bool divide;
    float reciprocal = 0.0f; /* 1 / value, of a scale that is given: worked out before the row arrives */
  };

  /* The spec's branches stand outside the loops over elements: inside, eight of them in a row cost 0.8 us a row. */
  ARF_DEVICE static void apply(Quant q, const float (&x)[N], Factor f, float (&y)[N]) {
    if (f.divide) {
      divide_all(x, f.value, y);
    } else {
      multiply_all(x, f.value, y);
    }
    if (q.in_dtype()) unpack<kDtype>(pack<kDtype>(y), y);
  }

  ARF_DEVICE static void multiply_all(const float (&x)[N], float factor, float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) y[i] = __fmul_rn(x[i], factor);
  }

  /* Correctly rounded x / s for all x under one s, without a division an element: Newton's correction of x * (1 / s),
   * twice, is what the compiler's division does, which checks its range for each element instead of once for s. Within
   * |s| in [2^-90, 2^90] the remainders are exact unless |x| < 2^-102; then the quotient is under 2^-12, which every
   * format rounds to its zero. A quotient beyond 2^100, inf and NaN included, saturates (or turns NaN) uncorrected, and
   * one under 2^-100 is left alone as well: -0.0 would lose its sign. */
  ARF_DEVICE static void divide_all(const float (&x)[N], float s, float (&y)[N]) {
    const float r = __frcp_rn(s);
    if (is_moderate(s)) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float q0 = __fmul_rn(x[i], r);
        const float q2 = corrected_twice(x[i], s, r, q0);
        /* |q0| in [2^-100, 2^100): as unsigned bits, one comparison */
        const bool in_range = (bits_of(q0) & 0x7FFFFFFFu) - 0x0D800000u < 0x64000000u;
        y[i] = in_range ? q2 : q0;
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) y[i] = __fdiv_rn(x[i], s);
    }
  }

  /* Newton's correction of a quotient q of x / s, r = 1 / s. */
  ARF_DEVICE static float corrected(float x, float s, float r, float q) { return __fmaf_rn(__fmaf_rn(-q, s, x), r, q); }

  ARF_DEVICE static float corrected_twice(float x, float s, float r, float q) { return corrected(x, s, r, corrected(x, s, r, q)); }

  ARF_DEVICE static bool is_moderate(float s) { return fabsf(s) >= 0x1p-90f && fabsf(s) <= 0x1p90f; }

  /* x / s as e4m3 rounds the correctly rounded quotient, s moderate and r = 1 / s: no e4m3 boundary lies between that
   * quotient and the first correction (tests/division.cpp tries every mantissa of s). kBounded: |x / s| < 2^100, else
   * what is beyond stays uncorrected and saturates. The signs are such that a 0 keeps its own where s > 0. */
  template <bool kBounded>
  ARF_DEVICE static void divide_for_e4m3(const float (&x)[N], float s, float r, float (&y)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float q0 = __fmul_rn(x[i], r);
      y[i] = __fmaf_rn(-__fmaf_rn(q0, s, -x[i]), r, q0);
      if (!kBounded && !(fabsf(q0) < 0x1p100f)) y[i] = q0;
    }
  }

  /* Makes s moderate and positive and leaves the code of x / s: both are multiplied by a power of two or its negative, or
   * where s is 0, inf or NaN x by 1 / s and s becomes 1. Quotients beyond any code stay so. */
  ARF_DEVICE static void moderate(float (&x)[N], float& s, float& r) {
    const bool special = !(fabsf(s) > 0.0f && fabsf(s) < float_of(0x7F800000u));
    const float c = special ? reciprocal_approx(s) : with_sign_of(s, fabsf(s) < 1.0f ? 0x1p60f : 0x1p-60f);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = max_nan(min_nan(__fmul_rn(x[i], c), 0x1p100f), -0x1p100f);
    s = special ? 1.0f : __fmul_rn(s, c);
    r = inverse_of(s);
  }

  ARF_DEVICE static float with_sign_of(float from, float x) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, 0x80000000, 0xD8;" : "=r"(y) : "r"(bits_of(x)), "r"(bits_of(from))); /* mask ? from : x, by bits */
    return float_of(y);
  }

  ARF_DEVICE static float reciprocal_approx(float s) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(s)); /* 1 / s within 1 ulp */
    return r;
  }

  /* Correctly rounded 1 / s of a moderate s: __frcp_rn without its range check (tests/reciprocal.cu compares all mantissas). */
  ARF_DEVICE static float inverse_of(float s) {
    const float r = reciprocal_approx(s);
    return __fmaf_rn(r, __fmaf_rn(-s, r, 1.0f), r);
  }

  /* N codes of one byte at vector v of token t. */
  ARF_DEVICE static void store_bytes(const Params& p, Quant q, uint32_t t, uint32_t v, const float (&x)[N], Factor f) {
    float y[N];
    apply(q, x, f, y);
    store_codes(p, q, codes_at(p, t, v), y);
  }

  /* Where vector v of token t has its codes, of one byte, or `bytes` for a vector. */
  ARF_DEVICE static void* codes_at(const Params& p, uint32_t t, uint32_t v, uint32_t bytes = N) {
    return static_cast<uint8_t*>(p.quant_out) + (static_cast<uint64_t>(t) * p.vectors + v) * bytes;
  }

  ARF_DEVICE static void store_codes(const Params& p, Quant q, void* at, const float (&y)[N]) {
    uint32_t words[N / 4];
    const bool int8 = q.format() == Format::kInt8;
#pragma unroll
    for (int w = 0; w < N / 4; ++w) {
      const float four[4] = {y[4 * w], y[4 * w + 1], y[4 * w + 2], y[4 * w + 3]};
      words[w] = int8 ? int8_word(q, four) : fp8_word(p, q, four);
    }
    store_words(at, words);
  }

  ARF_DEVICE static void store_words(void* at, const uint32_t (&words)[N / 4]) {
    if constexpr (N == 8) {
      *static_cast<uint2*>(at) = make_uint2(words[0], words[1]);
    } else {
      *static_cast<uint32_t*>(at) = words[0];
    }
  }

  /* Codes of values that are clamped, or beyond FP8's range only as those are that saturate. */
  ARF_DEVICE static void store_fp8(void* at, const float (&y)[N]) {
    uint32_t words[N / 4];
#pragma unroll
    for (int w = 0; w < N / 4; ++w) words[w] = e4m3_pair(y[4 * w], y[4 * w + 1]) | e4m3_pair(y[4 * w + 2], y[4 * w + 3]) << 16;
    store_words(at, words);
  }

  ARF_DEVICE static uint32_t fp8_word(const Params& p, Quant q, const float (&y)[4]) {
    const uint32_t low = e4m3_pair(y[0], y[1]), high = e4m3_pair(y[2], y[3]);
    uint32_t word = low | high << 16; /* clamped by saturation */
    if (!q.clamp() && !p.cast_saturates) {
      uint32_t fixed = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) fixed |= e4m3_nan_beyond(word >> 8 * i & 0xFFu, y[i]) << 8 * i;
      word = fixed;
    }
    return word;
  }

  ARF_DEVICE static uint32_t int8_word(Quant spec, const float (&y)[4]) {
    uint32_t word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int q = __float2int_rn(y[i]); /* NaN gives 0, as torch's cast */
      if (spec.clamp()) q = max(-128, min(127, q));
      word |= (static_cast<uint32_t>(q) & 0xFFu) << 8 * i;
    }
    return word;
  }

  /* ---- static FP8 ---- */
  ARF_DEVICE static float given_scale(const Params& p) {
    return p.scale ? load_number(p.scale, 0, p.scale_dtype) : p.scale_value;
  }

  ARF_DEVICE static Factor static_factor(const Params& p, float scale) {
    switch (p.quant.apply()) {
      case Apply::kDivide: return {scale, true, __frcp_rn(scale)};
      case Apply::kReciprocal: return {__frcp_rn(scale), false};
      default: return {scale, false};
    }
  }

  /* The usual static spec. */
  ARF_DEVICE static void usual_static_vector(void* at, float (&x)[N], Factor f) {
    float y[N];
    if (f.divide) {
      if (!(f.value > 0.0f && is_moderate(f.value))) moderate(x, f.value, f.reciprocal);
      divide_for_e4m3<false>(x, f.value, f.reciprocal, y);
    } else {
      multiply_all(x, f.value, y);
    }
    store_fp8(at, y);
  }

  /* ---- dynamic ---- */
  /* Magnitudes order as their bits do, with NaN above all: maxima are integer maxima, and NaN propagates as in torch. */
  ARF_DEVICE static uint32_t amax_of(const float (&x)[N]) {
    uint32_t m = 0;
#pragma unroll
    for (int i = 0; i < N; ++i) m = max(m, bits_of(x[i]) & 0x7FFFFFFFu);
    return m;
  }

  /* Over `lanes` (a power of two) neighbouring lanes. */
  ARF_DEVICE static float lanes_amax(uint32_t m, uint32_t lanes) {
    for (uint32_t step = lanes >> 1; step; step >>= 1) m = max(m, __shfl_xor_sync(~0u, m, step));
    return float_of(m);
  }

  /* As lanes_amax, with all shuffles side by side. */
  template <uint32_t kLanes>
  ARF_DEVICE static uint32_t few_lanes_amax(uint32_t m) {
    uint32_t other[kLanes];
#pragma unroll
    for (uint32_t i = 1; i < kLanes; ++i) other[i] = __shfl_xor_sync(~0u, m, i);
#pragma unroll
    for (uint32_t i = 1; i < kLanes; ++i) m = max(m, other[i]);
    return m;
  }

  /* Over the lanes of a usual group, with one reduction of the warp for each half, side by side, where shuffles would
   * stand in a row. */
  ARF_DEVICE static float usual_amax(uint32_t m) {
    if constexpr (kUsualGroup / N == kWarp) return float_of(__reduce_max_sync(~0u, m));
    const bool upper = threadIdx.x & kUsualGroup / N;
    const uint32_t low = __reduce_max_sync(~0u, upper ? 0u : m), high = __reduce_max_sync(~0u, upper ? m : 0u);
    return float_of(upper ? high : low);
  }

  /* Correctly rounded amax / 448 or / 127: one correction suffices for these divisors (tests/division.cpp tries every
   * mantissa), the range is checked once. */
  ARF_DEVICE static float divide_by_limit(float amax, float limit, float inverse) {
    if (!(amax >= 0x1p-90f && amax <= 0x1p120f)) return __fdiv_rn(amax, limit);
    return corrected(amax, limit, inverse, __fmul_rn(amax, inverse));
  }

  /* From amax to the scale that is written (fp32; MXFP8 and packed layouts write its exponent) and its factor. */
  ARF_DEVICE static float dynamic_scale(const Params& p, Quant q, float amax, Factor& factor) {
    const float limit = q.format() == Format::kInt8 ? kInt8Max : kFp8Max;
    const float inverse = q.format() == Format::kInt8 ? 1.0f / kInt8Max : 1.0f / kFp8Max;
    const bool in_tensor = q.round() == ScaleRound::kTensor;
    if (in_tensor) amax = round_to<kDtype>(amax);
    /* without a bound 0, which changes no amax */
    amax = max_nan(amax, in_tensor ? round_to<kDtype>(p.amax_bound) : p.amax_bound);
    float scale;
    switch (q.rule()) {
      case ScaleRule::kDivide: scale = divide_by_limit(amax, limit, inverse); break;
      case ScaleRule::kMultiply: scale = __fmul_rn(amax, inverse); break;
      default: scale = __frcp_rn(__fmul_rn(__frcp_rn(amax), limit));
    }
    if (in_tensor) scale = round_to<kDtype>(scale);
    scale = max_nan(scale, in_tensor ? round_to<kDtype>(p.scale_bound) : p.scale_bound);
    if (q.round() == ScaleRound::kPow2) scale = pow2_up(scale);
    if (q.round() == ScaleRound::kPow2Log2) scale = pow2_up_log2(scale);
    switch (q.apply()) {
      case Apply::kDivide: factor = {scale, true}; break;
      case Apply::kMaxOverAmax: factor = {__fmul_rn(__frcp_rn(amax), limit), false}; break;
      default: factor = {__frcp_rn(scale), false};
    }
    return scale;
  }

  /* Where this thread stores its group's scale, nullptr if another thread does. */
  ARF_DEVICE static void* scale_target(const Params& p, uint32_t t, uint32_t v) {
    const bool writes = p.group < 0 ? v == 0 : (v & ((1u << p.lane_shift) - 1)) == 0;
    return writes && v < p.vectors ? scale_address(p, t, p.group < 0 ? 0 : v >> p.lane_shift) : nullptr;
  }

  /* Group of `p.group` elements over neighbouring lanes; all lanes of the warp call, `active` ones have a vector. */
  ARF_DEVICE static void group_vector(const Params& p, void* scale_at, uint32_t t, uint32_t v, bool active, const float (&x)[N]) {
    const float amax = lanes_amax(amax_of(x), 1u << p.lane_shift);
    if (!active) return;
    Factor factor;
    const float scale = dynamic_scale(p, p.quant, amax, factor);
    if (p.quant.format() == Format::kMxfp8) {
      const uint32_t exponent = ue8m0_up(scale);
      factor = {ue8m0_reciprocal(exponent), false};
      if (scale_at) store_byte(scale_at, exponent);
    } else if (p.quant.layout() == Layout::kPackedUe8m0) {
      if (scale_at) store_byte(scale_at, bits_of(scale) >> 23 & 0xFFu);
    } else if (scale_at) {
      store_float(scale_at, scale);
    }
    store_bytes(p, p.quant, t, v, x, factor);
  }

  /* FP8 with fp32 scales, per token or of kUsualGroup, from the amax and its bound, which is at most 2^80. A branch behind
   * the last arrival is dear: those of group_vector took 0.2 us of a token's 3. Here are two, for `reciprocal` (x times
   * 1 / scale) and for an amax that is not moderate, NaN or 0. */
  ARF_DEVICE static void usual_vector(bool multiply, bool reciprocal, float amax, float scale_bound, void* scale_at, void* at,
                                      float (&x)[N]) {
    constexpr float kInverse = 1.0f / kFp8Max;
    const float product = __fmul_rn(amax, kInverse);
    const float quotient = corrected(amax, kFp8Max, kInverse, product); /* as divide_by_limit */
    float scale = max_nan(multiply ? product : quotient, scale_bound), s = scale, r = inverse_of(s);
    if (bits_of(amax) - bits_of(0x1p-80f) > bits_of(0x1p80f) - bits_of(0x1p-80f)) { /* scale <= 2^80, or amax says so */
      if (!multiply) scale = max_nan(__fdiv_rn(amax, kFp8Max), scale_bound);
      s = scale, r = __frcp_rn(s);
      if (!reciprocal && !is_moderate(s)) moderate(x, s, r);
    }
    float y[N];
    if (reciprocal) {
      multiply_all(x, r, y);
    } else {
      divide_for_e4m3<true>(x, s, r, y); /* 448 at most, but for rounding */
    }
    store_fp8(at, y);
    if (scale_at) store_float(scale_at, scale);
  }

  /* ---- usual MXFP8: groups of 32 of a 16-bit T ---- */
  static constexpr uint32_t kMxLanes = 32 / N;

  /* The exponent of amax / 448, rounded up, is that of amax less 448's, and one more where amax has the larger mantissa. */
  ARF_DEVICE static void mx_vector(uint32_t amax, void* scale_at, void* at, const float (&x)[N]) {
    uint32_t exponent = max(amax + 0x1FFFFFu >> 23, 8u) - 8u; /* 448 is 2^8 * 1.75, of mantissa 0x600000 */
    if (amax >= 0x7F800000u) exponent = amax > 0x7F800000u ? 255u : 254u;
    float y[N];
    multiply_all(x, ue8m0_reciprocal(exponent), y);
    store_fp8(at, y);
    if (scale_at) store_byte(scale_at, exponent);
  }

  /* ---- NVFP4: groups of 16, e4m3 scales under a given encode scale ---- */
  static constexpr uint32_t kFp4Lanes = 16 / N; /* of a group */

  ARF_DEVICE static Factor encode_factor(float encode) { return {encode, is_moderate(encode)}; }

  ARF_DEVICE static void nvfp4_vector(float amax, void* scale_at, void* at, const float (&x)[N], const Factor& encode) {
    const uint32_t code = e4m3_pair(__fmul_rn(encode.value, __fmul_rn(amax, 1.0f / 6.0f)), 0.0f) & 0xFFu;
    const float decoded = e4m3_to_float(code);
    float factor = quotient(encode, decoded);
    if (decoded == 0.0f) factor = 0.0f;
    float y[N];
    multiply_all(x, factor, y);
    const uint32_t word = e2m1_codes(y);
    if constexpr (N == 8) {
      *static_cast<uint32_t*>(at) = word;
    } else {
      *static_cast<uint16_t*>(at) = static_cast<uint16_t>(word);
    }
    if (scale_at) store_byte(scale_at, code);
  }

  /* encode / decoded, decoded an e4m3 number: for divisors of four bits one correction does (tests/division.cpp). */
  ARF_DEVICE static float quotient(const Factor& encode, float decoded) {
    if (!encode.divide) return __fdiv_rn(encode.value, decoded);
    const float r = inverse_of(decoded);
    return corrected(encode.value, decoded, r, __fmul_rn(encode.value, r));
  }
};

}  // namespace arf
