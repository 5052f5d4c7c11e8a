/* A row split over the CTAs of a thread-block cluster: how their partial results meet.
 *
 * One multiprocessor moves about 64 bytes a clock. At decode a row of hidden 7168 among four ranks is some 200 KB of
 * loads, pushes, polls and stores, 1.8 us of it; split over four CTAs, a quarter of that. What the split costs is the
 * exchange of partial sums below: st.async carries a word to every CTA's shared memory and counts it on that CTA's
 * mbarrier, so that data and arrival are one message. No cluster barrier on the path, no fence (cluster.sync()'s makes
 * every thread wait for its NVLink pushes to be acknowledged).
 *
 * Invariants. A row uses the buffers and mbarriers of its parity. A warp publishes for row r + 1 after it has read the
 * results of row r, and nobody passes row r + 1 before all warps have published for it, so buffers of row r are free
 * when row r + 2 writes them. A CTA leaves after all words sent to it have arrived, as it waits for each of them. */
#pragma once
#include "formats.cuh"

namespace arf {

/* Of a CTA in its cluster; {0, 1} without one. */
struct Part {
  uint32_t rank;
  uint32_t count;
};

/* Where a CTA stands in the launch: its own number, and its cluster's, by which rows are shared out. */
struct Position {
  uint32_t cta, ctas;
  uint32_t cluster, clusters;
  Part part;
};

ARF_DEVICE uint32_t cluster_number() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm volatile("mov.u32 %0, %clusterid.x;" : "=r"(n)); /* a launch without clusters has clusters of one */
  return n;
#else
  return blockIdx.x;
#endif
}

ARF_DEVICE uint32_t cluster_count() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm volatile("mov.u32 %0, %nclusterid.x;" : "=r"(n));
  return n;
#else
  return gridDim.x;
#endif
}

ARF_DEVICE uint32_t rank_in_cluster() {
#if __CUDA_ARCH__ >= 900
  uint32_t n;
  asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(n));
  return n;
#else
  return 0;
#endif
}

ARF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

ARF_DEVICE void store_shared(uint32_t to, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(word) : "memory"); /* to this CTA */
}

ARF_DEVICE uint32_t load_shared(uint32_t from) {
  uint32_t word;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(from) : "memory"); /* from this CTA */
  return word;
}

ARF_DEVICE uint4 load_shared_vector(uint32_t from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" /* from this CTA, 16-byte aligned */
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

/* Before the exchange: one thread makes `count` mbarriers of one arrival each, all CTAs learn of it in join_cluster. */
ARF_DEVICE void open_barriers(uint32_t barriers, int count, const Part& part) {
#if __CUDA_ARCH__ >= 900
  if (part.count == 1) return;
  if (threadIdx.x == 0) {
    for (int i = 0; i < count; ++i) {
      asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers + 8 * i) : "memory"); /* one arrival a phase */
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); /* the inits before the arrive below, cluster-wide */
  }
  __syncthreads(); /* all threads arrive after the inits */
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); /* "my mbarriers exist"; the fence above orders them */
#endif
}

/* After open_barriers, before the first publish. */
ARF_DEVICE void join_cluster(const Part& part) {
#if __CUDA_ARCH__ >= 900
  if (part.count == 1) return;
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); /* "everyone's mbarriers exist" */
#endif
}

/* kWords of a warp, word and slot w those of lanes 8 w to 8 w + 7, into those slots of every CTA; `expected` words make a row
 * complete. */
template <uint32_t kWords = 1>
ARF_DEVICE void publish(uint32_t slot, uint32_t barrier, uint32_t word, bool valid, uint32_t expected, const Part& part) {
#if __CUDA_ARCH__ >= 900
  const uint32_t lane = threadIdx.x % kWarp, cta = kWords == 1 ? lane : lane % 8;
  if (threadIdx.x == 0) {
    asm volatile("{ .reg .b64 state;\n\t"
                 "mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }" /* this phase ends after so many bytes */
                 ::"r"(barrier), "r"(expected * 4)
                 : "memory");
  }
  if (valid && cta < part.count && lane < 8 * kWords) {
    uint32_t to, signal;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(slot), "r"(cta)); /* slot in that CTA */
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(barrier), "r"(cta));
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" /* word and its arrival */
                 ::"r"(to), "r"(word), "r"(signal)
                 : "memory");
  }
#endif
}

/* Until the phase with this parity of `barrier` is over. */
ARF_DEVICE void await_published(uint32_t barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred done;\n\t"
      "again_%=:\n\t"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n\t" /* sleeps a while, then says whether over */
      "@!done bra again_%=; }"
      ::"r"(barrier), "r"(phase)
      : "memory");
#endif
}

}  // namespace arf
