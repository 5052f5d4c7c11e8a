/* The kernels: local, one-shot and two-shot, each a loop over tokens with the same epilogue.
 *
 * kWorld: 1 local; 2, 4, 8; 0 for any world up to 8. kHeld: vectors a thread may hold of a row; 1 where the row has at most
 * 1024 (hidden 8192, fp32 4096), which keeps the decode kernels nearly free of spills. kCalls: what is known of the call.
 * A CTA finishes rows that follow one another (rows_of), and waits for pushes by those CTAs of other ranks that have the same
 * rows, or by the first p.pushers CTAs, which wait for nobody. CTAs are dispatched in order, so rows begin in order on every
 * rank, and a grid larger than what fits at once still makes progress, whatever sizes the other ranks' grids have: of two CTAs
 * that wait for each other, the one whose rows end first waits for no row behind them. */
#pragma once
#include "epilogue.cuh"
#include "exchange.cuh"
#include "prologue.cuh"

namespace arf {

template <int kDtype, int kWorld, int kFamily, int kHeld, int kCalls>
struct Kernel {
  using E = Epilogue<kDtype, kFamily, kHeld, kCalls>;
  static constexpr bool kCommon = E::kCommon;
  static constexpr int N = E::N;

  struct Own {
    uint4 x[kHeld];
  };

  ARF_DEVICE static int world(const Params& p) { return kWorld ? kWorld : p.world; }
  ARF_DEVICE static bool holds(const Params& p, const Place& at, int k) {
    return (k == 0 || k < p.per_thread) && at.vector(k) < p.vectors;
  }

  /* What a lane without a vector holds. */
  ARF_DEVICE static void zero(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = 0.0f;
  }

  ARF_DEVICE static Own load_own(const Params& p, const Place& at, uint32_t t) {
    Own own;
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      own.x[k] = make_uint4(0, 0, 0, 0);
      if (holds(p, at, k)) own.x[k] = contribution<kDtype, kCommon>(p, t, at.vector(k));
    }
    return own;
  }

  /* Of vector k in row `row` of a slot. */
  ARF_DEVICE static uint64_t offset_of(const Params& p, const Link& link, const Place& at, uint32_t row, int k) {
    return link.offset + (static_cast<uint64_t>(row) * p.vectors + at.vector(k)) * kVectorBytes;
  }

  ARF_DEVICE static void push_row(const Params& p, const Link& link, const Place& at, uint32_t row, const Own& own) {
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (holds(p, at, k)) push_all<kWorld>(p, link, offset_of(p, link, at, row, k), own.x[k]);
    }
  }

  /* What needs no data of other kernels comes before the wait for them. First all parameters into the constant cache: each
   * launch has its own, so each line's first use is a miss, and those in the epilogue would stand between the last arrival
   * and the outputs. */
  ARF_DEVICE static Place begin(const Params& p, Shared scratch, const Position& position) {
    stamp(kStarted);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&p);
    constexpr int kWords = sizeof(Params) / 4, kLine = 16;
    uint32_t mix = words[kWords - 1];
