/* Kernels for fp16, 8 ranks. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp16_eight(int row, int family) {
  ARF_WORLD_TABLE(ARF_FP16, 8)
  return table[row][family];
}
}  // namespace arf
