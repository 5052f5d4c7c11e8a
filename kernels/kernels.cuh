/* The kernels: local, one-shot and two-shot, each a loop over tokens with the same epilogue.
 *
 * W: 1 local; 2, 4, 8; 0 for any world up to 8. K: vectors a thread may hold of a row; 1 where the row has at most
 * 1024 (hidden 8192, fp32 4096), which keeps the decode kernels nearly free of spills. Dependencies between ranks are only ever between CTAs of the same index
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
  ARF_DEVICE static bool holds(const Params& p, const Place& at, int k) {
    return (k == 0 || k < p.per_thread) && at.vector(k) < p.vectors;
  }

  ARF_DEVICE static Own load_own(const Params& p, const Place& at, uint32_t t) {
    Own own;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      own.x[k] = make_uint4(0, 0, 0, 0);
      if (holds(p, at, k)) own.x[k] = contribution<D>(p, t, at.vector(k));
    }
    return own;
  }

  /* Of vector k in row `row` of a slot. */
  ARF_DEVICE static uint64_t offset_of(const Params& p, const Link& link, const Place& at, uint32_t row, int k) {
    return link.offset + (static_cast<uint64_t>(row) * p.vectors + at.vector(k)) * kVectorBytes;
  }

  ARF_DEVICE static void push_row(const Params& p, const Link& link, const Place& at, uint32_t row, const Own& own) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (holds(p, at, k)) push_all<W>(p, link, offset_of(p, link, at, row, k), own.x[k]);
    }
  }

  /* Brings all parameters into the constant cache: each launch has its own, so each line's first use is a miss, and those
   * in the epilogue would stand between the last arrival and the outputs. */
  ARF_DEVICE static void touch(const Params& p) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&p);
    constexpr int kWords = sizeof(Params) / 4, kLine = 16;
    uint32_t mix = words[kWords - 1];
