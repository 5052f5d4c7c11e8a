/* The kernels: local, one-shot and two-shot, each a loop over tokens with the same epilogue.
 *
 * W: 1 local; 2, 4, 8; 0 for any world up to 8. K: vectors a thread may hold of a row; 1 where the row has at most 1024
 * (hidden 8192, fp32 4096), which keeps the decode kernels free of spills. Dependencies between ranks are only ever between CTAs of the same index
 * (same tokens), and CTAs are dispatched in order, so a grid larger than what fits at once still makes progress. */
#pragma once
#include "epilogue.cuh"
#include "exchange.cuh"
#include "prologue.cuh"

namespace arf {

template <int D, int W, int F, int K>
struct Kernel {
  using E = Epilogue<D, F, K>;
  static constexpr int N = E::N;

  struct Own {
    uint4 x[K];
  };

  ARF_DEVICE static int world(const Params& p) { return W ? W : p.world; }
  ARF_DEVICE static uint32_t vector_of(int k) { return threadIdx.x + k * blockDim.x; }

  ARF_DEVICE static Own load_own(const Params& p, uint32_t t) {
    Own own;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      own.x[k] = make_uint4(0, 0, 0, 0);
      if (holds(p, k)) own.x[k] = contribution<D>(p, t, vector_of(k));
    }
    return own;
  }

  ARF_DEVICE static bool holds(const Params& p, int k) { return (k == 0 || k < p.per_thread) && vector_of(k) < p.vectors; }

  /* Of vector k in row `row` of a slot. */
  ARF_DEVICE static uint64_t offset_of(const Params& p, const Link& link, uint32_t row, int k) {
    return link.offset + (static_cast<uint64_t>(row) * p.vectors + vector_of(k)) * kVectorBytes;
  }

