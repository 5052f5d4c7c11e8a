/* Kernels for fp16, one rank, no exchange. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_fp16_local(int row, int family) {
  ARF_LOCAL_TABLE(ARF_FP16)
  return table[row][family];
}
}  // namespace arf