#pragma unroll
    for (int i = 0; i < kWords; i += kLine) mix = mix * 31 + words[i];
    if (mix == 0x5bd1e995u) __nanosleep(1); /* a use of the words that cannot be dropped; harmless the one time in 2^32 */
  }

  /* What needs no data of other kernels comes before the wait for them. */
  ARF_DEVICE static Place begin(const Params& p, Scratch& scratch, const Position& position) {
    const Place at = {position.part, position.part.rank * blockDim.x, 0};
    open_barriers(scratch.barriers, 4, at.part);
    touch(p);
    wait_for_previous_kernel();
    if (p.flags & kTriggerEarly) let_next_kernel_start();
    return at;
  }

  ARF_DEVICE static void start(const Params& p, const Place& at, unsigned cta, unsigned ctas, float& given) {
    if constexpr (F == kStatic || F == kFp4) given = E::Q::given_scale(p);
    E::fetch_weight(p, at);
    if (F >= kDynamic && p.pad) {
      write_padding(p, threadIdx.x + cta * blockDim.x, static_cast<uint64_t>(ctas) * blockDim.x);
    }
  }

  ARF_DEVICE static void local(const Params& p, Scratch& scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta, ctas = position.ctas, first = position.first, step = position.step;
    float given = 0.0f;
    Own own = load_own(p, at, first);
    typename E::Residual residual = E::load_residual(p, first, at.vector(0), holds(p, at, 0));
    start(p, at, cta, ctas, given);
    for (uint32_t t = first; t < p.tokens; t += step, ++at.row) {
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, at, k)) continue;
        if (k) residual = E::load_residual(p, t, at.vector(k), true);
        float sum[N];
        unpack<D>(own.x[k], sum);
        E::finish_sum(p, t, at.vector(k), sum, residual, row[k]);
      }
      /* The next row's loads overlap with this row's reduction. In-place use is safe: rows do not overlap. */
      if (t + step < p.tokens) {
        own = load_own(p, at, t + step);
        residual = E::load_residual(p, t + step, at.vector(0), holds(p, at, 0));
      }
      if (t == first) await_fetches(), join_cluster(at.part);
      E::finish_row(p, scratch, at, t, row, given);
    }
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
  }

  ARF_DEVICE static void one_shot(const Params& p, Scratch& scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta, ctas = position.ctas, first = position.first, step = position.step;
    Own own = load_own(p, at, first);
    Link link = open_link(p, cta);
    typename E::Residual residual[K];
#pragma unroll
    for (int k = 0; k < K; ++k) residual[k] = E::load_residual(p, first, at.vector(k), holds(p, at, k));
    push_row(p, link, at, first, own);
    float given = 0.0f;
    start(p, at, cta, ctas, given);
    const bool ahead = p.op == ARF_OP_ALLREDUCE; /* a MoE row is not gathered twice */
    for (uint32_t t = first; t < p.tokens; t += step, ++at.row) {
      if (t != first) {
        own = load_own(p, at, t);
        if (!ahead) push_row(p, link, at, t, own);
#pragma unroll
        for (int k = 0; k < K; ++k) residual[k] = E::load_residual(p, t, at.vector(k), holds(p, at, k));
      }
      /* The next row travels while this one is awaited; it is read again then, from L2, rather than held in registers. */
      if (ahead && t + step < p.tokens) {
        push_row(p, link, at, t + step, load_own(p, at, t + step));
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (holds(p, at, k)) E::prefetch_residual(p, t + step, at.vector(k));
        }
      }
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, at, k)) continue;
        float sum[N];
        receive_sum<D, W>(p, link, cta, p.own + offset_of(p, link, at, t, k), t, own.x[k], sum);
        E::finish_sum(p, t, at.vector(k), sum, residual[k], row[k]);
      }
      if (t == first) await_fetches(), join_cluster(at.part);
      E::finish_row(p, scratch, at, t, row, given);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (holds(p, at, k)) empty_all<W>(p, link, p.own + offset_of(p, link, at, t, k));
      }
    }
    finish(p, link, at, cta, ctas);
  }

  /* Two-shot's work for a CTA: row q of every slot, that is tokens q * world to q * world + world - 1, or with p.split
   * above 1 a share of them: those whose owner is `share` modulo split. */
  struct Unit {
    uint32_t q, share;
  };

  ARF_DEVICE static Unit unit(const Params& p, uint32_t u) {
    if constexpr (W != 0) return {u >> p.split_shift, u & (p.split - 1)};
    return {u / p.split, u % p.split};
  }

  ARF_DEVICE static bool shares(const Params& p, const Unit& u, uint32_t owner) {
    return (p.split == world(p) ? owner : owner & (p.split - 1)) == u.share;
  }

  /* Token t belongs to rank t mod world. Buffer of a generation: world - 1 scatter slots of ceil(tokens / world) rows
   * (what each peer contributes to my tokens), then as many gather slots (each peer's sums); row t / world. */
  ARF_DEVICE static void two_shot(const Params& p, Scratch& scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta, first = position.first, step = position.step;
    Link link = open_link(p, cta);
    const uint32_t units = (p.tokens + world(p) - 1) / world(p) * p.split;
    const uint64_t gather = static_cast<uint64_t>(world(p) - 1) * p.slot_bytes;
    for (uint32_t u = first; u < units; u += step) scatter(p, link, at, unit(p, u));
    float given = 0.0f;
    start(p, at, cta, position.ctas, given);
    join_cluster(at.part);
    for (uint32_t u = first; u < units; u += step) {
      const Unit mine = unit(p, u);
      const uint32_t t = mine.q * world(p) + p.rank;
      if (t >= p.tokens || !shares(p, mine, p.rank)) continue;
      const Own own = load_own(p, at, t);
      float row[K][N];
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int i = 0; i < N; ++i) row[k][i] = 0.0f;
        if (!holds(p, at, k)) continue;
        const uint64_t offset = offset_of(p, link, at, mine.q, k);
        const typename E::Residual residual = E::load_residual(p, t, at.vector(k), true);
        float sum[N];
        receive_sum<D, W>(p, link, cta, p.own + offset, t, own.x[k], sum);
        push_all<W>(p, link, gather + offset, pack<D>(sum));
        E::finish_sum(p, t, at.vector(k), sum, residual, row[k]);
      }
      if (at.row == 0) await_fetches();
      E::finish_row(p, scratch, at, t, row, given);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (holds(p, at, k)) empty_all<W>(p, link, p.own + offset_of(p, link, at, mine.q, k));
      }
      ++at.row;
    }
    for (uint32_t u = first; u < units; u += step) {
      const Unit others = unit(p, u);
      for (int i = 0; i < world(p) - 1; ++i) {
        const uint32_t owner = peer(p, i);
        const uint32_t t = others.q * world(p) + owner;
        if (t >= p.tokens || !shares(p, others, owner)) continue;
        char* const sums = p.own + gather + static_cast<uint64_t>(slot_of(owner, p.rank)) * p.slot_bytes;
        float row[K][N];
#pragma unroll
        for (int k = 0; k < K; ++k) {
#pragma unroll
          for (int j = 0; j < N; ++j) row[k][j] = 0.0f;
          if (!holds(p, at, k)) continue;
          char* const from = sums + offset_of(p, link, at, others.q, k);
          const typename E::Residual residual = E::load_residual(p, t, at.vector(k), true);
          float sum[N];
          unpack<D>(receive_one(p, link, cta, from, ARF_TWOSHOT_GATHER, t, owner), sum);
          E::finish_sum(p, t, at.vector(k), sum, residual, row[k]);
        }
        if (at.row == 0) await_fetches();
        E::finish_row(p, scratch, at, t, row, given);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (holds(p, at, k)) empty_one(link, sums + offset_of(p, link, at, others.q, k));
        }
        ++at.row;
      }
    }
    finish(p, link, at, cta, position.ctas);
  }

  /* Our contribution to every peer's tokens of a unit. */
  ARF_DEVICE static void scatter(const Params& p, const Link& link, const Place& at, const Unit& u) {
    if (link.dead) return;
#pragma unroll 1
    for (int k = 0; k < K; ++k) {
      if (!holds(p, at, k)) continue;
      const uint64_t offset = offset_of(p, link, at, u.q, k);
      for (int r = 0; p.split > 1 && r < world(p); ++r) { /* with many rows a CTA the prefetches only compete with the pushes */
        const uint32_t t = u.q * world(p) + r;
        if (t < p.tokens && shares(p, u, r)) E::prefetch_residual(p, t, at.vector(k));
      }
      if constexpr (W > 1) { /* all loads in flight before the first store */
        uint4 x[W - 1];
        bool sends[W - 1];
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
          const uint32_t t = u.q * W + peer(p, i);
          sends[i] = t < p.tokens && shares(p, u, peer(p, i));
          if (sends[i]) x[i] = contribution<D>(p, t, at.vector(k));
        }
#pragma unroll
        for (int i = 0; i < W - 1; ++i) {
          if (sends[i]) store_volatile(p.push[i] + offset, pushable(x[i]));
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < p.world - 1; ++i) {
          const uint32_t t = u.q * p.world + peer(p, i);
          if (t >= p.tokens || !shares(p, u, peer(p, i))) continue;
          store_volatile(p.push[i] + offset, pushable(contribution<D>(p, t, at.vector(k))));
        }
      }
    }
  }

  /* The rank that push[i] belongs to. */
  ARF_DEVICE static uint32_t peer(const Params& p, int i) {
    const int r = p.rank + 1 + i;
    return r < world(p) ? r : r - world(p);
  }

  ARF_DEVICE static void finish(const Params& p, const Link& link, const Place& at, unsigned cta, unsigned ctas) {
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
    if (!p.need_norm || at.row == 0) __syncthreads(); /* else a row's reduction was the barrier since open_link */
    rotate(p, link, cta, ctas);
  }
};

