/* How data crosses between ranks: 16-byte pushes that carry their own arrival flag.
 *
 * Invariant 1 (emptiness). Between launches every word of both generations of a rank's buffer is kEmpty. A launch
 *   reads each vector that its peers push to it by one thread, and that thread stores kEmpty back, behind its outputs.
 * Invariant 2 (arrival). No pushed word is kEmpty (`pushable`), and a 4-byte word never tears; so a vector all of whose
 *   words differ from kEmpty has arrived whole, whatever order its words came in. No fence, no flag, no barrier.
 * Invariant 3 (two generations suffice). Launch i uses generation i mod 2. A peer pushes for launch i + 2 only after it
 *   has finished launch i + 1, hence after it received sums or rows that contain what I pushed in launch i + 1, hence
 *   after my launch i had ended, its clears included (stream order; griddepcontrol.wait waits for completion and
 *   flush, not for the trigger). Classic Lamport buffers clear the *previous* call's buffer and so need three; clearing
 *   behind the read needs two, and needs no record of what the previous call had used.
 * Peer accesses are volatile, which PTX treats as relaxed at system scope: measured 0.65 us one way on NVLink, where
 * release/acquire takes 1.2 us. */
#pragma once
#include "formats.cuh"
#include "stamps.cuh"

namespace arf {

constexpr uint32_t kEmpty = 0xFFFFFFFFu; /* a NaN in every T; memset(0xFF) makes a buffer empty */
constexpr unsigned kPollsPerCheck = 64;  /* looks at the clock every 64 misses, about 30 us, never on the fast path */

ARF_DEVICE void store_volatile(void* p, const uint4& v) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %4};" /* relaxed.sys, to own or peer memory */
               ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

ARF_DEVICE uint4 load_volatile(const void* p) {
  uint4 v;
  asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];" /* relaxed.sys, past L1 */
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}

ARF_DEVICE uint4 filled(uint32_t word) { return make_uint4(word, word, word, word); }

/* kEmpty becomes another NaN; all else, -0.0 included, stays as it is. */
ARF_DEVICE uint4 pushable(const uint4& v) {
  return make_uint4(min(v.x, kEmpty - 1), min(v.y, kEmpty - 1), min(v.z, kEmpty - 1), min(v.w, kEmpty - 1));
}

/* kEmpty iff a word of it is: words are unsigned and kEmpty is the largest. */
ARF_DEVICE uint32_t largest_word(const uint4& v) { return max(max(v.x, v.y), max(v.z, v.w)); }

/* Programmatic dependent launch: everything before this may overlap with the kernel in front of this one in the stream. */
ARF_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory"); /* until all grids that this one depends on have ended and flushed */
#endif
}

ARF_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); /* a dependent grid may be scheduled from now on */
#endif
}

ARF_DEVICE uint64_t clock_ns() {
  uint64_t t;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(t)); /* ns, ticks coarsely */
  return t;
}

/* This CTA's view of the exchange during one launch. */
struct Link {
  uint64_t offset;     /* of this launch's generation in every buffer */
  uint32_t generation;
  uint32_t dead;       /* not 0: a wait of this workspace has expired: nothing is pushed or awaited, all data are NaN */
#ifdef ARF_LINK_CYCLES
  uint32_t crossed_at = 0;
#endif
};

/* Ranks that share a GPU have no link between them. In a build with -DARF_LINK_CYCLES=1000 (tests/bench.cu) no look that began less
 * than 1000 to 1511 cycles behind one-shot's push finds anything: what a link hides is hidden there too, and no launch's looks
 * keep step with its arrivals, which would favour some kernels by 0.1 us. */
ARF_DEVICE void note_push([[maybe_unused]] Link& link) {
#ifdef ARF_LINK_CYCLES
  link.crossed_at = clock() + ARF_LINK_CYCLES + (link.generation * 97u & 511u);
#endif
}
ARF_DEVICE uint32_t now() { /* taken in front of a look */
#ifdef ARF_LINK_CYCLES
  return clock();
#else
  return 0;
#endif
}
ARF_DEVICE bool has_crossed([[maybe_unused]] const Link& link, [[maybe_unused]] uint32_t looked) {
#ifdef ARF_LINK_CYCLES
  return static_cast<int32_t>(looked - link.crossed_at) >= 0;
#else
  return true;
#endif
}

