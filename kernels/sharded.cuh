/* The loop of a sharded residual: the owner of a token sums, adds, normalises and quantises it, and sends the others what
 * they read of it (its payload): the norm, or codes and scales, and where the residual leaves its chain that as well.
 *
 * Token t belongs to rank t mod world, in every piece; with kOwnerBlocks to rank t / block mod world, and `residual` and
 * `residual_out` hold a rank's own tokens alone: their pointers are set back by what lies in front of them. A generation holds
 * world - 1 slots, one a sender, each of ceil(tokens / world) rows of x that the sender contributes to our tokens, then as
 * many rows of payload of its own tokens.
 * Rows of `residual` and `residual_out` that other ranks own are neither read nor written.
 *
 * Arrival is told from the words themselves, as everywhere (exchange.cuh): no fence, no flag behind the data.
 *   norm, residual  results of arithmetic, whose NaN is never kEmpty; pushed as vectors.
 *   scales          a word each: fp32 that is no negative NaN, or bytes that leave a word's high end 0; NVFP4's by fours,
 *                   e4m3 bytes of which none is 0xFF.
 *   codes           words of e4m3 from saturating casts hold no byte 0xFF. INT8, e2m1 and e4m3 of casts that give -NaN may
 *                   make the word kEmpty. That word is sent as kEmpty - 1, and the tile of 32 vectors has marks: a bit a
 *                   word, in words of 16 bits each, so that no word of marks is kEmpty whatever the codes are. A reader
 *                   waits for its tile's marks as well, which puts kEmpty back where it belongs: 8 bytes beside 128.
 *
 * The owner finishes a row into its own outputs with the epilogue that every loop has, and reads back from there what it
 * sends: what the same thread, or behind a barrier of the warp one of its lanes, has just written. */
#pragma once
#include "kernels.cuh"

namespace arf {

ARF_DEVICE void store_word(void* to, uint32_t w) {
  asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(to), "r"(w) : "memory"); /* relaxed.sys */
}
ARF_DEVICE uint32_t load_word(const void* from) {
  uint32_t w;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(w) : "l"(from) : "memory"); /* relaxed.sys, past L1 */
  return w;
}
ARF_DEVICE void store_words(void* to, uint32_t a, uint32_t b) {
  asm volatile("st.volatile.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(a), "r"(b) : "memory"); /* relaxed.sys */
}
ARF_DEVICE void load_words(const void* from, uint32_t& a, uint32_t& b) {
  asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from) : "memory"); /* relaxed.sys */
}

/* What this thread, or its warp before a __syncwarp, has written: never moved up over those stores. */
ARF_DEVICE uint4 read_back(const void* from) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" /* a weak load, of the same thread's stores in order */
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from)
               : "memory");
  return v;
}
ARF_DEVICE void read_back_words(const void* from, uint32_t& a, uint32_t& b) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "l"(from) : "memory"); /* as above */
}
ARF_DEVICE uint32_t read_back_word(const void* from) {
  uint32_t w;
  asm volatile("ld.global.u32 %0, [%1];" : "=r"(w) : "l"(from) : "memory"); /* as above */
  return w;
}
ARF_DEVICE uint32_t read_back_byte(const void* from) {
  uint32_t w;
  asm volatile("ld.global.u8 %0, [%1];" : "=r"(w) : "l"(from) : "memory"); /* as above, the upper bits 0 */
  return w;
}

template <int kDtype, int kWorld, int kFamily, int kHeld, int kCalls>
struct Sharded {
  using Loop = Kernel<kDtype, kWorld, kFamily, kHeld, kCalls>;
  using E = typename Loop::E;
  using Q = Quantiser<kDtype>;
  using Given = typename E::Given;
  static constexpr int N = E::N;
  static constexpr uint32_t kCodeBytes = kFamily == kFp4 ? N / 2 : N;     /* of a vector */
  static constexpr int kWords = kCodeBytes < 4 ? 1 : kCodeBytes / 4;      /* of codes that a lane handles */
  static constexpr uint32_t kLanes = kCodeBytes < 4 ? 4 / kCodeBytes : 1; /* whose codes make a word: the first handles it */
  static constexpr uint32_t kFp4Scales = 4 * 16 / N;                      /* vectors whose four scales make a word */

