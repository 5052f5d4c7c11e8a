/* Numbers: T (bf16, fp16, fp32) to fp32 and back, and the 8-, 6- and 4-bit formats of the quantisers.
 *
 * No cuda_bf16.h / cuda_fp16.h / cuda_fp8.h: they cost 3 s of every translation unit and hide the rounding. All
 * conversions round to nearest even, keep subnormals, and NaN stays NaN. */
#pragma once
#include "params.h"

namespace arf {

#define ARF_DEVICE __device__ __forceinline__

/* Hardware e2m1 and ue8m0 conversions exist in the architecture-specific targets from Blackwell on. */
#if defined(__CUDA_ARCH_FEAT_SM100_ALL) || defined(__CUDA_ARCH_FEAT_SM101_ALL) || defined(__CUDA_ARCH_FEAT_SM103_ALL) || \
    defined(__CUDA_ARCH_FEAT_SM110_ALL) || defined(__CUDA_ARCH_FEAT_SM120_ALL) || defined(__CUDA_ARCH_FEAT_SM121_ALL)
#define ARF_HAS_MX_CONVERSIONS 1
#else
#define ARF_HAS_MX_CONVERSIONS 0
#endif

template <int kDtype>
constexpr int kElements = kDtype == ARF_FP32 ? 4 : 8; /* of a 16-byte vector */
template <int kDtype>
constexpr int kMaxVectors = ARF_MAX_HIDDEN / kElements<kDtype> / kMaxThreads; /* a thread's, of one row: 2, fp32 4 */

ARF_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
ARF_DEVICE float float_of(uint32_t x) { return __uint_as_float(x); }

/* Two fp32 to a word of two 16-bit T, `low` in the low half. */
template <int kDtype>
ARF_DEVICE uint32_t pack_pair(float low, float high) {
  uint32_t word;
  if constexpr (kDtype == ARF_BF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); /* word = {bf16(high), bf16(low)} */
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); /* word = {f16(high), f16(low)} */
  }
  return word;
}

template <int kDtype>
ARF_DEVICE void unpack_pair(uint32_t word, float& low, float& high) {
  if constexpr (kDtype == ARF_BF16) {
    low = float_of(word << 16);
    high = float_of(word & 0xFFFF0000u);
  } else {
    asm("{ .reg .f16 l, h;\n\t"
        "mov.b32 {l, h}, %2;\n\t" /* split the word into its halves */
        "cvt.f32.f16 %0, l;\n\t"  /* exact */
        "cvt.f32.f16 %1, h; }"    /* exact */
        : "=f"(low), "=f"(high)
        : "r"(word));
  }
}

template <int kDtype>
ARF_DEVICE void unpack(const uint4& v, float (&f)[kElements<kDtype>]) {
  if constexpr (kDtype == ARF_FP32) {
    f[0] = float_of(v.x), f[1] = float_of(v.y), f[2] = float_of(v.z), f[3] = float_of(v.w);
  } else {
    unpack_pair<kDtype>(v.x, f[0], f[1]);
    unpack_pair<kDtype>(v.y, f[2], f[3]);
    unpack_pair<kDtype>(v.z, f[4], f[5]);
    unpack_pair<kDtype>(v.w, f[6], f[7]);
  }
}

template <int kDtype>
ARF_DEVICE uint4 pack(const float (&f)[kElements<kDtype>]) {
  if constexpr (kDtype == ARF_FP32) {
    return make_uint4(bits_of(f[0]), bits_of(f[1]), bits_of(f[2]), bits_of(f[3]));
  } else {
    return make_uint4(pack_pair<kDtype>(f[0], f[1]), pack_pair<kDtype>(f[2], f[3]), pack_pair<kDtype>(f[4], f[5]),
                      pack_pair<kDtype>(f[6], f[7]));
  }
}

/* T(a * b) of pairs of a T of 16 bits, by way of fp32 or not: fp32 holds the product (tests/pairs.cu tries them all). */
template <int kDtype>
ARF_DEVICE uint32_t multiply_pair(uint32_t a, uint32_t b) {
  uint32_t y;
#if __CUDA_ARCH__ >= 900
  if constexpr (kDtype == ARF_BF16) {
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); /* y = {a.high * b.high, a.low * b.low} */
  } else {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); /* likewise */
  }