  ARF_DEVICE static void push_row(const Params& p, const Link& link, uint32_t row, const Own& own) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (holds(p, k)) push_all<W>(p, link, offset_of(p, link, row, k), own.x[k]);
    }
  }

  ARF_DEVICE static void start(const Params& p, unsigned cta, unsigned ctas, float& given) {
    if constexpr (F == kStatic || F == kFp4) given = E::Q::given_scale(p);
    E::fetch_weight(p);
    if (F >= kDynamic && p.pad) {
      write_padding(p, threadIdx.x + cta * blockDim.x, static_cast<uint64_t>(ctas) * blockDim.x);
    }
  }

  ARF_DEVICE static void local(const Params& p, Scratch& scratch, unsigned cta, unsigned ctas) {
    wait_for_previous_kernel();
    if (p.flags & kTriggerEarly) let_next_kernel_start();
    float given = 0.0f;
    uint32_t parity = 0;
    Own own = load_own(p, cta);
    start(p, cta, ctas, given);
    for (uint32_t t = cta; t < p.tokens; t += ctas, parity ^= 1) {
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, k)) continue;
        float sum[N];
        unpack<D>(own.x[k], sum);
        E::finish_sum(p, t, vector_of(k), sum, E::load_residual(p, t, vector_of(k)), row[k]);
      }
      /* The next row's load overlaps with this row's reduction. In-place use is safe: rows do not overlap. */
      if (t + ctas < p.tokens) own = load_own(p, t + ctas);
      if (t == cta) await_fetches();
      E::finish_row(p, scratch, parity, t, row, given);
    }
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
  }

  ARF_DEVICE static void one_shot(const Params& p, Scratch& scratch, unsigned cta, unsigned ctas) {
    wait_for_previous_kernel();
    if (p.flags & kTriggerEarly) let_next_kernel_start();
    Own own = load_own(p, cta);
    Link link = open_link(p, cta);
    push_row(p, link, cta, own);
    float given = 0.0f;
    start(p, cta, ctas, given);
    uint32_t parity = 0;
    for (uint32_t t = cta; t < p.tokens; t += ctas, parity ^= 1) {
      typename E::Residual residual[K];
#pragma unroll
      for (int k = 0; k < K; ++k) {
        residual[k] = {};
        if (holds(p, k)) residual[k] = E::load_residual(p, t, vector_of(k));
      }
      /* The next row travels while this one is awaited. */
      Own next = {};
      if (t + ctas < p.tokens) {
        next = load_own(p, t + ctas);
        push_row(p, link, t + ctas, next);
      }
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, k)) continue;
        float sum[N];
        receive_sum<D, W>(p, link, cta, p.own + offset_of(p, link, t, k), t, own.x[k], sum);
        E::finish_sum(p, t, vector_of(k), sum, residual[k], row[k]);
      }
      own = next;
      if (t == cta) await_fetches();
      E::finish_row(p, scratch, parity, t, row, given);
    }
    finish(p, link, cta, ctas);
  }

  /* Token t belongs to rank t mod world. Buffer of a generation: world - 1 scatter slots of ceil(tokens / world) rows
   * (what each peer contributes to my tokens), then as many gather slots (each peer's sums); row t / world. */
  ARF_DEVICE static void two_shot(const Params& p, Scratch& scratch, unsigned cta, unsigned ctas) {
    wait_for_previous_kernel();
    if (p.flags & kTriggerEarly) let_next_kernel_start();
    Link link = open_link(p, cta);
    const uint32_t rows = (p.tokens + world(p) - 1) / world(p);
    const uint64_t gather = static_cast<uint64_t>(world(p) - 1) * p.slot_bytes;
    for (uint32_t q = cta; q < rows; q += ctas) scatter(p, link, q);
    float given = 0.0f;
    start(p, cta, ctas, given);
    uint32_t parity = 0;
    bool fetched = false;
    for (uint32_t q = cta; q < rows; q += ctas) {
      const uint32_t t = q * world(p) + p.rank;
      if (t >= p.tokens) break;
      Own own = load_own(p, t);
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, k)) continue;
        const uint64_t at = offset_of(p, link, q, k);
        const typename E::Residual residual = E::load_residual(p, t, vector_of(k));
        float sum[N];
        receive_sum<D, W>(p, link, cta, p.own + at, t, own.x[k], sum);
        push_all<W>(p, link, gather + at, pack<D>(sum));
        E::finish_sum(p, t, vector_of(k), sum, residual, row[k]);
      }
      if (!fetched) await_fetches();
      fetched = true;
      E::finish_row(p, scratch, parity, t, row, given);
      parity ^= 1;
    }
    if (!fetched) await_fetches();
    for (uint32_t q = cta; q < rows; q += ctas) {
      for (int i = 1; i < world(p); ++i) {
        const int owner = p.rank + i < world(p) ? p.rank + i : p.rank + i - world(p);
        const uint32_t t = q * world(p) + owner;
        if (t >= p.tokens) continue;
        float row[K][N];
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int j = 0; j < N; ++j) row[k][j] = 0.0f;
          if (!holds(p, k)) continue;
          const uint64_t at =
              gather + static_cast<uint64_t>(slot_of(owner, p.rank)) * p.slot_bytes + offset_of(p, link, q, k);
          const typename E::Residual residual = E::load_residual(p, t, vector_of(k));
          float sum[N];
          unpack<D>(receive_one(p, link, cta, p.own + at, ARF_TWOSHOT_GATHER, t, owner), sum);
          E::finish_sum(p, t, vector_of(k), sum, residual, row[k]);
        }
        E::finish_row(p, scratch, parity, t, row, given);
        parity ^= 1;
      }
    }
    finish(p, link, cta, ctas);
  }

  /* Our contribution to row q of every peer's tokens. */
  ARF_DEVICE static void scatter(const Params& p, const Link& link, uint32_t q) {
    if (link.dead) return;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      if (!holds(p, k)) continue;
      const uint64_t at = offset_of(p, link, q, k);
      if constexpr (W > 1) { /* all loads in flight before the first store */
        uint4 x[W - 1];
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
          const uint32_t t = q * W + peer(p, i);
          if (t < p.tokens) x[i] = contribution<D>(p, t, vector_of(k));
        }
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
          if (q * W + peer(p, i) < p.tokens) store_volatile(p.push[i] + at, pushable(x[i]));
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < p.world - 1; ++i) {
          const uint32_t t = q * p.world + peer(p, i);
          if (t < p.tokens) store_volatile(p.push[i] + at, pushable(contribution<D>(p, t, vector_of(k))));
        }
      }
    }
  }

  /* The rank that push[i] belongs to. */
  ARF_DEVICE static uint32_t peer(const Params& p, int i) {
    const int r = p.rank + 1 + i;
    return r < world(p) ? r : r - world(p);
  }

  ARF_DEVICE static void finish(const Params& p, const Link& link, unsigned cta, unsigned ctas) {
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
    if (!p.need_norm) __syncthreads(); /* else the first row's reduction was the barrier since open_link */
    rotate(p, link, cta, ctas);
  }
};