  ARF_DEVICE static void run(const ShardedParams& sp, Shared scratch, const Position& position) {
    const Params& p = sp.base;
    Place at = Loop::begin(p, scratch, position);
    const uint32_t cta = position.cta;
    Link link = open_link(p, cta);
    const uint32_t beside = begin_alone(p, cta);
    settle(p, link);
    const auto [first, end] = Loop::rows_of(p, cta, position.ctas, sp.rows);
    scatter(sp, link, at, first);
    const Given given = Loop::start(p, at, cta, position.ctas);
    E::await_weight();
    /* While a row is finished, the next one's contribution and the payload of the one before are on their way. */
    for (uint32_t q = first; q <= end; ++q) {
      if (q + 1 < end) scatter(sp, link, at, q + 1);
      if (q < end) own_row(sp, scratch, link, at, cta, given, q);
      if (q > first) take_rows(sp, scratch, link, at, cta, given, q - 1);
    }
    Loop::end_launch(p, link, at, cta, position.ctas, beside);
  }

  ARF_DEVICE static uint32_t token(const ShardedParams& sp, uint32_t q, uint32_t owner) {
    return q * sp.row_stride + owner * sp.owner_stride;
  }

  /* Our contribution to every peer's token of row q. */
  ARF_DEVICE static void scatter(const ShardedParams& sp, const Link& link, const Place& at, uint32_t q) {
    Loop::scatter(sp.base, link, at, {q, 0}, [&](uint32_t owner) { return token(sp, q, owner); });
  }

  /* The others' tokens of row q. */
  ARF_DEVICE static void take_rows(const ShardedParams& sp, Shared scratch, Link& link, Place& at, uint32_t cta,
                                   const Given& given, uint32_t q) {
    for (int i = 0; i < Loop::world(sp.base) - 1; ++i) {
      const uint32_t owner = Loop::peer(sp.base, i), t = token(sp, q, owner);
      if (t < sp.base.tokens) take_row(sp, scratch, link, at, cta, given, q, t, owner);
    }
  }