#pragma unroll
    for (int i = 0; i < kWords; i += kLine) mix = mix * 31 + words[i];
    const Place at = {position.part, p.tiles, p.flags, position.part.rank * blockDim.x, 0};
    E::clear_tiles(p, scratch);
    open_barriers(scratch.barriers(0), 4, at.part);
    if (mix == 0x5bd1e995u) __nanosleep(1); /* a use of the words that cannot be dropped; harmless the one time in 2^32 */
    wait_for_previous_kernel();
    stamp(kWaited);
    if (p.flags & kTriggerEarly) let_next_kernel_start();
    return at;
  }

  using Given = typename E::Given;

  /* The rows (units), of `rows`, that are finished by CTA or cluster `c` of `count`. */
  struct Rows {
    uint32_t first, end;
  };
  ARF_DEVICE static Rows rows_of(const Params& p, uint32_t c, uint32_t count, uint32_t rows) {
    if constexpr (E::kStraight) return {c, c + 1};
    const uint32_t over = rows - count * p.rows_each, first = c * p.rows_each + min(c, over);
    return {first, first + p.rows_each + (c < over)};
  }

  /* Before a further row in a cluster. A warp without a tile sends nothing that the others wait for, and two rows later they use
   * this row's barrier again: it would wait for a phase that is over. (Data hold them back, but not once the link is dead.) */
  ARF_DEVICE static void keep_together(const Place& at) {
    if (at.part.count > 1) __syncthreads();
  }

  /* CTA `cta` of `ctas` that finish rows. */
  ARF_DEVICE static Given start(const Params& p, const Place& at, unsigned cta, unsigned ctas) {
    const Given given = E::given(p, at);
    if (kFamily >= kDynamic && p.pad) {
      write_padding(p, threadIdx.x + cta * blockDim.x, static_cast<uint64_t>(ctas) * blockDim.x);
    }
    return given;
  }

  ARF_DEVICE static void local(const Params& p, Shared scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta, ctas = position.ctas, first = position.cluster, step = position.clusters;
    Own own = load_own(p, at, first);
    typename E::Residual residual = E::load_residual(p, first, at.vector(0), holds(p, at, 0));
    const Given given = start(p, at, cta, ctas);
    E::await_weight();
    join_cluster(at.part);
    for (uint32_t t = first; t < p.tokens; t += step, ++at.row) {
      const typename E::Targets to = E::targets(p, at, t);
      float row[kHeld][N];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        zero(row[k]);
        if (!holds(p, at, k)) continue;
        if (k) residual = E::load_residual(p, t, at.vector(k), true);
        E::add_residual(p, t, at.vector(k), own.x[k], residual, row[k], to);
      }
      /* The next row's loads overlap with this row's reduction. In-place use is safe: rows do not overlap. */
      if (t + step < p.tokens) {
        keep_together(at);
        own = load_own(p, at, t + step);
        residual = E::load_residual(p, t + step, at.vector(0), holds(p, at, 0));
      }
      E::norm_and_quantise(p, scratch, at, given, t, row, to);
    }
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
  }

  ARF_DEVICE static void one_shot(const Params& p, Shared scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta, ctas = position.ctas;
    Link link = open_link(p, cta);
    const uint32_t beside = begin_alone(p, cta);
    if (cta < p.pushers) { /* then clusters are of one CTA */
      settle(p, link);
      push_rows(p, link, at, cta);
      return end_launch(p, link, at, cta, ctas, beside);
    }
    const auto [first, end] = rows_of(p, position.cluster - p.pushers, position.clusters - p.pushers, p.tokens);
    Own own = load_own(p, at, first);
    typename E::Residual residual[kHeld];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) residual[k] = E::load_residual(p, first, at.vector(k), holds(p, at, k));
    settle(p, link);
    if (!p.pushers) push_row(p, link, at, first, own);
    stamp(kPushed);
    note_push(link);
    Given given = start(p, at, cta - p.pushers, ctas - p.pushers);
    E::await_weight();
    join_cluster(at.part);
    E::tell(p, scratch);
    __syncthreads(); /* all have read the pair; while the first row is on its way this and the stores cost nothing */
    E::know(scratch, at, given);
    rotate(p, link, cta, ctas);
    /* A straight call's CTA has one row. */
    for (uint32_t t = first; E::kStraight ? at.row == 0 : t < end; ++t, ++at.row) {
      if (!E::kStraight && t != first) {
        keep_together(at);
        own = load_own(p, at, t);
        if (!p.pushers) push_row(p, link, at, t, own);
#pragma unroll
        for (int k = 0; k < kHeld; ++k) residual[k] = E::load_residual(p, t, at.vector(k), holds(p, at, k));
      }
      if (p.pushers && t + 1 < end) {
#pragma unroll
        for (int k = 0; k < kHeld; ++k) {
          if (holds(p, at, k)) E::prefetch_residual(p, t + 1, at.vector(k));
        }
      }
      const typename E::Targets to = E::targets(p, at, t);
      float row[kHeld][N];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        zero(row[k]);
        if (!holds(p, at, k)) continue;
        const uint4 sum = receive_sum<kDtype, kWorld>(p, link, cta, p.own + offset_of(p, link, at, t, k), t, lanes(p, at, k), own.x[k]);
        if (t == first) stamp(kArrived);
        E::add_residual(p, t, at.vector(k), sum, residual[k], row[k], to);
      }
      E::norm_and_quantise(p, scratch, at, given, t, row, to);
      if (t == first) stamp(kStored);
      if (E::kStraight && !(at.flags & kTriggerEarly)) let_next_kernel_start(); /* behind the outputs' stores */
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (holds(p, at, k)) empty_all<kWorld>(p, link, p.own + offset_of(p, link, at, t, k));
      }
    }
    if (!E::kStraight && !(p.flags & kTriggerEarly)) let_next_kernel_start();
    end_alone(p, link, cta, beside);
    keep_stamps(p, link.generation, cta);
  }

  /* Rows cta, cta + pushers, ... to all peers, in order, so that rows arrive in order and those in front are finished
   * while those behind are on the link. */
  ARF_DEVICE static void push_rows(const Params& p, const Link& link, const Place& at, uint32_t cta) {
    constexpr int kBatch = 4; /* rows whose loads are in flight together */
#pragma unroll 1
    for (int k = 0; k < kHeld; ++k) {
      if (!holds(p, at, k)) break;
      for (uint32_t t = cta; t < p.tokens; t += kBatch * p.pushers) {
        uint4 x[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (t + i * p.pushers < p.tokens) x[i] = contribution<kDtype, kCommon>(p, t + i * p.pushers, at.vector(k));
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (t + i * p.pushers < p.tokens) push_all<kWorld>(p, link, offset_of(p, link, at, t + i * p.pushers, k), x[i]);
        }
      }
    }
  }

  /* The lanes of this thread's warp that hold a k-th vector. */
  ARF_DEVICE static uint32_t lanes(const Params& p, const Place& at, int k) {
    const uint32_t tail = p.vectors - (at.vector(k) & ~(kWarp - 1));
    return tail >= kWarp ? ~0u : (1u << tail) - 1;
  }

  /* Two-shot's work for a CTA: row q of every slot, that is tokens q * world to q * world + world - 1, or with p.split
   * above 1 a share of them: those whose owner is `share` modulo split. */
  struct Unit {
    uint32_t q, share;
  };

  ARF_DEVICE static Unit unit(const Params& p, uint32_t u) {
    if constexpr (kWorld != 0) return {u >> p.split_shift, u & (p.split - 1)};
    return {u / p.split, u % p.split};
  }

  ARF_DEVICE static bool shares(const Params& p, const Unit& u, uint32_t owner) {
    return (p.split == world(p) ? owner : owner & (p.split - 1)) == u.share;
  }

  /* Token t belongs to rank t mod world. Buffer of a generation: world - 1 scatter slots of ceil(tokens / world) rows
   * (what each peer contributes to my tokens), then as many gather slots (each peer's sums); row t / world. */
  ARF_DEVICE static void two_shot(const Params& p, Shared scratch, const Position& position) {
    Place at = begin(p, scratch, position);
    const uint32_t cta = position.cta;
    Link link = open_link(p, cta);
    const uint32_t beside = begin_alone(p, cta);
    settle(p, link);
    const uint32_t units = (p.tokens + world(p) - 1) / world(p) * p.split;
    if (cta < p.pushers) {
      for (uint32_t u = cta; u < units; u += p.pushers) scatter(p, link, at, unit(p, u));
      return end_launch(p, link, at, cta, position.ctas, beside);
    }
    const auto [first, end] = rows_of(p, position.cluster - p.pushers, position.clusters - p.pushers, units);
    if (!p.pushers) {
      for (uint32_t u = first; u < end; ++u) scatter(p, link, at, unit(p, u));
    }
    const Given given = start(p, at, cta - p.pushers, position.ctas - p.pushers);
    E::await_weight();
    join_cluster(at.part);
    for (uint32_t u = first; u < end; ++u) sum_own(p, scratch, link, at, cta, given, unit(p, u));
    for (uint32_t u = first; u < end; ++u) gather(p, scratch, link, at, cta, given, unit(p, u));
    end_launch(p, link, at, cta, position.ctas, beside);
  }

  /* Our token of a unit: the sum goes to all peers before its row is finished. */
  ARF_DEVICE static void sum_own(const Params& p, Shared scratch, Link& link, Place& at, uint32_t cta, const Given& given,
                                 const Unit& u) {
    const uint32_t t = u.q * world(p) + p.rank;
    if (t >= p.tokens || !shares(p, u, p.rank)) return;
    if (at.row) keep_together(at);
    const uint64_t sums = static_cast<uint64_t>(world(p) - 1) * p.slot_bytes;
    const Own own = load_own(p, at, t);
    const typename E::Targets to = E::targets(p, at, t);
    float row[kHeld][N];
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      zero(row[k]);
      if (!holds(p, at, k)) continue;
      const uint64_t offset = offset_of(p, link, at, u.q, k);
      const typename E::Residual residual = E::load_residual(p, t, at.vector(k), true);
      const uint4 sum = receive_sum<kDtype, kWorld>(p, link, cta, p.own + offset, t, lanes(p, at, k), own.x[k]);
      push_all<kWorld>(p, link, sums + offset, sum);
      E::add_residual(p, t, at.vector(k), sum, residual, row[k], to);
    }
    E::norm_and_quantise(p, scratch, at, given, t, row, to);
