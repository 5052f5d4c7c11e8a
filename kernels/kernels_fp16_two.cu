/* Kernels for fp16, 2 ranks. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp16_two(int row, int family) {
  ARF_WORLD_TABLE(ARF_FP16, 2)
  return table[row][family];
}
}  // namespace arf