  /* Our token of row q: finished here, then sent. */
  ARF_DEVICE static void own_row(const ShardedParams& sp, Shared scratch, Link& link, Place& at, uint32_t cta,
                                 const Given& given, uint32_t q) {
    const Params& p = sp.base;
    const uint32_t t = token(sp, q, p.rank);
    if (t >= p.tokens) return;
    const typename Loop::Own own = Loop::load_own(p, at, t);
    const typename E::Targets to = E::targets(p, at, t);
    float row[kHeld][N];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      Loop::zero(row[k]);
      if (!Loop::holds(p, at, k)) continue;
      const typename E::Residual residual = E::load_residual(p, t, at.vector(k), true);
      const uint4 sum =
          receive_sum<kDtype, kWorld>(p, link, cta, p.own + Loop::offset_of(p, link, at, q, k), t, Loop::lanes(p, at, k), own.x[k]);
      E::add_residual(p, t, at.vector(k), sum, residual, row[k], to);
    }
    E::norm_and_quantise(p, scratch, at, given, t, row, to);
    const uint64_t payload = link.offset + sp.payload.first + static_cast<uint64_t>(q) * sp.payload.bytes;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (Loop::holds(p, at, k)) send(sp, link, at, payload, t, k);
    }
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (Loop::holds(p, at, k)) empty_all<kWorld>(p, link, p.own + Loop::offset_of(p, link, at, q, k));
    }
    ++at.row;
  }

  /* Vector k of this thread of the finished row t, to `payload` in all peers' buffers. */
  ARF_DEVICE static void send(const ShardedParams& sp, Link& link, const Place& at, uint64_t payload, uint32_t t, int k) {
    const Params& p = sp.base;
    link.dead = __any_sync(Loop::lanes(p, at, k), link.dead); /* lanes go on together */
    if (link.dead) return;
    if (sp.payload.norm) send_vector(p, link, payload, p.norm_out, p.norm_out_fp32, t, at.vector(k));
    if (sp.payload.total) send_vector(p, link, payload + sp.payload.total_at, p.residual_out, p.residual_out_fp32, t, at.vector(k));
    if constexpr (kFamily != kPlain) {
      if (sp.payload.codes) send_codes(sp, link, at, payload, t, k);
    }
  }

  ARF_DEVICE static void send_vector(const Params& p, const Link& link, uint64_t to, const void* from, bool fp32, uint32_t t,
                                     uint32_t v) {
    const uint4* row = static_cast<const uint4*>(from);
    const uint64_t i = static_cast<uint64_t>(t) * p.vectors + v;
    if (E::kWide && fp32) {
      const uint4 a = read_back(row + 2 * i), b = read_back(row + 2 * i + 1);
      push_all<kWorld>(p, link, to + 2 * v * kVectorBytes, a);
      push_all<kWorld>(p, link, to + (2 * v + 1) * kVectorBytes, b);
    } else {
      push_all<kWorld>(p, link, to + static_cast<uint64_t>(v) * kVectorBytes, read_back(row + i));
    }
  }

  template <class Store>
  ARF_DEVICE static void for_all_peers(const Params& p, const Store& store) {
    if constexpr (kWorld != 0) {
#pragma unroll
      for (int i = 0; i < kWorld - 1; ++i) store(p.push[i]);
    } else {
#pragma unroll 1
      for (int i = 0; i < p.world - 1; ++i) store(p.push[i]);
    }
  }

  ARF_DEVICE static void send_codes(const ShardedParams& sp, const Link& link, const Place& at, uint64_t payload, uint32_t t,
                                    int k) {
    const Params& p = sp.base;
    const uint32_t v = at.vector(k), lanes = Loop::lanes(p, at, k);
    __syncwarp(lanes); /* what other lanes wrote of a word */
    const uint8_t* const from = static_cast<const uint8_t*>(p.quant_out) + (static_cast<uint64_t>(t) * p.vectors + v) * kCodeBytes;
    const bool handles = v % kLanes == 0;
    uint32_t words[kWords] = {};
    if constexpr (kWords == 2) {
      read_back_words(from, words[0], words[1]);
    } else {
      if (handles) words[0] = read_back_word(from);
    }
    if (sp.payload.marks) {
      uint32_t empty[kWords];
#pragma unroll
      for (int i = 0; i < kWords; ++i) empty[i] = __ballot_sync(lanes, words[i] == kEmpty);
      if (threadIdx.x % kWarp == 0) {
        const uint64_t to = payload + sp.payload.marks_at + v / kWarp * (8 * kWords);
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          for_all_peers(p, [&](char* peer) { store_words(peer + to + 8 * i, empty[i] & 0xFFFFu, empty[i] >> 16); });
        }
      }
    }
    if (handles) {
      const uint64_t to = payload + sp.payload.codes_at + v * kCodeBytes;
      for_all_peers(p, [&](char* peer) {
        if constexpr (kWords == 2) {
          store_words(peer + to, min(words[0], kEmpty - 1), min(words[1], kEmpty - 1));
        } else {
          store_word(peer + to, min(words[0], kEmpty - 1));
        }
      });
    }
    if constexpr (kFamily >= kDynamic) {
      if (!leads(p, v)) return;
      uint32_t word = 0;
      if constexpr (kFamily == kFp4) {
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          const uint32_t g = v / (kFp4Scales / 4) + j;
          if (g < p.groups) word |= read_back_byte(scale_address(p, t, g)) << 8 * j;
        }
      } else {
        const void* const scale = scale_address(p, t, scale_of(p, v));
        word = is_byte(p) ? read_back_byte(scale) : read_back_word(scale);
      }
      const uint64_t to = payload + sp.payload.scales_at + scale_of(p, v) * 4;
      for_all_peers(p, [&](char* peer) { store_word(peer + to, min(word, kEmpty - 1)); });
    }
  }

  /* Whether the lane of vector v handles a word of scales, and which of the row's. */
  ARF_DEVICE static bool leads(const Params& p, uint32_t v) {
    if constexpr (kFamily == kFp4) return v % kFp4Scales == 0;
    return p.group < 0 ? v == 0 : (v & ((1u << p.lane_shift) - 1)) == 0;
  }
  ARF_DEVICE static uint32_t scale_of(const Params& p, uint32_t v) {
    if constexpr (kFamily == kFp4) return v / kFp4Scales;
    return p.group < 0 ? 0 : v >> p.lane_shift;
  }
  ARF_DEVICE static bool is_byte(const Params& p) { return p.quant.layout() > Layout::kColumnTma; }

  /* Token t of row q from its owner. */
  ARF_DEVICE static void take_row(const ShardedParams& sp, Shared scratch, Link& link, Place& at, uint32_t cta,
                                  const Given& given, uint32_t q, uint32_t t, uint32_t owner) {
    const Params& p = sp.base;
    char* const from = p.own + static_cast<uint64_t>(slot_of(owner, p.rank)) * p.slot_bytes + link.offset + sp.payload.first +
                       static_cast<uint64_t>(q) * sp.payload.bytes;
    float row[kHeld][N];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      Loop::zero(row[k]);
      if (!Loop::holds(p, at, k)) continue;
      if (sp.payload.norm) take_vector(p, link, at, cta, from, p.norm_out, p.norm_out_fp32, t, owner, k, row[k]);
      if (sp.payload.total) {
        float total[N];
        take_vector(p, link, at, cta, from + sp.payload.total_at, p.residual_out, p.residual_out_fp32, t, owner, k, total);
      }
      if constexpr (kFamily != kPlain) {
        if (sp.payload.codes) take_codes(sp, link, at, cta, from, t, owner, k);
      }
    }
    if constexpr (kFamily != kPlain) {
      if (sp.payload.codes) return;
      /* The norm is here: each rank quantises it for itself, to the same bits. */
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (!p.quant.unrounded()) unpack<kDtype>(pack<kDtype>(row[k]), row[k]);
      }
      E::quantise(p, scratch, at, given, t, row, E::targets(p, at, t));
      if (kFamily >= kDynamic && p.group < 0) ++at.row; /* its maximum took the scratch of this parity, and a barrier */
    }
  }

  /* A vector of an output, from its owner's payload; what it holds in `value`. */
  ARF_DEVICE static void take_vector(const Params& p, Link& link, const Place& at, uint32_t cta, char* from, void* out, bool fp32,
                                     uint32_t t, uint32_t owner, int k, float (&value)[N]) {
    const uint32_t v = at.vector(k), lanes = Loop::lanes(p, at, k);
    uint4* const row = static_cast<uint4*>(out);
    const uint64_t i = static_cast<uint64_t>(t) * p.vectors + v;
    if (E::kWide && fp32) {
      char* const place = from + 2 * v * kVectorBytes;
      const uint4 a = receive_one(p, link, cta, place, ARF_SHARDED, t, owner, lanes);
      const uint4 b = receive_one(p, link, cta, place + kVectorBytes, ARF_SHARDED, t, owner, lanes);
      row[2 * i] = a;
      row[2 * i + 1] = b;
      E::widen(a, b, value);
      empty_one(link, place);
      empty_one(link, place + kVectorBytes);
    } else {
      char* const place = from + static_cast<uint64_t>(v) * kVectorBytes;
      const uint4 a = receive_one(p, link, cta, place, ARF_SHARDED, t, owner, lanes);
      row[i] = a;
      unpack<kDtype>(a, value);
      empty_one(link, place);
    }
  }

  ARF_DEVICE static void take_codes(const ShardedParams& sp, Link& link, const Place& at, uint32_t cta, char* from, uint32_t t,
                                    uint32_t owner, int k) {
    const Params& p = sp.base;
    const uint32_t v = at.vector(k), lanes = Loop::lanes(p, at, k), lane = threadIdx.x % kWarp;
    const bool handles = v % kLanes == 0, marked = sp.payload.marks, leading = kFamily >= kDynamic && leads(p, v);
    char* const codes = from + sp.payload.codes_at + v * kCodeBytes;
    char* const marks = from + sp.payload.marks_at + v / kWarp * (8 * kWords);
    char* const scales = from + sp.payload.scales_at + scale_of(p, v) * 4;
    uint32_t words[kWords] = {}, scale = 0, empty[2 * kWords] = {};
    await_arrival(
        p, link, cta, ARF_SHARDED, t, lanes,
        [&] {
          uint32_t largest = 0;
          if (handles) {
            if constexpr (kWords == 2) {
              load_words(codes, words[0], words[1]);
            } else {
              words[0] = load_word(codes);
            }
#pragma unroll
            for (int i = 0; i < kWords; ++i) largest = max(largest, words[i]);
          }
          if (marked) {
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              load_words(marks + 8 * i, empty[2 * i], empty[2 * i + 1]);
              largest = max(largest, max(empty[2 * i], empty[2 * i + 1]));
            }
          }
          if (leading) {
            scale = load_word(scales);
            largest = max(largest, scale);
          }
          return largest != kEmpty;
        },
        [&] { return owner; }, [] {});
    link.dead = __any_sync(lanes, link.dead); /* lanes go on together */
    const bool nan_codes = kFamily != kFp4 && p.quant.format() != Format::kInt8;
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      if (marked && (empty[2 * i + lane / 16] >> lane % 16 & 1u)) words[i] = kEmpty;
      if (link.dead) words[i] = nan_codes ? 0x7F7F7F7Fu : 0u; /* the codes of a row of NaN */
    }
    uint8_t* const out = static_cast<uint8_t*>(p.quant_out) + (static_cast<uint64_t>(t) * p.vectors + v) * kCodeBytes;
    if (handles) {
      if constexpr (kWords == 2) {
        *reinterpret_cast<uint2*>(out) = make_uint2(words[0], words[1]);
      } else {
        *reinterpret_cast<uint32_t*>(out) = words[0];
      }
    }
    if constexpr (kFamily >= kDynamic) {
      if (leading) store_scale(p, link, t, v, scale);
    }
    if (link.dead) return;
    if (handles) {
#pragma unroll
      for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(codes)[i] = kEmpty;
    }
    if (leading) *reinterpret_cast<uint32_t*>(scales) = kEmpty;
    if (marked) {
      __syncwarp(lanes); /* all have read them */
      if (lane == 0) { /* a row's last tile may have no other */
#pragma unroll
        for (int i = 0; i < 2 * kWords; ++i) reinterpret_cast<uint32_t*>(marks)[i] = kEmpty;
      }
    }
  }

  ARF_DEVICE static void store_scale(const Params& p, const Link& link, uint32_t t, uint32_t v, uint32_t word) {
    if constexpr (kFamily == kFp4) {
      if (link.dead) word = 0x7F7F7F7Fu;
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        const uint32_t g = v / (kFp4Scales / 4) + j;
        if (g < p.groups) store_byte(scale_address(p, t, g), word >> 8 * j);
      }
    } else if (is_byte(p)) {
      store_byte(scale_address(p, t, scale_of(p, v)), link.dead ? 0xFFu : word);
    } else {
      store_float(scale_address(p, t, scale_of(p, v)), link.dead ? float_of(0x7FFFFFFFu) : float_of(word));
    }
  }
};

