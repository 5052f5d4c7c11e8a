/* Kernels for bf16, sharded residual, any number of ranks. One translation unit, so that they compile in parallel. */
#include "sharded.cuh"

namespace arf {
const void* kernels_bf16_sharded(int row, int family) {
  ARF_SHARDED_TABLE(ARF_BF16)
  return table[row][family];
}
}  // namespace arf
