/* When a CTA reached each phase of its first row, for tuning: built with -DARF_STAMPS only, else none of this makes an
 * instruction. Thread 0 reads its multiprocessor's clock, and at both ends the GPU's; the last 64 launches' stamps lie behind
 * the control words, for which the caller of such a build provides kStampBytes more (benchmarks/stamps.py). */
#pragma once
#include "params.h"

namespace arf {

enum Phase { kStarted, kWaited, kPushed, kArrived, kReduced, kStored, kEnded, kPhases };
constexpr unsigned kStampLaunches = 64, kStampCtas = 128, kStampWords = 16; /* clocks by phase, then globaltimer at both ends */
constexpr size_t kStampBytes = size_t{8} * kStampLaunches * kStampCtas * kStampWords;

#ifdef ARF_STAMPS
__device__ __forceinline__ uint64_t* stamps() {
  __shared__ uint64_t words[kStampWords];
  return words;
}

__device__ __forceinline__ void stamp(Phase phase) {
  if (threadIdx.x) return;
  asm volatile("mov.u64 %0, %clock64;" : "=l"(stamps()[phase])::"memory"); /* cycles of this multiprocessor */
  if (phase == kStarted || phase == kEnded) {
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(stamps()[kPhases + (phase == kEnded)])::"memory"); /* ns */
  }
}

__device__ __forceinline__ void keep_stamps(const Params& p, uint32_t generation, unsigned cta) {
  stamp(kEnded);
  if (threadIdx.x || cta >= kStampCtas) return;
  uint64_t* to = reinterpret_cast<uint64_t*>(reinterpret_cast<char*>(p.control) + ARF_CONTROL_BYTES);
  to += (generation % kStampLaunches * kStampCtas + cta) * kStampWords;
  for (unsigned i = 0; i < kPhases + 2; ++i) to[i] = stamps()[i];
}
#else
__device__ __forceinline__ void stamp(Phase) {}
__device__ __forceinline__ void keep_stamps(const Params&, uint32_t, unsigned) {}
#endif

}  // namespace arf
