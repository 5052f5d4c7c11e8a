/* Kernels for fp32, 8 ranks. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp32_eight(int row, int family) {
  ARF_WORLD_TABLE(ARF_FP32, 8)
  return table[row][family];
}
}  // namespace arf