template <int D, int W, int F, int K, bool kTwoShot>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_kernel(const __grid_constant__ Params p) {
  __shared__ Scratch scratch;
  const Position position = {blockIdx.x, gridDim.x, cluster_number(), cluster_count(), {rank_in_cluster(), p.cluster}};
  if constexpr (W == 1) {
    Kernel<D, W, F, K>::local(p, scratch, position);
  } else if constexpr (kTwoShot) {
    Kernel<D, W, F, K>::two_shot(p, scratch, position);
  } else {
    Kernel<D, W, F, K>::one_shot(p, scratch, position);
  }
}

/* All ranks in one launch: cluster b is rank b mod world's cluster b / world, so that CTAs of one index are dispatched together.
 * The same device code as the any-world kernels; only the parameters lie in shared memory. */
template <int D, int F, bool kTwoShot>
__global__ void __launch_bounds__(kMaxThreads, 1) simulated_kernel(const __grid_constant__ SimulatedParams all, int world) {
  __shared__ Scratch scratch;
  __shared__ Params p;
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&all.rank[cluster_number() % world]);
  for (unsigned i = threadIdx.x; i < sizeof(Params) / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(&p)[i] = from[i];
  __syncthreads();
  const uint32_t first = cluster_number() / world, part = rank_in_cluster();
  const Position position = {first * p.cluster + part, gridDim.x / world, first, cluster_count() / world, {part, p.cluster}};
  if constexpr (kTwoShot) {
    Kernel<D, 0, F, kMaxVectors<D>>::two_shot(p, scratch, position);
  } else {
    Kernel<D, 0, F, kMaxVectors<D>>::one_shot(p, scratch, position);
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
