/* Kernels for fp32, 4 ranks. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp32_four(int row, int family) {
  ARF_WORLD_TABLE(ARF_FP32, 4)
  return table[row][family];
}
}  // namespace arf
