// For every mantissa: Quantiser::inverse_of gives the correctly rounded 1 / s.
//   nvcc -O2 -std=c++17 -arch=native -I.. reciprocal.cu -o reciprocal && ./reciprocal
#include <cstdint>
#include <cstdio>

#include "quantise.cuh"

__global__ void compare(unsigned* bad) {
  const uint32_t mantissa = blockIdx.x * blockDim.x + threadIdx.x;
  for (int exponent = -90; exponent <= 90; exponent += 15) {
    const float s = __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23 | mantissa);
    if (arf::Quantiser<ARF_FP32>::inverse_of(s) != __frcp_rn(s)) atomicAdd(bad, 1);
  }
}

int main() {
  unsigned *bad, differ = 0;
  cudaMalloc(&bad, sizeof *bad);
  cudaMemset(bad, 0, sizeof *bad);
  compare<<<(1 << 23) / 256, 256>>>(bad);
  if (const cudaError_t error = cudaMemcpy(&differ, bad, sizeof differ, cudaMemcpyDeviceToHost)) {
    std::printf("%s\n", cudaGetErrorString(error));
    return 2;
  }
  std::printf("%u reciprocals differ\n", differ);
  return differ != 0;
}