/* Every thread reads its CTA's own pair; no thread may write it before all have (see `rotate`). */
ARF_DEVICE Link open_link(const Params& p, unsigned cta) {
  uint32_t generation, poisoned;
  asm volatile("ld.volatile.global.v2.u32 {%0, %1}, [%2];" /* {generation, poisoned} */
               : "=r"(generation), "=r"(poisoned)
               : "l"(p.control + cta)
               : "memory");
  return {0, generation, poisoned};
}

/* A word a CTA for launches of this workspace that run: each adds 1 and takes the lowest bit away at its end, so that it is 0
 * or 1 but where two ran at once (graphs of one group replayed on two streams, an eager call beside a replay; they use one
 * generation's slots): then more, from there on. Thread 0 asks with open_link's load and looks behind the last row, which
 * is no wait; a thread that waits for what the other launch took looks too (give_up). */
ARF_DEVICE uint32_t* running(const Params& p, unsigned cta) { return reinterpret_cast<uint32_t*>(p.control + 2 * kMaxCtas) + cta; }

ARF_DEVICE uint32_t begin_alone(const Params& p, unsigned cta) { return threadIdx.x == 0 ? atomicAdd(running(p, cta), 1u) : 0u; }

/* Before the first push: called behind the loads of what is pushed, so that they do not wait for open_link's. */
ARF_DEVICE void settle(const Params& p, Link& link) {
  asm volatile("" : "+r"(link.generation), "+r"(link.dead)); /* nothing; the compiler may not use either value earlier */
  link.offset = (link.generation & 1u) * p.generation_bytes;
}

/* Up to this size of a slot, the lines that the next launch reads first stay in L2: in a model some 100 MB of weights pass
 * between two launches, and stores to lines that were evicted hold the kernel's end up (a site between two GEMMs gains 0.1
 * to 0.4 us; one call behind the other, nothing). Larger slots would take L2 from the GEMMs. */
constexpr uint32_t kKeptSlotBytes = 2u << 20;

ARF_DEVICE uint64_t l2_priority(const Params& p) {
  uint64_t last, normal; /* volatile: made where they are used, not held in registers over the exchange */
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));     /* lines to be evicted last */
  asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(normal)); /* or as any other */
  return p.slot_bytes <= kKeptSlotBytes ? last : normal;
}

/* Leaves all pairs at the next generation, each written by one CTA: no counter, no last arriver, no round trip. Only
 * this CTA reads its own pair in this launch, so a barrier of the CTA since open_link is all the order that is needed; the
 * next launch reads them after this one has ended. */
ARF_DEVICE void rotate(const Params& p, const Link& link, unsigned cta, unsigned ctas) {
  const uint64_t priority = l2_priority(p);
  for (unsigned i = cta + ctas * threadIdx.x; i < kMaxCtas; i += ctas * blockDim.x) {
    asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" /* with this priority in L2 */
                 ::"l"(&p.control[i].generation), "r"(link.generation + 1), "l"(priority)
                 : "memory");
  }
}

/* The first error of a workspace is kept, and its launches push and await nothing from now on. */
static __device__ __noinline__ void poison(const Params& p, uint32_t state, uint32_t generation, uint32_t strategy,
                                           uint32_t token, int peer) {
  if (atomicExch(&p.control[0].poisoned, 2u) == 2u) return; /* another was first */
  for (unsigned i = 1; i < kMaxCtas; ++i) p.control[i].poisoned = 1u;
  volatile arf_error_record* record = p.error;
  record->rank = p.rank;
  record->peer = peer;
  record->op = p.op;
  record->generation = generation;
  record->strategy = strategy;
  record->token = token;
  __threadfence_system(); /* the record before its state, for the host */
  record->state = state;
}

/* Behind the last row. `beside`: of begin_alone. */
ARF_DEVICE void end_alone(const Params& p, const Link& link, unsigned cta, uint32_t beside) {
  if (threadIdx.x != 0) return;
  if (beside) poison(p, ARF_OVERLAPPED, link.generation, ARF_AUTO, cta, p.rank);
  atomicAnd(running(p, cta), ~1u); /* nobody reads its result: no wait */
}

/* After kPollsPerCheck misses: whether this thread must give up, because the workspace is poisoned or because this CTA's
 * first such look in this launch lies timeout_ns back. Out of line and without state in registers: it is rare, and inlined
 * it made the polls spill. The first look's time lies behind the control pairs, tagged with the launch's generation. */