#pragma unroll
    for (int k = 0; k < kHeld; ++k) {
      if (holds(p, at, k)) empty_all<kWorld>(p, link, p.own + offset_of(p, link, at, u.q, k));
    }
    ++at.row;
  }

  /* The other tokens of a unit, from their owners' sums. */
  ARF_DEVICE static void gather(const Params& p, Shared scratch, Link& link, Place& at, uint32_t cta, const Given& given,
                                const Unit& u) {
    for (int i = 0; i < world(p) - 1; ++i) {
      const uint32_t owner = peer(p, i);
      const uint32_t t = u.q * world(p) + owner;
      if (t >= p.tokens || !shares(p, u, owner)) continue;
      if (at.row) keep_together(at);
      char* const sums = p.own + static_cast<uint64_t>(world(p) - 1 + slot_of(owner, p.rank)) * p.slot_bytes;
      const typename E::Targets to = E::targets(p, at, t);
      float row[kHeld][N];
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        zero(row[k]);
        if (!holds(p, at, k)) continue;
        char* const from = sums + offset_of(p, link, at, u.q, k);
        const typename E::Residual residual = E::load_residual(p, t, at.vector(k), true);
        const uint4 sum = receive_one(p, link, cta, from, ARF_TWOSHOT_GATHER, t, owner, lanes(p, at, k));
        E::add_residual(p, t, at.vector(k), sum, residual, row[k], to);
      }
      E::norm_and_quantise(p, scratch, at, given, t, row, to);
#pragma unroll
      for (int k = 0; k < kHeld; ++k) {
        if (holds(p, at, k)) empty_one(link, sums + offset_of(p, link, at, u.q, k));
      }
      ++at.row;
    }
  }

  /* Our contribution to every peer's tokens of a unit. */
  ARF_DEVICE static void scatter(const Params& p, const Link& link, const Place& at, const Unit& u) {
    scatter(p, link, at, u, [&](uint32_t owner) { return u.q * world(p) + owner; });
  }

  /* With `token_of` an owner. */
  template <class TokenOf>
  ARF_DEVICE static void scatter(const Params& p, const Link& link, const Place& at, const Unit& u, const TokenOf& token_of) {
    if (link.dead) return;
#pragma unroll 1
    for (int k = 0; k < kHeld; ++k) {
      if (!holds(p, at, k)) continue;
      const uint64_t offset = offset_of(p, link, at, u.q, k);
      for (int r = 0; p.split > 1 && r < world(p); ++r) { /* with many rows a CTA the prefetches only compete with the pushes */
        const uint32_t t = u.q * world(p) + r;
        if (t < p.tokens && shares(p, u, r)) E::prefetch_residual(p, t, at.vector(k));
      }
      if constexpr (kWorld > 1) { /* all loads in flight before the first store */
        uint4 x[kWorld - 1];
        bool sends[kWorld - 1];
#pragma unroll
        for (int i = 0; i < kWorld - 1; ++i) {
          const uint32_t t = token_of(peer(p, i));
          sends[i] = t < p.tokens && shares(p, u, peer(p, i));
          if (sends[i]) x[i] = contribution<kDtype, kCommon>(p, t, at.vector(k));
        }
#pragma unroll
        for (int i = 0; i < kWorld - 1; ++i) {
          if (sends[i]) store_volatile(p.push[i] + offset, pushable(x[i]));
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < p.world - 1; ++i) {
          const uint32_t t = token_of(peer(p, i));
          if (t >= p.tokens || !shares(p, u, peer(p, i))) continue;
          store_volatile(p.push[i] + offset, pushable(contribution<kDtype, kCommon>(p, t, at.vector(k))));
        }
      }
    }
  }

  /* The rank that push[i] belongs to. */
  ARF_DEVICE static uint32_t peer(const Params& p, int i) {
    const int r = p.rank + 1 + i;
    return r < world(p) ? r : r - world(p);
  }

  ARF_DEVICE static void end_launch(const Params& p, const Link& link, const Place& at, unsigned cta, unsigned ctas,
                                    uint32_t beside) {
    if (!(p.flags & kTriggerEarly)) let_next_kernel_start();
    /* Else a row's reduction was the barrier since open_link; in a cluster not for a warp without a tile, which sends nothing. */
    if (!p.need_norm || at.row == 0 || at.part.count > 1) __syncthreads();
    rotate(p, link, cta, ctas);
    end_alone(p, link, cta, beside);
    keep_stamps(p, link.generation, cta);
  }
};

