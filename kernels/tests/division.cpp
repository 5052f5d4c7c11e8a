// For every mantissa: one Newton correction of a * RN(1 / d) is the correctly rounded a / d, for d = 448 and 127.
//   g++ -O2 -ffp-contract=off -mfma division.cpp -o division && ./division
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

int main() {
  int bad = 0;
  for (const float d : {448.0f, 127.0f}) {
    const float r = 1.0f / d;
    for (uint32_t m = 0; m < 1u << 23; ++m) {
      const uint32_t bits = 0x3F800000u | m;
      float a;
      std::memcpy(&a, &bits, 4);
      const float q = a * r;
      bad += std::fmaf(std::fmaf(-q, d, a), r, q) != a / d;
    }
  }
  std::printf("%d quotients differ\n", bad);
  return bad != 0;
}