#else
  float a0, a1, b0, b1;
  unpack_pair<kDtype>(a, a0, a1), unpack_pair<kDtype>(b, b0, b1);
  y = pack_pair<kDtype>(__fmul_rn(a0, b0), __fmul_rn(a1, b1));
#endif
  return y;
}

/* T(a + b) likewise: where fp32 does not hold the sum, the smaller is too small to move the larger. */
template <int kDtype>
ARF_DEVICE uint32_t add_pair(uint32_t a, uint32_t b) {
  uint32_t y;
#if __CUDA_ARCH__ >= 900
  if constexpr (kDtype == ARF_BF16) {
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); /* y = {a.high + b.high, a.low + b.low} */
  } else {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b)); /* likewise */
  }
#else
  float a0, a1, b0, b1;
  unpack_pair<kDtype>(a, a0, a1), unpack_pair<kDtype>(b, b0, b1);
  y = pack_pair<kDtype>(__fadd_rn(a0, b0), __fadd_rn(a1, b1));
#endif
  return y;
}

template <int kDtype>
ARF_DEVICE uint4 add(const uint4& a, const uint4& b) {
  return make_uint4(add_pair<kDtype>(a.x, b.x), add_pair<kDtype>(a.y, b.y), add_pair<kDtype>(a.z, b.z), add_pair<kDtype>(a.w, b.w));
}

template <int kDtype>
ARF_DEVICE uint4 multiply(const uint4& a, const uint4& b) {
  return make_uint4(multiply_pair<kDtype>(a.x, b.x), multiply_pair<kDtype>(a.y, b.y), multiply_pair<kDtype>(a.z, b.z),
                    multiply_pair<kDtype>(a.w, b.w));
}

/* Of a vector of a T of 16 bits, the bits of its largest magnitude as fp32: NaN above inf. */
template <int kDtype>
ARF_DEVICE uint32_t largest_magnitude(const uint4& v) {
  constexpr uint32_t kBoth = 0x7FFF7FFFu;
  const uint32_t pair = __vmaxu2(__vmaxu2(v.x & kBoth, v.y & kBoth), __vmaxu2(v.z & kBoth, v.w & kBoth));
  float low, high;
  unpack_pair<kDtype>(pair, low, high);
  return max(bits_of(low), bits_of(high));
}

/* float(T(x)). */
template <int kDtype>
ARF_DEVICE float round_to(float x) {
  if constexpr (kDtype == ARF_FP32) {
    return x;
  } else {
    float low, high;
    unpack_pair<kDtype>(pack_pair<kDtype>(x, 0.0f), low, high);
    return low;
  }
}

/* One number of a run-time dtype at p[i]. */
ARF_DEVICE float load_number(const void* p, size_t i, int dtype) {
  if (dtype == ARF_FP32) return static_cast<const float*>(p)[i];
  const uint32_t half = static_cast<const unsigned short*>(p)[i];
  float low, high;
  if (dtype == ARF_BF16) {
    unpack_pair<ARF_BF16>(half, low, high);
  } else {
    unpack_pair<ARF_FP16>(half, low, high);
  }
  return low;
}

/* NaN-propagating maximum, as torch's amax and maximum; fmaxf drops NaN. */
ARF_DEVICE float max_nan(float a, float b) {
  float m;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b)); /* m = NaN if either is, else max(a, b) */
  return m;
}

ARF_DEVICE float min_nan(float a, float b) {
  float m;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b)); /* m = NaN if either is, else min(a, b) */
  return m;
}

/* ---- e4m3: 1 sign, 4 exponent (bias 7), 3 mantissa bits; 448 the largest, 0x7F NaN -------------------------------- */

