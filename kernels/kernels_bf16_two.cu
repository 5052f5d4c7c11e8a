/* Kernels for bf16, 2 ranks. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_bf16_two(int row, int family) {
  ARF_WORLD_TABLE(ARF_BF16, 2)
  return table[row][family];
}
}  // namespace arf
