// What formats.cuh's add and multiply rely on, for every two numbers of 16 bits: T's own addition and multiplication give the
// bits of fp32's rounded to T.   nvcc -O2 -std=c++17 -arch=sm_90a -I.. pairs.cu -o pairs && ./pairs
#include <cstdio>

#include "formats.cuh"

template <int kDtype>
__global__ void compare(unsigned long long* differ) {
  const uint32_t b = blockIdx.x * blockDim.x + threadIdx.x, pair = b | b << 16;
  for (uint32_t a = 0; a < 0x10000u; a += 2) { /* two numbers beside each other: as different as halves can be */
    float a0, a1, b0, b1;
    arf::unpack_pair<kDtype>(a | (a + 1) << 16, a0, a1), arf::unpack_pair<kDtype>(pair, b0, b1);
    const uint32_t sum = arf::pack_pair<kDtype>(__fadd_rn(a0, b0), __fadd_rn(a1, b1));
    const uint32_t product = arf::pack_pair<kDtype>(__fmul_rn(a0, b0), __fmul_rn(a1, b1));
    if (arf::add_pair<kDtype>(a | (a + 1) << 16, pair) != sum) atomicAdd(differ, 1);
    if (arf::multiply_pair<kDtype>(a | (a + 1) << 16, pair) != product) atomicAdd(differ + 1, 1);
  }
}

int main() {
  unsigned long long* differ;
  cudaMallocManaged(&differ, 32);
  for (int i = 0; i < 4; ++i) differ[i] = 0;
  compare<ARF_BF16><<<256, 256>>>(differ);
  compare<ARF_FP16><<<256, 256>>>(differ + 2);
  if (cudaDeviceSynchronize() != cudaSuccess) return 1;
  printf("bf16: %llu sums and %llu products differ; fp16: %llu and %llu\n", differ[0], differ[1], differ[2], differ[3]);
  return differ[0] || differ[1] || differ[2] || differ[3];
}