static __device__ __noinline__ bool give_up(const Params& p, unsigned cta, uint32_t generation, uint32_t strategy,
                                            uint32_t token, int peer) {
  if (static_cast<const volatile Control*>(p.control)[cta].poisoned) return true;
  if (*static_cast<const volatile uint32_t*>(running(p, cta)) > 1) {
    poison(p, ARF_OVERLAPPED, generation, ARF_AUTO, cta, p.rank);
    return true;
  }
  /* {~generation, microseconds modulo 2^32} in one word of 8 bytes: all threads of a CTA write and read it, and the time
   * of another launch under this one's tag would end a wait that has only begun. */
  volatile uint64_t* first_look = reinterpret_cast<volatile uint64_t*>(p.control + kMaxCtas + cta);
  const uint32_t now = static_cast<uint32_t>(clock_ns() / 1000);
  const uint64_t seen = *first_look;
  /* The tag is this launch's or an earlier one's. One a little ahead is of this CTA's threads too: where another launch runs
   * beside this one they may have read different generations, and would set each other's clock back for ever. */
  const uint32_t ahead = ~static_cast<uint32_t>(seen >> 32) - generation;
  if (!seen || ahead >= 8) { /* 0: as the words begin */
    *first_look = static_cast<uint64_t>(~generation) << 32 | now;
    return false;
  }
  const int32_t waited = static_cast<int32_t>(now - static_cast<uint32_t>(seen)); /* below 0: another looked just after us */
  if (waited < static_cast<int32_t>(p.timeout_us)) return false;
  poison(p, ARF_WAITED, generation, strategy, token, peer);
  return true;
}

/* Repeats `ready` until it says that a vector has arrived. Where many rows are awaited at once (p.quiet), only the first
 * lane of the warp that misses its vector goes on polling, then all look again: every lane's polls together would take as
 * much of L2's bandwidth as the exchange. lanes: those that call. `missing` names the peer that the error reports; `spoil`
 * is called where the wait expires (not where the link was dead before), so that nothing has to ask behind an arrival. */
template <class Ready, class Missing, class Spoil>
ARF_DEVICE void await_arrival(const Params& p, Link& link, unsigned cta, uint32_t strategy, uint32_t token, uint32_t lanes,
                              const Ready& ready, const Missing& missing, const Spoil& spoil) {
  auto poll = [&] {
    unsigned misses = 0;
    while (!link.dead && !ready()) {
      if (++misses == kPollsPerCheck) {
        misses = 0;
        if (give_up(p, cta, link.generation, strategy, token, missing())) {
          link.dead = 1;
          spoil();
        }
      }
    }
  };
  if (!p.quiet) return poll();
  bool arrived = link.dead || ready();
  while (const uint32_t absent = __ballot_sync(lanes, !arrived)) {
    const bool first = threadIdx.x % kWarp == __ffs(absent) - 1;
    if (first) poll();
    __syncwarp(lanes);
    link.dead = __any_sync(lanes, link.dead);
    if (link.dead) spoil();
    if (!arrived) arrived = first || link.dead || ready();
  }
}

/* One peer's vector at `at`; all NaN, and link.dead set, if the wait expires. */
ARF_DEVICE uint4 receive_one(const Params& p, Link& link, unsigned cta, char* at, uint32_t strategy, uint32_t token, int peer,
                             uint32_t lanes) {
  uint4 v = filled(kEmpty);
  await_arrival(
      p, link, cta, strategy, token, lanes,
      [&] {
        v = load_volatile(at);
        return largest_word(v) != kEmpty;
      },
      [&] { return peer; }, [&] { v = filled(kEmpty); });
  return v;
}

/* All peers' vectors at `at` + slot * slot_bytes, in in[slot], polled together. If the wait expires `mine` becomes NaN, and
 * with it every sum. */
template <int kWorld>
ARF_DEVICE void receive_all(const Params& p, Link& link, unsigned cta, char* at, uint32_t token, uint32_t lanes,
                            uint4 (&in)[kWorld - 1], uint4& mine) {
#pragma unroll
  for (int s = 0; s < kWorld - 1; ++s) in[s] = filled(kEmpty);
  if (link.dead) mine = filled(kEmpty);
  await_arrival(
      p, link, cta, ARF_ONESHOT, token, lanes,
      [&] {
        uint32_t largest = 0;
        const uint32_t looked = now();
#pragma unroll
        for (int s = 0; s < kWorld - 1; ++s) in[s] = load_volatile(at + s * static_cast<uint64_t>(p.slot_bytes));
#pragma unroll
        for (int s = 0; s < kWorld - 1; ++s) largest = max(largest, largest_word(in[s]));
        return largest != kEmpty && has_crossed(link, looked);
      },
      [&] {
        int first = 0;
#pragma unroll
        for (int s = kWorld - 2; s >= 0; --s) {
          if (largest_word(in[s]) == kEmpty) first = s;
        }
        return first + (first >= p.rank);
      },
      [&] { mine = filled(kEmpty); });
}