template <int kDtype, int kWorld, int kFamily, int kHeld, bool kTwoShot, int kCalls>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_kernel(const __grid_constant__ Params p) {
  __shared__ Scratch storage;
  const Shared scratch(storage);
  const Position position = {blockIdx.x, gridDim.x, cluster_number(), cluster_count(), {rank_in_cluster(), p.cluster}};
  if constexpr (kWorld == 1) {
    Kernel<kDtype, kWorld, kFamily, kHeld, kCalls>::local(p, scratch, position);
  } else if constexpr (kTwoShot) {
    Kernel<kDtype, kWorld, kFamily, kHeld, kCalls>::two_shot(p, scratch, position);
  } else {
    Kernel<kDtype, kWorld, kFamily, kHeld, kCalls>::one_shot(p, scratch, position);
  }
}

/* All ranks in one launch: cluster b is rank b mod world's cluster b / world, so that CTAs of one index are dispatched together.
 * The same device code as the any-world kernels; only the parameters lie in shared memory. */
template <int kDtype, int kFamily, bool kTwoShot, int kCalls>
__global__ void __launch_bounds__(kMaxThreads, 1) simulated_kernel(const __grid_constant__ SimulatedParams all, int world) {
  __shared__ Scratch storage;
  __shared__ Params p;
  const Shared scratch(storage);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(&all.rank[cluster_number() % world]);
  for (unsigned i = threadIdx.x; i < sizeof(Params) / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(&p)[i] = from[i];
  __syncthreads();
  const uint32_t first = cluster_number() / world, part = rank_in_cluster();
  const Position position = {first * p.cluster + part, gridDim.x / world, first, cluster_count() / world, {part, p.cluster}};
  constexpr int kHeld = kCalls != kAnyCalls ? 1 : kMaxVectors<kDtype>;
  if constexpr (kTwoShot) {
    Kernel<kDtype, 0, kFamily, kHeld, kCalls>::two_shot(p, scratch, position);
  } else {
    Kernel<kDtype, 0, kFamily, kHeld, kCalls>::one_shot(p, scratch, position);
  }
}

/* Which kernels exist: for straight calls, of 16 bits, all but those of any dynamic spec, and MXFP8's. */
constexpr int general(int calls) { return calls == kStraightCalls ? kCommonCalls : calls; }
constexpr int mx_of(int calls) { return calls == kStraightCalls ? kMx : kDynamic; }
constexpr int usual_of(int calls) { return calls == kAnyCalls ? kDynamic : kUsual; }
constexpr int token_of(int calls, int family) { return calls == kStraightCalls ? family : usual_of(calls); }
constexpr int straight_of(int dtype) { return dtype == ARF_FP32 ? kCommonCalls : kStraightCalls; }
constexpr int near_of(int dtype) { return dtype == ARF_FP32 ? kAnyCalls : kNearCalls; }

/* A kernel for every family. */
struct KernelRow {
  const void* kernels[kFamilies];
  template <class... K>
  KernelRow(K... all) : kernels{all...} {
    static_assert(sizeof...(all) == kFamilies);
  }
  const void* operator[](int family) const { return kernels[family]; }
};

}  // namespace arf

