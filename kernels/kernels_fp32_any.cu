/* Kernels for fp32, any world up to 8, and rows of more than 1024 vectors. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp32_any(int row, int family) {
  ARF_ANY_TABLE(ARF_FP32)
  return table[row][family];
}
}  // namespace arf
