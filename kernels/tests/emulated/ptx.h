/* The PTX instructions in the kernels, as translate.py calls them: outputs first, then inputs, in the order of the asm statement. */
#pragma once
#include "cuda_runtime.h"

namespace emulated::ptx {

void clusterid(uint32_t& n);
void nclusterid(uint32_t& n);
void cluster_ctarank(uint32_t& n);
void st_shared(uint32_t to, uint32_t word);
void ld_shared(uint32_t& word, uint32_t from);
void ld_shared_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from);
void mbarrier_init(uint32_t at);
void mbarrier_arrive_expect(uint32_t at, uint32_t bytes);
void mbarrier_await(uint32_t at, uint32_t phase);
void mapa(uint32_t& to, uint32_t address, uint32_t cta);
void st_async(uint32_t to, uint32_t word, uint32_t signal);
void cluster_arrive();
void cluster_wait();
void cp_async(uint32_t to, const void* from);
void cp_async_wait();
void st_volatile_4(const void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d);
void st_volatile_2(const void* at, uint32_t a, uint32_t b);
void st_volatile_1(const void* at, uint32_t a);
void ld_volatile_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* at);
void ld_volatile_2(uint32_t& a, uint32_t& b, const void* at);
void ld_volatile_1(uint32_t& a, const void* at);
void ld_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* at);
void ld_2(uint32_t& a, uint32_t& b, const void* at);
void ld_1(uint32_t& a, const void* at);
void ld_byte(uint32_t& a, const void* at);
void st_hint_1(const void* at, uint32_t a, uint64_t policy);
void st_hint_4(const void* at, uint32_t word, uint64_t policy);
void st_byte(const void* at, uint32_t byte);
void st_float(const void* at, float x);
void evict(uint64_t& policy);
void prefetch(const void* at);
void griddep_wait();
void griddep_launch();
void globaltimer(uint64_t& t);
void cvt_bf16x2(uint32_t& word, float high, float low);
void cvt_f16x2(uint32_t& word, float high, float low);
void cvt_from_f16x2(float& low, float& high, uint32_t word);
void mul_bf16x2(uint32_t& y, uint32_t a, uint32_t b);
void mul_f16x2(uint32_t& y, uint32_t a, uint32_t b);
void add_bf16x2(uint32_t& y, uint32_t a, uint32_t b);
void add_f16x2(uint32_t& y, uint32_t a, uint32_t b);
void max_nan(float& m, float a, float b);
void min_nan(float& m, float a, float b);
void cvt_e4m3x2(uint16_t& pair, float high, float low);
void cvt_from_e4m3x2(uint32_t& halves, uint16_t pair);
void lop3_sign(uint32_t& y, uint32_t x, uint32_t from);
void rcp_approx(float& r, float s);
inline void nothing() {}

}  // namespace emulated::ptx