/* The bodies of kernel getters: table[row][family]. Families that have no kernels of their own take their neighbour's. */
#define ARF_FUSED_ROW(DTYPE, WORLD, HELD, TWO, CALLS)                                                                   \
  {reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kPlain, HELD, TWO, CALLS>),                      \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kStatic, HELD, TWO, CALLS>),                     \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, HELD, TWO, arf::general(CALLS)>),      \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kFp4, HELD, TWO, CALLS>),                        \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::usual_of(CALLS), HELD, TWO, CALLS>),             \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::mx_of(CALLS), HELD, TWO, CALLS>),                 \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::token_of(CALLS, arf::kToken), HELD, TWO, CALLS>), \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::token_of(CALLS, arf::kTokenRounded), HELD, TWO, CALLS>)}
/* Of near calls norms and static FP8 alone; nobody asks for the rest. */
#define ARF_NEAR_ROW(DTYPE, WORLD)                                                                                   \
  {reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kPlain, 1, false, arf::near_of(DTYPE)>),      \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kStatic, 1, false, arf::near_of(DTYPE)>),     \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, 1, false, arf::kAnyCalls>),            \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kFp4, 1, false, arf::kAnyCalls>),                \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, 1, false, arf::kAnyCalls>),            \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, 1, false, arf::kAnyCalls>),            \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, 1, false, arf::kAnyCalls>),            \
   reinterpret_cast<const void*>(&arf::fused_kernel<DTYPE, WORLD, arf::kDynamic, 1, false, arf::kAnyCalls>)}
