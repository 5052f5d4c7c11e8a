/* Kernels for fp32, all ranks in one launch, for tests. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp32_simulated(int row, int family) {
  ARF_SIMULATED_TABLE(ARF_FP32)
  return table[row][family];
}
}  // namespace arf