/* Saturating: beyond 448 becomes 448, NaN becomes 0x7F. */
ARF_DEVICE uint32_t e4m3_one_software(float x) {
  const uint32_t sign = bits_of(x) >> 24 & 0x80u;
  uint32_t a = bits_of(x) & 0x7FFFFFFFu;
  if (a > 0x7F800000u) return 0x7Fu;
  if (a >= 0x43E00000u) return sign | 0x7Eu; /* 448 and beyond */
  if (a < 0x3C800000u) {                     /* below 2^-6: adding 2^14 leaves multiples of 2^-9 in the mantissa's end */
    return sign | (bits_of(__fadd_rn(float_of(a), 16384.0f)) - 0x46800000u);
  }
  a += 0x7FFFFu + (a >> 20 & 1u); /* to nearest even at bit 20 */
  return sign | ((a >> 20) - (120u << 3));
}

/* Low byte from `low`. */
ARF_DEVICE uint32_t e4m3_pair(float low, float high) {
#if __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low)); /* pair = {e4m3(high), e4m3(low)} */
  return pair;
#else
  return e4m3_one_software(low) | e4m3_one_software(high) << 8;
#endif
}

/* What a cast that does not saturate makes of x: beyond 464, where rounding leaves the range, NaN with x's sign. */
ARF_DEVICE uint32_t e4m3_nan_beyond(uint32_t code, float x) {
  return fabsf(x) > 464.0f ? (bits_of(x) >> 24 & 0x80u) | 0x7Fu : code;
}

ARF_DEVICE float e4m3_to_float(uint32_t code) {
#if __CUDA_ARCH__ >= 890
  uint32_t halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(code))); /* exact; low half of the low byte */
  float low, high;
  unpack_pair<ARF_FP16>(halves, low, high);
  return low;
#else
  const uint32_t sign = (code & 0x80u) << 24, exponent = code >> 3 & 15u, mantissa = code & 7u;
  if ((code & 0x7Fu) == 0x7Fu) return float_of(sign | 0x7FC00000u);
  if (exponent == 0) return float_of(sign | bits_of(static_cast<float>(mantissa) * 0.001953125f)); /* 2^-9 */
  return float_of(sign | (exponent + 120u) << 23 | mantissa << 20);
#endif
}

/* ---- e2m1: 0, 0.5, 1, 1.5, 2, 3, 4, 6 ----------------------------------------------------------------------------- */

/* A byte for each number, with its sign on top. */
ARF_DEVICE uint32_t signs_of(float a, float b) { return __byte_perm(bits_of(a), bits_of(b), 0x0073) & 0x8080u; }
ARF_DEVICE uint32_t signs_of(float a, float b, float c, float d) { return signs_of(a, b) | signs_of(c, d) << 16; }

/* The codes of N numbers, from the low end, to nearest even, saturating at 6; NaN becomes 6, -0.0 keeps its sign: the
 * instruction's results. The numbers are products, whose NaN has no sign. In software the code of a magnitude a is 2 a where it
 * lies below 2, a + 2 below 4 and a / 2 + 4 beyond: the least of the three lines. Each is taken from 2^23 on, so that the one
 * rounding of its sum is that to an integer, in the end of the bits. */
template <int N>
ARF_DEVICE uint32_t e2m1_codes(const float (&y)[N]) {
  uint32_t codes = 0;
#if ARF_HAS_MX_CONVERSIONS
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    uint32_t pair;
    asm("{ .reg .b8 b;\n\t"
        "cvt.rn.satfinite.e2m1x2.f32 b, %1, %2;\n\t" /* b = {e2m1(high), e2m1(low)} */
        "cvt.u32.u8 %0, b; }"                        /* widen */
        : "=r"(pair)
        : "f"(y[i + 1]), "f"(y[i]));
    codes |= pair << 4 * i;
  }