template <int kDtype, int kWorld, int kFamily, int kHeld, int kCalls>
__global__ void __launch_bounds__(kMaxThreads, 1) sharded_kernel(const __grid_constant__ ShardedParams p) {
  __shared__ Scratch storage;
  const Shared scratch(storage);
  Sharded<kDtype, kWorld, kFamily, kHeld, kCalls>::run(p, scratch, {blockIdx.x, gridDim.x, blockIdx.x, gridDim.x, {0, 1}});
}

/* All ranks in one launch: CTA b is rank b mod world's CTA b / world (kernels.cuh: simulated_kernel). */
template <int kDtype, int kFamily, int kCalls>
__global__ void __launch_bounds__(kMaxThreads, 1) simulated_sharded_kernel(const __grid_constant__ SimulatedShardedParams all,
                                                                           int world) {
  __shared__ Scratch storage;
  __shared__ ShardedParams p;
  const Shared scratch(storage);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&all.rank[blockIdx.x % world]);
  for (unsigned i = threadIdx.x; i < sizeof(ShardedParams) / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(&p)[i] = from[i];
  __syncthreads();
  const uint32_t cta = blockIdx.x / world, ctas = gridDim.x / world;
  Sharded<kDtype, 0, kFamily, kCalls != kAnyCalls ? 1 : kMaxVectors<kDtype>, kCalls>::run(p, scratch, {cta, ctas, cta, ctas, {0, 1}});
}

}  // namespace arf

