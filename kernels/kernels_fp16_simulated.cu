/* Kernels for fp16, all ranks in one launch, for tests. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp16_simulated(int row, int family) {
  ARF_SIMULATED_TABLE(ARF_FP16)
  return table[row][family];
}
}  // namespace arf