#define ARF_SIMULATED_NEAR_ROW(DTYPE)                                                                                \
  {reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kPlain, false, arf::near_of(DTYPE)>),            \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kStatic, false, arf::near_of(DTYPE)>),           \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, false, arf::kAnyCalls>),                  \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kFp4, false, arf::kAnyCalls>),                      \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, false, arf::kAnyCalls>),                  \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, false, arf::kAnyCalls>),                  \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, false, arf::kAnyCalls>),                  \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, false, arf::kAnyCalls>)}
#define ARF_SIMULATED_ROW(DTYPE, TWO, CALLS)                                                                            \
  {reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kPlain, TWO, CALLS>),                               \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kStatic, TWO, CALLS>),                              \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kDynamic, TWO, arf::general(CALLS)>),               \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::kFp4, TWO, CALLS>),                                 \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::usual_of(CALLS), TWO, CALLS>),                      \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::mx_of(CALLS), TWO, CALLS>),                          \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::token_of(CALLS, arf::kToken), TWO, CALLS>),          \
   reinterpret_cast<const void*>(&arf::simulated_kernel<DTYPE, arf::token_of(CALLS, arf::kTokenRounded), TWO, CALLS>)}
#define ARF_LOCAL_TABLE(DTYPE)                                                                                          \
  static const arf::KernelRow table[3] = {                                                                              \
      ARF_FUSED_ROW(DTYPE, 1, arf::kMaxVectors<DTYPE>, false, arf::kAnyCalls),                                          \
      ARF_FUSED_ROW(DTYPE, 1, 1, false, arf::kAnyCalls), ARF_FUSED_ROW(DTYPE, 1, 1, false, arf::kCommonCalls)};
#define ARF_WORLD_TABLE(DTYPE, WORLD)                                                                                   \
  static const arf::KernelRow table[6] = {                                                                              \
      ARF_FUSED_ROW(DTYPE, WORLD, 1, false, arf::kAnyCalls), ARF_FUSED_ROW(DTYPE, WORLD, 1, true, arf::kAnyCalls),      \
      ARF_FUSED_ROW(DTYPE, WORLD, 1, false, arf::kCommonCalls), ARF_FUSED_ROW(DTYPE, WORLD, 1, true, arf::kCommonCalls), \
      ARF_FUSED_ROW(DTYPE, WORLD, 1, false, arf::straight_of(DTYPE)), ARF_NEAR_ROW(DTYPE, WORLD)};
#define ARF_ANY_TABLE(DTYPE)                                                                                            \
  static const arf::KernelRow table[2] = {                                                                              \
      ARF_FUSED_ROW(DTYPE, 0, arf::kMaxVectors<DTYPE>, false, arf::kAnyCalls),                                          \
      ARF_FUSED_ROW(DTYPE, 0, arf::kMaxVectors<DTYPE>, true, arf::kAnyCalls)};
#define ARF_SIMULATED_TABLE(DTYPE)                                                                                      \
  static const arf::KernelRow table[6] = {                                                                              \
      ARF_SIMULATED_ROW(DTYPE, false, arf::kAnyCalls), ARF_SIMULATED_ROW(DTYPE, true, arf::kAnyCalls),                  \
      ARF_SIMULATED_ROW(DTYPE, false, arf::kCommonCalls), ARF_SIMULATED_ROW(DTYPE, true, arf::kCommonCalls),            \
      ARF_SIMULATED_ROW(DTYPE, false, arf::straight_of(DTYPE)), ARF_SIMULATED_NEAR_ROW(DTYPE)};