#else
  constexpr uint32_t kZero = 0x4B000000u; /* 2^23 */
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float a = fabsf(y[i]);
    const uint32_t halves = bits_of(__fmaf_rn(a, 2.0f, 0x1p23f)), ones = bits_of(__fadd_rn(a, 0x1p23f + 2.0f)),
                   twos = bits_of(__fmaf_rn(a, 0.5f, 0x1p23f + 4.0f));
    codes += min(min(halves, ones), min(twos, kZero + 7u)) << 4 * i;
  }
  codes -= kZero * (N == 8 ? 0x11111111u : 0x1111u); /* all at once */
  if constexpr (N == 8) {
    codes |= signs_of(y[0], y[2], y[4], y[6]) >> 4 | signs_of(y[1], y[3], y[5], y[7]);
  } else {
    codes |= signs_of(y[0], y[2]) >> 4 | signs_of(y[1], y[3]);
  }
#endif
  return codes;
}

/* ---- ue8m0: a biased exponent ------------------------------------------------------------------------------------- */

/* Of x >= 0, rounded up; saturates at 2^127, NaN becomes 255. */
ARF_DEVICE uint32_t ue8m0_up(float x) {
#if ARF_HAS_MX_CONVERSIONS
  uint16_t pair;
  asm("cvt.rp.satfinite.ue8m0x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x)); /* low byte = ue8m0(x), rounded up */
  return pair & 0xFFu;
#else
  const uint32_t a = bits_of(x) & 0x7FFFFFFFu, exponent = a >> 23, mantissa = a & 0x7FFFFFu;
  if (a > 0x7F800000u) return 255u;
  if (exponent >= 254u) return 254u;
  /* The least exponent, 2^-127, is a subnormal fp32 (mantissa 0x400000). */
  if (exponent == 0) return mantissa > 0x400000u;
  return exponent + (mantissa != 0);
#endif
}

/* 2^(127 - e), the factor that divides by a ue8m0 scale; NaN for 255. */
ARF_DEVICE float ue8m0_reciprocal(uint32_t e) {
  if (e == 255u) return float_of(0x7FC00000u);
  return e == 254u ? float_of(0x00400000u) : float_of((254u - e) << 23);
}

/* ---- scales as powers of two -------------------------------------------------------------------------------------- */

/* Up by the bits (ScaleRound.POW2): mantissa cleared, exponent one more unless it was 0. */
ARF_DEVICE float pow2_up(float s) {
  const uint32_t b = bits_of(s);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return s;
  return float_of((b & 0x7FFFFFu) ? (b & 0xFF800000u) + 0x00800000u : b);
}

/* exp2(ceil(log2(s))) with a correctly rounded fp32 log2 (ScaleRound.POW2_LOG2), s >= 0, by integer arithmetic: for
 * s = 2^k (1 + m 2^-23) the log is k + 1.4427 m 2^-23 to first order, and rounds to k itself while that is under half
 * the spacing of fp32 numbers above k, which is 2^(n-24) for |k| in [2^n, 2^(n+1)) (one n less just above k = -2^n). */
ARF_DEVICE float pow2_up_log2(float s) {
  uint32_t b = bits_of(s);
  if (b == 0 || b >= 0x7F800000u) return s == 0.0f ? 0.0f : s;
  int k = 0;
  if (b < 0x00800000u) { /* subnormal: scale by 2^32 */
    b = bits_of(__fmul_rn(s, 4294967296.0f));
    k = -32;
  }
  k += static_cast<int>(b >> 23) - 127;
  const uint32_t m = b & 0x7FFFFFu;
  const uint32_t magnitude = k < 0 ? -k : k;
  uint32_t stays = 0; /* largest m that stays at k */
  if (magnitude != 0) {
    int n = 31 - __clz(magnitude);
    if (k < 0 && (magnitude & (magnitude - 1)) == 0) n -= 1;
    /* floor(2^(n-1) * ln 2) for n = 2..7: 1, 2, 5, 11, 22, 44 */
    stays = n < 2 ? 0u : n == 2 ? 1u : n == 3 ? 2u : n == 4 ? 5u : n == 5 ? 11u : n == 6 ? 22u : 44u;
  }
  if (m > stays) k += 1;
  if (k > 127) return float_of(0x7F800000u);
  if (k < -149) return 0.0f;
  return k >= -126 ? float_of(static_cast<uint32_t>(k + 127) << 23) : float_of(1u << (k + 149));
}

}  // namespace arf
