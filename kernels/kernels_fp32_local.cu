/* Kernels for fp32, one rank, no exchange. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp32_local(int row, int family) {
  ARF_LOCAL_TABLE(ARF_FP32)
  return table[row][family];
}
}  // namespace arf
