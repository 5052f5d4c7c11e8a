/* Kernels for bf16, all ranks in one launch, for tests. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_bf16_simulated(int row, int family) {
  ARF_SIMULATED_TABLE(ARF_BF16)
  return table[row][family];
}
}  // namespace arf