template <int D, int W, int F, int K, bool kTwoShot>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_kernel(const __grid_constant__ Params p) {
  __shared__ Scratch scratch;
  if constexpr (W == 1) {
    Kernel<D, W, F, K>::local(p, scratch, blockIdx.x, gridDim.x);
  } else if constexpr (kTwoShot) {
    Kernel<D, W, F, K>::two_shot(p, scratch, blockIdx.x, gridDim.x);
  } else {
    Kernel<D, W, F, K>::one_shot(p, scratch, blockIdx.x, gridDim.x);
  }
}

/* All ranks in one launch: CTA b is rank b mod world's CTA b / world, so that CTAs of one index are dispatched together.
 * The same device code as the any-world kernels; only the parameters lie in shared memory. */
template <int D, int F, bool kTwoShot>
__global__ void __launch_bounds__(kMaxThreads, 1) simulated_kernel(const __grid_constant__ SimulatedParams all, int world) {
  __shared__ Scratch scratch;
  __shared__ Params p;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&all.rank[blockIdx.x % world]);
  for (unsigned i = threadIdx.x; i < sizeof(Params) / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(&p)[i] = from[i];
  __syncthreads();
  const unsigned cta = blockIdx.x / world, ctas = gridDim.x / world;
  if constexpr (kTwoShot) {
    Kernel<D, 0, F, kMaxVectors<D>>::two_shot(p, scratch, cta, ctas);
  } else {
    Kernel<D, 0, F, kMaxVectors<D>>::one_shot(p, scratch, cta, ctas);
  }
}

}  // namespace arf

/* The body of a kernel getter: table[strategy][family]; for the local kernels the second row is the one for wide rows. */
#define ARF_FUSED_ROW(D, W, K, TWO)                                                                                     \
  {reinterpret_cast<const void*>(&arf::fused_kernel<D, W, arf::kPlain, K, TWO>),                                        \
   reinterpret_cast<const void*>(&arf::fused_kernel<D, W, arf::kStatic, K, TWO>),                                       \
   reinterpret_cast<const void*>(&arf::fused_kernel<D, W, arf::kDynamic, K, TWO>),                                      \
   reinterpret_cast<const void*>(&arf::fused_kernel<D, W, arf::kFp4, K, TWO>)}
#define ARF_SIMULATED_ROW(D, TWO)                                                                                       \
  {reinterpret_cast<const void*>(&arf::simulated_kernel<D, arf::kPlain, TWO>),                                          \
   reinterpret_cast<const void*>(&arf::simulated_kernel<D, arf::kStatic, TWO>),                                         \
   reinterpret_cast<const void*>(&arf::simulated_kernel<D, arf::kDynamic, TWO>),                                        \
   reinterpret_cast<const void*>(&arf::simulated_kernel<D, arf::kFp4, TWO>)}
#define ARF_LOCAL_TABLE(D)                                                                                              \
  static const void* const table[2][arf::kFamilies] = {ARF_FUSED_ROW(D, 1, 1, false),                                   \
                                                       ARF_FUSED_ROW(D, 1, arf::kMaxVectors<D>, false)};
#define ARF_WORLD_TABLE(D, W)                                                                                           \
  static const void* const table[2][arf::kFamilies] = {ARF_FUSED_ROW(D, W, 1, false), ARF_FUSED_ROW(D, W, 1, true)};
#define ARF_ANY_TABLE(D)                                                                                                \
  static const void* const table[2][arf::kFamilies] = {ARF_FUSED_ROW(D, 0, arf::kMaxVectors<D>, false),                 \
                                                       ARF_FUSED_ROW(D, 0, arf::kMaxVectors<D>, true)};
#define ARF_SIMULATED_TABLE(D)                                                                                          \
  static const void* const table[2][arf::kFamilies] = {ARF_SIMULATED_ROW(D, false), ARF_SIMULATED_ROW(D, true)};
