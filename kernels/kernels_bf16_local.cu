/* Kernels for bf16, one rank, no exchange. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_bf16_local(int row, int family) {
  ARF_LOCAL_TABLE(ARF_BF16)
  return table[row][family];
}
}  // namespace arf
