/* Kernels for fp32, sharded residual, any number of ranks. One translation unit, so that they compile in parallel. */
#include "sharded.cuh"

namespace arf {
const void* kernels_fp32_sharded(int row, int family) {
  ARF_SHARDED_TABLE(ARF_FP32)
  return table[row][family];
}
}  // namespace arf