/* The body of a kernel getter: table[row][family], rows as in ShardedRow (params.h). */
#define ARF_SHARDED_ROW(D, W, K, C)                                                                 \
  {reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::kPlain, K, C>),                    \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::kStatic, K, C>),                   \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::kDynamic, K, C>),                  \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::kFp4, K, C>),                      \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::usual_of(C), K, C>),               \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::mx_of(C), K, C>),                  \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::usual_of(C), K, C>),               \
   reinterpret_cast<const void*>(&arf::sharded_kernel<D, W, arf::usual_of(C), K, C>)}
#define ARF_SIMULATED_SHARDED_ROW(D, C)                                                             \
  {reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::kPlain, C>),                \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::kStatic, C>),               \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::kDynamic, C>),              \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::kFp4, C>),                  \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::usual_of(C), C>),           \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::mx_of(C), C>),              \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::usual_of(C), C>),           \
   reinterpret_cast<const void*>(&arf::simulated_sharded_kernel<D, arf::usual_of(C), C>)}
#define ARF_SHARDED_TABLE(D)                                                                        \
  static const arf::KernelRow table[arf::kShardedRows] = {                                          \
      ARF_SHARDED_ROW(D, 2, 1, arf::kCommonCalls), ARF_SHARDED_ROW(D, 2, 1, arf::kAnyCalls),        \
      ARF_SHARDED_ROW(D, 0, arf::kMaxVectors<D>, arf::kAnyCalls),                                   \
      ARF_SIMULATED_SHARDED_ROW(D, arf::kAnyCalls), ARF_SIMULATED_SHARDED_ROW(D, arf::kCommonCalls)};
