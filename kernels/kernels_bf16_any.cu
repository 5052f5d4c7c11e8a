/* Kernels for bf16, any world up to 8, and rows of more than 1024 vectors. One translation unit, so that they compile in parallel. */
#include "kernels.cuh"

namespace arf {
const void* kernels_bf16_any(int row, int family) {
  ARF_ANY_TABLE(ARF_BF16)
  return table[row][family];
}
}  // namespace arf
