// What quantise.cuh relies on, for every mantissa of the divisor (g++ -O3 -march=native -ffp-contract=off division.cpp):
//   one Newton correction of a * RN(1 / d) is the correctly rounded a / d, for d = 448, 127 and the mantissas of e4m3;
//   one correction of x * RN(1 / s) lies on the same side of every e4m3 rounding boundary as the correctly rounded x / s,
//   tried with the numbers around each boundary times s: boundaries have mantissas k / 16, and none lies elsewhere.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <initializer_list>

static float number(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

static uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

int main() {
  long quotients = 0, codes = 0;
  for (uint32_t m = 0; m < 1u << 23; ++m) {
    const float s = number(0x3F800000u | m);
    for (const float d : {448.0f, 127.0f, 1.125f, 1.25f, 1.375f, 1.5f, 1.625f, 1.75f, 1.875f}) {
      const float r = 1.0f / d, q = s * r;
      quotients += std::fmaf(std::fmaf(-q, d, s), r, q) != s / d;
    }
    const float r = 1.0f / s;
    for (int k = 16; k < 32; ++k) {
      const float boundary = k / 16.0f;
      for (int step = -2; step <= 2; ++step) {
        const float x = number(bits_of(s * boundary) + step), right = x / s, first = x * r;
        const float q = std::fmaf(std::fmaf(-first, s, x), r, first);
        codes += (q > boundary) - (q < boundary) != (right > boundary) - (right < boundary);
      }
    }
  }
  std::printf("%ld quotients and %ld codes differ\n", quotients, codes);
  return quotients != 0 || codes != 0;
}
