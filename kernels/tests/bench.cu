// Times the exchange kernels on all GPUs of one machine, driven by one process through the C ABI (no torch, no Python).
//   nvcc -O2 -std=c++17 -I.. bench.cu -o bench -L. -l:libarf.so   (or any path of the library)
//   ./bench [hidden,...] [tokens,...] [forms] [ctas,...]
// forms: letters of p plain, f with a factor, b with a bias, w with 1 added to the weight, n likewise and without a residual, e with
// epsilon in memory, c plain and its codes, s static FP8, t token FP8, g group-128 FP8, 4 NVFP4 (128x4), l NVFP4
// (linear), m MXFP8. us per op inside a graph of back-to-back ops, median over replays, maximum over GPUs. The plain form's norm is
// checked against a double reference.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "api.h"
#include "spec.h"
#define CK(x)                                                                        \
  do {                                                                               \
    cudaError_t e_ = (x);                                                            \
    if (e_) { printf("%s:%d %s\n", #x, __LINE__, cudaGetErrorString(e_)); exit(1); } \
  } while (0)

static unsigned short to_bf16(float f) {
  unsigned u;
  memcpy(&u, &f, 4);
  return (u + 0x7FFF + (u >> 16 & 1)) >> 16;
}
static float from_bf16(unsigned short h) {
  unsigned u = unsigned(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static std::vector<long> numbers(const char* s) {
  std::vector<long> v;
  for (const char* p = s; *p;) {
    char* end;
    v.push_back(strtol(p, &end, 10));
    p = *end ? end + 1 : end;
  }
  return v;
}

struct Rank {
  cudaStream_t stream;
  void *x, *residual, *weight, *norm, *residual_out, *quant, *scales, *scale, *buffer;
  cudaGraphExec_t graph;
  cudaEvent_t a, b;
};

int main(int argc, char** argv) {
  int devices;
  CK(cudaGetDeviceCount(&devices));
  /* ARF_RANKS: more ranks than GPUs, on one GPU each in a stream of its own: everything but NVLink, for tuning decode, with a
     library that is built with -DARF_LINK_CYCLES=1000 (exchange.cuh). */
  const int W = getenv("ARF_RANKS") ? atoi(getenv("ARF_RANKS")) : devices;
  auto device_of = [&](int i) { return i % devices; };
  auto group_of = [](int i) { return "bench" + std::to_string(i); };
  const auto hiddens = numbers(argc > 1 ? argv[1] : "4096,7168");
  const auto tokens = numbers(argc > 2 ? argv[2] : "1,4,16,64,256,1024,2048");
  const std::string forms = argc > 3 ? argv[3] : "p";
  const auto grids = numbers(argc > 4 ? argv[4] : "0");
  const long extra_flags = argc > 5 ? atol(argv[5]) : 0;
  const auto widths = numbers(argc > 6 ? argv[6] : "0"); /* threads of a CTA: how a row is split over a cluster */
  long most = 0;
  for (long h : hiddens)
    for (long t : tokens) most = std::max(most, h * t);
  const int64_t bytes = 128 << 20;
  std::vector<Rank> ranks(W);
  void* peers[8];
  srand(1);
  std::vector<unsigned short> hr(most), hg(16384);
  std::vector<std::vector<unsigned short>> hx(W, std::vector<unsigned short>(most));
  auto fill = [](std::vector<unsigned short>& v) {
    for (auto& e : v) e = to_bf16((rand() % 2001 - 1000) / 1000.f);
  };
  fill(hr), fill(hg);
  for (int i = 0; i < W; ++i) {
    CK(cudaSetDevice(device_of(i)));
    for (int j = 0; j < devices; ++j)
      if (device_of(i) != j) cudaDeviceEnablePeerAccess(j, 0);
    Rank& r = ranks[i];
    CK(cudaStreamCreateWithFlags(&r.stream, cudaStreamNonBlocking));
    fill(hx[i]);
    for (void** p : {&r.x, &r.residual, &r.norm, &r.residual_out, &r.quant, &r.scales}) CK(cudaMalloc(p, most * 2 + (1 << 20)));
    CK(cudaMalloc(&r.weight, 32768));
    CK(cudaMalloc(&r.scale, 16));
    CK(cudaMalloc(&r.buffer, bytes));
    CK(cudaMemset(r.buffer, 0xFF, bytes));
    CK(cudaMemcpy(r.x, hx[i].data(), most * 2, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(r.residual, hr.data(), most * 2, cudaMemcpyHostToDevice));
    CK(cudaMemcpy(r.weight, hg.data(), 32768, cudaMemcpyHostToDevice));
    const float one = 0.02f;
    CK(cudaMemcpy(r.scale, &one, 4, cudaMemcpyHostToDevice));
    CK(cudaEventCreate(&r.a));
    CK(cudaEventCreate(&r.b));
    CK(cudaDeviceSynchronize());
    peers[i] = r.buffer;
  }
  for (int i = 0; i < W; ++i) {
    arf_workspace_desc d = {};
    const std::string group = group_of(i);
    d.group = group.c_str(), d.device = device_of(i), d.rank = i, d.world = W, d.bytes = bytes, d.timeout_ns = 2000000000;
    std::copy(peers, peers + W, d.peers);
    if (arf_register_workspace(&d)) printf("%s\n", arf_last_error()), exit(1);
  }
  for (long H : hiddens)
    for (long T : tokens)
      for (char form : forms) {
        printf("W%d H%-5ld T%-5ld %c:", W, H, T, form);
        for (int two = 0; two < 2; ++two)
          for (long grid : grids)
            for (long width : widths) {
            if (two && (W == 2 || T < 8) && forms.size() < 2) continue;
            if (!two && W > 2 && T * H * 2 > (4 << 20)) continue;
            if (!two && W == 8 && T * H * 2 > (1 << 20)) continue;
            auto call_of = [&](int i) {
              Rank& r = ranks[i];
              arf_call c = {};
              c.dtype = ARF_BF16, c.tokens = T, c.hidden = H, c.x = r.x, c.residual = r.residual, c.weight = r.weight;
              c.epsilon = 1e-6f, c.flags = (two ? arf::kTwoshot : arf::kOneshot) | extra_flags, c.residual_out = r.residual_out;
              c.scale_value = 1.0f;
              const int64_t clamp = 1 << 18;
              auto quant = [&](int64_t format, int64_t group, int64_t layout) {
                c.quant = format | layout << 4 | clamp | (group + 1) << 32;
                c.quant_out = r.quant;
                c.scale_out = group ? r.scales : nullptr;
              };
              switch (form) {
                case 'f': c.norm_out = r.norm, c.factor_kind = ARF_FACTOR_VALUE, c.factor_value = 0.22f; break;
                case 'w': c.norm_out = r.norm, c.weight_bias = 1.0f; break;
                case 'n': c.norm_out = r.norm, c.weight_bias = 1.0f, c.residual = c.residual_out = nullptr; break;
                case 'e': c.norm_out = r.norm, c.epsilon_tensor = r.scale, c.epsilon_dtype = ARF_FP32; break;
                case 'c': c.norm_out = r.norm; /* and */
                case 's': quant(1, 0, 0), c.scale = r.scale, c.scale_dtype = ARF_FP32; break;
                case 'b': c.norm_out = r.norm, c.addend = r.weight; break;
                case 't': quant(1, -1, 0); break;
                case 'g': quant(1, 128, 0); break;
                case '4':
                case 'l': quant(3, 16, form == '4' ? 4 : 6), c.scale = r.scale, c.scale_dtype = ARF_FP32; break;
                case 'm': quant(4, 32, 4); break;
                default: c.norm_out = r.norm;
              }
              return c;
            };
            arf_set_launch_override(int(width), int(grid));
            const int N = T * H <= (1 << 20) ? 100 : 20;
            for (int i = 0; i < W; ++i) {
              Rank& r = ranks[i];
              CK(cudaSetDevice(device_of(i)));
              const arf_call c = call_of(i);
              cudaGraph_t g;
              CK(cudaStreamBeginCapture(r.stream, cudaStreamCaptureModeThreadLocal));
              for (int k = 0; k < N; ++k)
                if (arf_launch(group_of(i).c_str(), device_of(i), &c, r.stream)) printf("%s\n", arf_last_error()), exit(1);
              CK(cudaStreamEndCapture(r.stream, &g));
              CK(cudaGraphInstantiate(&r.graph, g, 0));
              CK(cudaGraphUpload(r.graph, r.stream));
              CK(cudaStreamSynchronize(r.stream));
              cudaGraphDestroy(g);
            }
            std::vector<float> times;
            for (int rep = 0; rep < 9; ++rep) {
              for (int i = 0; i < W; ++i) {
                CK(cudaSetDevice(device_of(i)));
                CK(cudaGraphLaunch(ranks[i].graph, ranks[i].stream));
              }
              for (int i = 0; i < W; ++i) {
                Rank& r = ranks[i];
                CK(cudaSetDevice(device_of(i)));
                CK(cudaEventRecord(r.a, r.stream));
                CK(cudaGraphLaunch(r.graph, r.stream));
                CK(cudaEventRecord(r.b, r.stream));
              }
              float worst = 0;
              for (int i = 0; i < W; ++i) {
                CK(cudaSetDevice(device_of(i)));
                CK(cudaStreamSynchronize(ranks[i].stream));
                float ms;
                CK(cudaEventElapsedTime(&ms, ranks[i].a, ranks[i].b));
                worst = std::max(worst, ms);
              }
              times.push_back(worst * 1e3f / N);
            }
            std::sort(times.begin(), times.end());
            printf("  %s%s%s %6.2f", two ? "two" : "one", grid ? ("/" + std::to_string(grid)).c_str() : "", width ? (":" + std::to_string(width)).c_str() : "", times[times.size() / 2]);
            for (int i = 0; i < W; ++i) CK(cudaGraphExecDestroy(ranks[i].graph));
            if (form != 'p') continue;
            double worst = 0;
            for (int i = 0; i < W; ++i) {
              std::vector<unsigned short> o(T * H);
              CK(cudaSetDevice(device_of(i)));
              CK(cudaMemcpy(o.data(), ranks[i].norm, T * H * 2, cudaMemcpyDeviceToHost));
              CK(cudaMemset(ranks[i].norm, 0xFF, T * H * 2));
              for (long t = 0; t < T; t += std::max(1L, T / 5)) {
                std::vector<float> h(H);
                double s = 0, err = 0, all = 0;
                for (long c = 0; c < H; ++c) {
                  float f = 0;
                  for (int j = 0; j < W; ++j) f += from_bf16(hx[j][t * H + c]);
                  f = from_bf16(to_bf16(from_bf16(to_bf16(f)) + from_bf16(hr[t * H + c])));
                  h[c] = f, s += double(f) * f;
                }
                const double k = 1 / sqrt(s / H + 1e-6);
                for (long c = 0; c < H; ++c) {
                  const double want = h[c] * k * from_bf16(hg[c]), d = want - from_bf16(o[t * H + c]);
                  err += d * d, all += want * want;
                }
                worst = std::max(worst, sqrt(err / all));
              }
            }
            if (!(worst < 3e-3)) printf(" WRONG %.1e", worst);
          }
        for (int i = 0; i < W; ++i) {
          arf_error_record e;
          if (arf_read_error(group_of(i).c_str(), device_of(i), &e)) printf(" EXPIRED rank %u peer %u token %u\n", e.rank, e.peer, e.token), exit(1);
        }
        printf("\n");
        fflush(stdout);
      }
}