/* Empties what receive_one or receive_sum read at `at`; called behind the outputs' stores, so that none waits for it. */
ARF_DEVICE void empty_one(const Link& link, char* at) {
  if (!link.dead) *reinterpret_cast<uint4*>(at) = filled(kEmpty);
}

/* Of every slot. */
template <int kWorld>
ARF_DEVICE void empty_all(const Params& p, const Link& link, char* at) {
  if (link.dead) return;
  const uint64_t priority = l2_priority(p);
  auto empty = [&](int s) {
    asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %1, %1, %1}, %2;" /* with this priority in L2 */
                 ::"l"(at + s * static_cast<uint64_t>(p.slot_bytes)), "r"(kEmpty), "l"(priority)
                 : "memory");
  };
  if constexpr (kWorld != 0) {
#pragma unroll
    for (int s = 0; s < kWorld - 1; ++s) empty(s);
  } else {
#pragma unroll 1
    for (int s = 0; s < p.world - 1; ++s) empty(s);
  }
}

/* Into L2, for a load to come; one lane in eight asks for its 128-byte line. */
ARF_DEVICE void prefetch(const void* p) {
  if (threadIdx.x % 8 == 0) asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); /* no register, no wait */
}

ARF_DEVICE uint4 select(bool first, const uint4& a, const uint4& b) {
  return make_uint4(first ? a.x : b.x, first ? a.y : b.y, first ? a.z : b.z, first ? a.w : b.w);
}

/* T(the fp32 sum over ranks in rank order), from the first rank's value on (-0.0 stays -0.0). `at`: the vector in slot 0.
 * A world known at compile time is polled all at once; any other one rank after the other, which costs an L2 round trip
 * (0.3 us) a peer but no registers: unrolled for 8 it spilled 8 KB. */
template <int kDtype, int kWorld>
ARF_DEVICE uint4 receive_sum(const Params& p, Link& link, unsigned cta, char* at, uint32_t token, uint32_t lanes, uint4 mine) {
  constexpr int N = kElements<kDtype>;
  if constexpr (kWorld == 2 && kDtype != ARF_FP32) {
    uint4 in[1];
    receive_all<kWorld>(p, link, cta, at, token, lanes, in, mine);
    return add<kDtype>(in[0], mine); /* which of the two is rank 0's does not matter to their sum */
  }
  float sum[N];
  if constexpr (kWorld != 0) {
    uint4 in[kWorld - 1]; /* by slot: ranks below ours, then those above */
    receive_all<kWorld>(p, link, cta, at, token, lanes, in, mine);
    unpack<kDtype>(in[0], sum); /* of rank 0, or of 1 if we are 0: as above */
#pragma unroll
    for (int r = 1; r < kWorld; ++r) {
      const bool ours = r == 1 ? p.rank < 2 : p.rank == r;
      uint4 v;
      if constexpr (kWorld == 2) {
        v = mine;
      } else if (r == 1) {
        v = select(ours, mine, in[1]);
      } else {
        v = select(ours, mine, in[r - 1]);
        if (r < kWorld - 1) v = select(r < p.rank, in[r < kWorld - 1 ? r : 0], v);
      }
      float f[N];
      unpack<kDtype>(v, f);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = __fadd_rn(sum[i], f[i]);
    }
  } else {
#pragma unroll 1
    for (int r = 0; r < p.world; ++r) {
      uint4 v = mine;
      if (r != p.rank) {
        v = receive_one(p, link, cta, at + static_cast<uint64_t>(slot_of(r, p.rank)) * p.slot_bytes, ARF_ONESHOT, token, r,
                        lanes);
      }
      float f[N];
      unpack<kDtype>(v, f);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] = r == 0 ? f[i] : __fadd_rn(sum[i], f[i]);
    }
  }
  return pack<kDtype>(sum);
}

/* A vector to every peer, at `offset` from the address of our slot. */
template <int kWorld>
ARF_DEVICE void push_all(const Params& p, const Link& link, uint64_t offset, const uint4& v) {
  if (link.dead) return;
  const uint4 x = pushable(v);
  if constexpr (kWorld != 0) {
#pragma unroll
    for (int i = 0; i < kWorld - 1; ++i) store_volatile(p.push[i] + offset, x);
  } else {
#pragma unroll 1
    for (int i = 0; i < p.world - 1; ++i) store_volatile(p.push[i] + offset, x);
  }
}

}  // namespace arf
