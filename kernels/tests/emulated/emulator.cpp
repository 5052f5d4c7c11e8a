/* GPUs in one thread of the CPU, every choice drawn from a seed.
 *
 * A thread of the GPU is a fiber: it runs until it has to wait (a barrier, the lanes of its warp) or polls memory that another
 * one writes. Between two turns the emulator draws which CTA goes on, so a seed is one interleaving, and can be run again.
 * What real hardware leaves open is left open here:
 *  - volatile stores (relaxed, at system scope: the pushes) are delivered word by word, in any order, some time before their
 *    launch ends; so are the stores that empty a buffer;
 *  - copies to shared memory (cp.async) are done when they are waited for, not before;
 *  - shared memory begins as rubbish, and CTAs are dispatched in order, as many as fit;
 *  - streams are independent, so ranks that have one each drift apart; those whose numbers are equal modulo kGpus share a GPU's
 *    multiprocessors, and who finds room first is drawn; within one, a launch with the PDL attribute begins
 *    when all CTAs of the one before have triggered or ended, and runs up to its griddepcontrol.wait.
 * Caught at once: a barrier that some threads of a CTA never reach, lanes that meet for different things, a wait that
 * nothing can end. Not emulated: time (a turn takes 5 us), caches, weak loads. */
#include "ptx.h"

#include <algorithm>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unordered_map>
#include <vector>

namespace emulated {

constexpr size_t kStack = 64 << 10, kShared = 256 << 10, kDynamic = 128 << 10;
constexpr int kWarp = 32;

std::mt19937_64 rng{1};
uint32_t draw(uint32_t below) { return static_cast<uint32_t>(rng() % below); }
constexpr int kMultiprocessors = 64, kGpus = 16;
int room_of_gpu = kMultiprocessors; /* CTAs that fit at once, of what the launches are told */
uint64_t now_ns = 1000000000;

[[noreturn]] void die(const std::string& why) {
  fprintf(stderr, "emulated GPU: %s\n", why.c_str());
  fflush(stderr);
  abort();
}

struct Cta;
struct Launch;

struct Fiber : Thread {
  Cta* cta;
  jmp_buf context;
  void* stack = nullptr;
  bool started = false, blocked = false, at_barrier = false, ended = false;
  uint32_t result = 0; /* of a meeting of its warp */
  std::vector<std::pair<void*, const void*>> fetches;
};

struct Meeting {
  Collective kind;
  uint32_t mask, arrived = 0;
  int step;
  uint32_t values[kWarp];
};

struct Cta {
  Launch* launch;
  uint32_t number, rank_in_cluster;
  Cta** cluster; /* its CTAs, in the launch's list */
  std::vector<Fiber> fibers;
  uint32_t live, at_barrier = 0, at_cluster_barrier = 0;
  bool triggered = false;
  std::vector<std::vector<Meeting>> meetings; /* by warp */
  std::unique_ptr<char, void (*)(void*)> memory{nullptr, free};
  std::map<int, uint32_t> declarations;
  uint32_t used = 16;
  uint32_t slow_warp = 0, patience = 0; /* turns for which one warp stands still, wherever it is */
};

struct Word {
  uint32_t* at;
  uint32_t value;
};

struct Launch {
  const void* kernel;
  Call call;
  std::shared_ptr<void> arguments;
  dim3 grid, block;
  uint32_t cluster;
  bool early; /* may begin before the one in front has ended */
  uint32_t dispatched = 0, triggered = 0, ended = 0;
  std::vector<std::unique_ptr<Cta>> running;
  std::vector<std::vector<Cta*>> clusters;
  std::vector<Word> on_their_way;
};

struct Kernel {
  Call call;
  Copy copy;
};
std::unordered_map<const void*, Kernel>& kernels() {
  static std::unordered_map<const void*, Kernel> all;
  return all;
}
void add_kernel(const void* kernel, Call call, Copy copy) { kernels()[kernel] = {call, copy}; }

struct Stream {
  std::deque<std::unique_ptr<Launch>> launches; /* the front one first */
  uint32_t patience = 0;                        /* turns that it still lets pass */
  uintptr_t gpu = 0;
};
std::map<void*, Stream> streams;
bool deferred = false;

Thread* current = nullptr;
Fiber& fiber() { return *static_cast<Fiber*>(current); }
jmp_buf scheduler;

/* ---- Fibers --------------------------------------------------------------------------------------------------------- */

std::vector<void*> stacks;
ucontext_t first_context, main_context;
Fiber* starting;

void suspend() {
  if (_setjmp(fiber().context) == 0) _longjmp(scheduler, 1);
}

void yield() { suspend(); }

void block() {
  fiber().blocked = true;
  suspend();
}

void release_barrier(Cta& cta);

void body() {
  Fiber& self = *starting;
  self.cta->launch->call(self.cta->launch->kernel, self.cta->launch->arguments.get());
  self.ended = true;
  Cta& cta = *self.cta;
  --cta.live;
  for (const Meeting& m : cta.meetings[self.thread.x / kWarp]) {
    if (m.mask >> self.thread.x % kWarp & 1) die("a thread has ended whose warp's other lanes wait for it");
  }
  if (cta.live && cta.at_barrier == cta.live) release_barrier(cta);
  _longjmp(scheduler, 1);
}

void run(Fiber& f) {
  current = &f;
  if (_setjmp(scheduler)) {
    current = nullptr;
    return;
  }
  if (f.started) _longjmp(f.context, 1);
  f.started = true;
  if (stacks.empty()) {
    char* more = static_cast<char*>(mmap(nullptr, 256 * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (more == MAP_FAILED) die("no memory for stacks");
    for (int i = 0; i < 256; ++i) stacks.push_back(more + i * kStack);
  }
  f.stack = stacks.back();
  stacks.pop_back();
  starting = &f;
  getcontext(&first_context);
  first_context.uc_stack.ss_sp = f.stack;
  first_context.uc_stack.ss_size = kStack;
  first_context.uc_link = nullptr;
  makecontext(&first_context, body, 0);
  setcontext(&first_context);
}

/* ---- What threads wait for ------------------------------------------------------------------------------------------ */

void release_barrier(Cta& cta) {
  cta.at_barrier = 0;
  for (Fiber& f : cta.fibers) {
    if (f.at_barrier) f.blocked = f.at_barrier = false;
  }
}

void sync_threads() {
  Fiber& self = fiber();
  Cta& cta = *self.cta;
  if (++cta.at_barrier == cta.live) return release_barrier(cta);
  self.at_barrier = true;
  block();
}

uint32_t meet(Collective kind, uint32_t mask, uint32_t value, int step) {
  Fiber& self = fiber();
  Cta& cta = *self.cta;
  const uint32_t lane = self.thread.x % kWarp, warp = self.thread.x / kWarp;
  if (!(mask >> lane & 1)) die("a lane that is not in the mask calls a warp's operation");
  auto& open = cta.meetings[warp];
  Meeting* m = nullptr;
  for (Meeting& other : open) {
    if (other.mask == mask) m = &other;
  }
  if (!m) {
    open.push_back({kind, mask, 0, step, {}});
    m = &open.back();
  }
  if (m->kind != kind || m->step != step) die("lanes of a warp meet for different things");
  m->values[lane] = value;
  m->arrived |= 1u << lane;
  if (m->arrived != mask) {
    block();
    return self.result;
  }
  uint32_t all = 0;
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    const uint32_t v = m->values[i];
    if (kind == kBallot) all |= (v & 1) << i;
    if (kind == kAny) all |= v;
    if (kind == kReduceMax) all = v > all ? v : all;
  }
  for (int i = 0; i < kWarp; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& f = cta.fibers[warp * kWarp + i];
    f.result = kind == kShuffleXor ? m->values[i ^ step] : all;
    if (kind == kShuffleXor && !(mask >> (i ^ step) & 1)) die("a shuffle reads a lane that is not in its mask");
    f.blocked = false;
  }
  open.erase(open.begin() + (m - open.data()));
  return self.result;
}

/* ---- Shared memory -------------------------------------------------------------------------------------------------- */

void* shared_memory(int declaration, size_t bytes) {
  Cta& cta = *fiber().cta;
  const auto found = cta.declarations.find(declaration);
  if (found != cta.declarations.end()) return cta.memory.get() + found->second;
  const uint32_t at = (cta.used + 15) / 16 * 16;
  cta.used = at + static_cast<uint32_t>(bytes);
  if (cta.used > kDynamic) die("a CTA's arrays in shared memory do not fit");
  cta.declarations[declaration] = at;
  return cta.memory.get() + at;
}

void* dynamic_shared_memory() { return fiber().cta->memory.get() + kDynamic; }

uint32_t shared_address(const void* p) {
  const auto at = static_cast<const char*>(p) - fiber().cta->memory.get();
  if (at < 0 || at >= static_cast<ptrdiff_t>(kShared)) die("an address that is not in this CTA's shared memory");
  return static_cast<uint32_t>(at);
}

/* An address of this CTA's, or of another's in the cluster (mapa: its number + 1 in the upper byte). */
char* shared_at(uint32_t address) {
  Cta& cta = *fiber().cta;
  const Cta& owner = address >> 24 ? *cta.cluster[(address >> 24) - 1] : cta;
  return owner.memory.get() + (address & 0xFFFFFF);
}

/* ---- PTX ------------------------------------------------------------------------------------------------------------ */

namespace ptx {

template <class T>
T& global(const void* at, size_t align = sizeof(T)) {
  if (reinterpret_cast<uintptr_t>(at) % align) die("a misaligned address");
  return *static_cast<T*>(const_cast<void*>(at));
}

void later(const void* at, std::initializer_list<uint32_t> words) {
  uint32_t* to = static_cast<uint32_t*>(const_cast<void*>(at));
  if (reinterpret_cast<uintptr_t>(at) % (4 * words.size())) die("a misaligned store");
  for (const uint32_t w : words) fiber().cta->launch->on_their_way.push_back({to++, w});
}

void clusterid(uint32_t& n) { n = fiber().cta->number / fiber().cta->launch->cluster; }
void nclusterid(uint32_t& n) { n = fiber().cta->launch->grid.x / fiber().cta->launch->cluster; }
void cluster_ctarank(uint32_t& n) { n = fiber().cta->rank_in_cluster; }

void st_shared(uint32_t to, uint32_t word) { memcpy(shared_at(to), &word, 4); }
void ld_shared(uint32_t& word, uint32_t from) { memcpy(&word, shared_at(from), 4); }
void ld_shared_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t from) {
  if (from % 16) die("a vector of shared memory that is not aligned to 16 bytes");
  for (uint32_t* word : {&a, &b, &c, &d}) memcpy(word, shared_at(from), 4), from += 4;
}

/* An mbarrier of one arrival a phase, in its 8 bytes. */
struct Barrier {
  int32_t bytes; /* awaited; below 0: came before they were announced */
  uint16_t arrived, phase;
};
Barrier& barrier(uint32_t at) { return *reinterpret_cast<Barrier*>(shared_at(at)); }
void turn(Barrier& b) {
  if (b.arrived && b.bytes == 0) b.arrived = 0, b.phase ^= 1;
}
void mbarrier_init(uint32_t at) { barrier(at) = {0, 0, 0}; }
void mbarrier_arrive_expect(uint32_t at, uint32_t bytes) {
  Barrier& b = barrier(at);
  if (b.arrived) die("a second arrival in one phase of an mbarrier");
  b.arrived = 1;
  b.bytes += bytes;
  turn(b);
}
void mbarrier_await(uint32_t at, uint32_t phase) {
  while (barrier(at).phase == phase) yield();
}
void mapa(uint32_t& to, uint32_t address, uint32_t cta) { to = (address & 0xFFFFFF) | (cta + 1) << 24; }
void st_async(uint32_t to, uint32_t word, uint32_t signal) {
  if (draw(2)) yield();
  memcpy(shared_at(to), &word, 4);
  barrier(signal).bytes -= 4;
  turn(barrier(signal));
}
void cluster_arrive() { ++fiber().cta->at_cluster_barrier; }
void cluster_wait() {
  const Cta& cta = *fiber().cta;
  for (uint32_t i = 0; i < cta.launch->cluster; ++i) { /* once a launch */
    while (cta.cluster[i]->at_cluster_barrier < cta.fibers.size()) yield();
  }
}

void cp_async(uint32_t to, const void* from) { fiber().fetches.push_back({shared_at(to), from}); }
void cp_async_wait() {
  for (const auto& [to, from] : fiber().fetches) memcpy(to, from, 16);
  fiber().fetches.clear();
}

void st_volatile_4(const void* at, uint32_t a, uint32_t b, uint32_t c, uint32_t d) { later(at, {a, b, c, d}); }
void st_volatile_2(const void* at, uint32_t a, uint32_t b) { later(at, {a, b}); }
void st_volatile_1(const void* at, uint32_t a) { later(at, {a}); }
void ld_volatile_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* at) {
  yield();
  const uint4 v = global<uint4>(at);
  a = v.x, b = v.y, c = v.z, d = v.w;
}
void ld_volatile_2(uint32_t& a, uint32_t& b, const void* at) {
  yield();
  const uint2 v = global<uint2>(at);
  a = v.x, b = v.y;
}
void ld_volatile_1(uint32_t& a, const void* at) {
  yield();
  a = global<uint32_t>(at);
}
void ld_4(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, const void* at) {
  const uint4 v = global<uint4>(at);
  a = v.x, b = v.y, c = v.z, d = v.w;
}
void ld_2(uint32_t& a, uint32_t& b, const void* at) {
  const uint2 v = global<uint2>(at);
  a = v.x, b = v.y;
}
void ld_1(uint32_t& a, const void* at) { a = global<uint32_t>(at); }
void ld_byte(uint32_t& a, const void* at) { a = global<uint8_t>(at); }
void st_hint_1(const void* at, uint32_t a, uint64_t) { later(at, {a}); }
void st_hint_4(const void* at, uint32_t word, uint64_t) { later(at, {word, word, word, word}); }
void st_byte(const void* at, uint32_t byte) { global<uint8_t>(at) = static_cast<uint8_t>(byte); }
void st_float(const void* at, float x) { global<float>(at) = x; }
void evict(uint64_t& policy) { policy = 0; }
void prefetch(const void*) {}

void griddep_launch() {
  Cta& cta = *fiber().cta;
  if (!cta.triggered) cta.triggered = true, ++cta.launch->triggered;
}
void globaltimer(uint64_t& t) { t = now_ns; }

uint16_t bf16(float x) {
  const uint32_t b = __float_as_uint(x);
  if ((b & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFF;
  return static_cast<uint16_t>((b + 0x7FFFu + (b >> 16 & 1u)) >> 16);
}
void cvt_bf16x2(uint32_t& word, float high, float low) { word = static_cast<uint32_t>(bf16(high)) << 16 | bf16(low); }
uint16_t f16(float x) {
  if (x != x) return 0x7FFF;
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t b;
  return memcpy(&b, &h, 2), b;
}
float from_f16(uint32_t bits) {
  const uint16_t b = static_cast<uint16_t>(bits);
  _Float16 h;
  return memcpy(&h, &b, 2), static_cast<float>(h);
}
void cvt_f16x2(uint32_t& word, float high, float low) { word = static_cast<uint32_t>(f16(high)) << 16 | f16(low); }
void cvt_from_f16x2(float& low, float& high, uint32_t word) { low = from_f16(word & 0xFFFF), high = from_f16(word >> 16); }
/* Rounded once, from a double that holds every product, and every sum whose smaller part matters. */
uint16_t bf16_of(double x) {
  if (x != x || std::isinf(x)) return bf16(static_cast<float>(x));
  const int exponent = x == 0 ? 0 : std::max(std::ilogb(x), -126);
  return bf16(static_cast<float>(std::ldexp(std::nearbyint(std::ldexp(x, 7 - exponent)), exponent - 7)));
}
uint16_t f16_of(double x) {
  if (x != x) return 0x7FFF;
  const _Float16 h = static_cast<_Float16>(x);
  uint16_t b;
  return memcpy(&b, &h, 2), b;
}
double from_bf16(uint32_t bits) { return __uint_as_float(bits << 16); }
template <class From, class Of, class Do>
uint32_t by_halves(uint32_t a, uint32_t b, From from, Of of, Do f) {
  return static_cast<uint32_t>(of(f(from(a >> 16), from(b >> 16)))) << 16 | of(f(from(a & 0xFFFF), from(b & 0xFFFF)));
}
void mul_bf16x2(uint32_t& y, uint32_t a, uint32_t b) { y = by_halves(a, b, from_bf16, bf16_of, std::multiplies<double>()); }
void mul_f16x2(uint32_t& y, uint32_t a, uint32_t b) { y = by_halves(a, b, from_f16, f16_of, std::multiplies<double>()); }
void add_bf16x2(uint32_t& y, uint32_t a, uint32_t b) { y = by_halves(a, b, from_bf16, bf16_of, std::plus<double>()); }
void add_f16x2(uint32_t& y, uint32_t a, uint32_t b) { y = by_halves(a, b, from_f16, f16_of, std::plus<double>()); }
void max_nan(float& m, float a, float b) { m = one_nan(a != a || b != b ? NAN : fmaxf(a, b)); }
void min_nan(float& m, float a, float b) { m = one_nan(a != a || b != b ? NAN : fminf(a, b)); }
/* The nearest of all values, to even: no clever bits, so that the kernels' own are compared with something else. */
float e4m3_value(uint32_t code) {
  const int exponent = static_cast<int>(code >> 3 & 15), mantissa = static_cast<int>(code & 7);
  return exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
}
uint32_t e4m3(float x) {
  if (x != x) return 0x7F;
  const uint32_t sign = __float_as_uint(x) >> 24 & 0x80;
  const float a = fabsf(x);
  uint32_t low = 0;
  while (low < 0x7E && e4m3_value(low + 1) <= a) ++low;
  if (low < 0x7E) {
    const float below = a - e4m3_value(low), above = e4m3_value(low + 1) - a;
    if (above < below || (above == below && low & 1)) ++low;
  }
  return sign | low;
}
void cvt_e4m3x2(uint16_t& pair, float high, float low) { pair = static_cast<uint16_t>(e4m3(high) << 8 | e4m3(low)); }
void cvt_from_e4m3x2(uint32_t& halves, uint16_t pair) {
  const auto value = [](uint32_t code) { return (code & 0x7F) == 0x7F ? NAN : code & 0x80 ? -e4m3_value(code & 0x7F) : e4m3_value(code); };
  halves = static_cast<uint32_t>(f16(value(pair >> 8))) << 16 | f16(value(pair & 0xFF));
}
void lop3_sign(uint32_t& y, uint32_t x, uint32_t from) { y = (x & 0x7FFFFFFFu) | (from & 0x80000000u); }
void rcp_approx(float& r, float s) {
  const auto flushed = [](float v) { return fabsf(v) < 0x1p-126f ? copysignf(0.0f, v) : v; };
  r = one_nan(flushed(1.0f / flushed(s)));
}

}  // namespace ptx

/* ---- The scheduler -------------------------------------------------------------------------------------------------- */

bool is_in_front(const Launch& l) {
  for (const auto& [_, s] : streams) {
    if (!s.launches.empty() && s.launches.front().get() == &l) return true;
  }
  return false;
}

void ptx::griddep_wait() {
  while (!is_in_front(*fiber().cta->launch)) yield();
}

void dispatch(Launch& l, int& room) {
  while (l.dispatched < l.grid.x && room >= static_cast<int>(l.cluster)) {
    l.clusters.emplace_back();
    for (uint32_t part = 0; part < l.cluster; ++part) {
      auto cta = std::make_unique<Cta>();
      cta->launch = &l;
      cta->number = l.dispatched++;
      cta->rank_in_cluster = part;
      cta->live = l.block.x;
      cta->meetings.resize(l.block.x / kWarp);
      cta->memory.reset(static_cast<char*>(aligned_alloc(256, kShared)));
      memset(cta->memory.get(), 0xA5, kShared);
      cta->fibers.resize(l.block.x);
      for (uint32_t i = 0; i < l.block.x; ++i) {
        Fiber& f = cta->fibers[i];
        f.cta = cta.get();
        f.thread = {i, 0, 0}, f.block = {cta->number, 0, 0};
        f.block_size = l.block, f.grid_size = l.grid;
      }
      l.clusters.back().push_back(cta.get());
      l.running.push_back(std::move(cta));
      --room;
    }
    for (Cta* cta : l.clusters.back()) cta->cluster = l.clusters.back().data();
  }
}

void deliver(std::vector<Word>& words, size_t count) {
  while (count-- && !words.empty()) {
    std::swap(words[draw(words.size())], words.back());
    *words.back().at = words.back().value;
    words.pop_back();
  }
}

/* Most threads of a CTA that can go on, once, and some of the words on their way. */
void turn_of(Launch& l, Cta& cta) {
  const uint32_t warps = static_cast<uint32_t>(cta.meetings.size()), from = draw(warps);
  if (!cta.patience && draw(30) == 0) cta.slow_warp = draw(warps), cta.patience = draw(100);
  bool can = false;
  for (uint32_t w = 0; w < warps; ++w) {
    bool stays = draw(4) == 0; /* a warp may stand still while others go on */
    if ((from + w) % warps == cta.slow_warp && cta.patience) stays = true, --cta.patience;
    for (uint32_t i = 0; i < kWarp; ++i) {
      Fiber& f = cta.fibers[(from + w) % warps * kWarp + i];
      if (f.ended || f.blocked) continue;
      can = true;
      if (!stays) run(f);
    }
  }
  if (!can) die("all threads of a CTA wait for each other");
  now_ns += 5000;
  if (draw(3) == 0) deliver(l.on_their_way, draw(static_cast<uint32_t>(l.on_their_way.size()) + 2));
}

/* Some turns of what has been launched; false when all has ended. */
bool step() {
  std::vector<Stream*> busy;
  for (auto& [_, s] : streams) {
    if (!s.launches.empty()) busy.push_back(&s);
  }
  if (busy.empty()) return false;
  std::rotate(busy.begin(), busy.begin() + draw(static_cast<uint32_t>(busy.size())), busy.end());
  for (Stream* s : busy) {
    if (busy.size() > 1 && s->patience) {
      --s->patience;
      continue;
    }
    if (draw(50) == 0) s->patience = draw(200);
    int room = room_of_gpu;
    for (const auto& [_, other] : streams) {
      if (other.gpu != s->gpu) continue;
      for (const auto& l : other.launches) room -= static_cast<int>(l->running.size());
    }
    for (size_t i = 0; i < s->launches.size() && i < 2; ++i) {
      Launch& l = *s->launches[i];
      if (i && !(l.early && s->launches[0]->triggered == s->launches[0]->grid.x)) break;
      dispatch(l, room);
      if (l.running.empty()) continue;
      for (size_t turns = 1 + draw(static_cast<uint32_t>(l.running.size())); turns && !l.running.empty(); --turns) {
        Cta& cta = *l.running[draw(static_cast<uint32_t>(l.running.size()))];
        if (cta.live) turn_of(l, cta);
      }
    }
    for (size_t i = 0; i < s->launches.size() && i < 2; ++i) {
      Launch& l = *s->launches[i];
      for (auto& cluster : l.clusters) { /* its CTAs' memory may be written until all have ended */
        bool over = !cluster.empty();
        for (Cta* cta : cluster) over = over && cta->live == 0;
        if (!over) continue;
        for (Cta* cta : cluster) {
          for (Fiber& f : cta->fibers) stacks.push_back(f.stack);
          if (!cta->triggered) ++l.triggered;
          ++l.ended;
          for (auto& r : l.running) {
            if (r.get() == cta) std::swap(r, l.running.back());
          }
          l.running.pop_back();
        }
        cluster.clear();
      }
    }
    Launch& front = *s->launches.front();
    if (front.ended == front.grid.x) {
      deliver(front.on_their_way, front.on_their_way.size());
      s->launches.pop_front();
    }
  }
  return true;
}

}  // namespace emulated

using namespace emulated;

cudaError_t cudaDeviceSynchronize() {
  while (step()) {
  }
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? kMultiprocessors : 9;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  const auto known = kernels().find(kernel);
  if (known == kernels().end()) die("a launch of what is no kernel");
  auto l = std::make_unique<Launch>();
  l->kernel = kernel;
  l->call = known->second.call;
  l->arguments = known->second.copy(args);
  l->grid = config->gridDim, l->block = config->blockDim;
  l->cluster = 1, l->early = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) l->cluster = config->attrs[i].val.clusterDim.x;
    if (config->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) l->early = true;
  }
  if (l->block.x % kWarp || l->block.x > 1024 || l->grid.x % l->cluster || !l->grid.x) return cudaErrorInvalidValue;
  if (config->dynamicSmemBytes > kShared - kDynamic) return cudaErrorInvalidValue;
  Stream& stream = streams[config->stream];
  stream.gpu = reinterpret_cast<uintptr_t>(config->stream) % kGpus;
  stream.launches.push_back(std::move(l));
  return deferred ? cudaSuccess : cudaDeviceSynchronize();
}

extern "C" {
/* Torch's binding, which has it, is not part of this library. */
__attribute__((visibility("default"))) void arf_call_failed(const char*, int) {}

/* Launches queue up until emulated_synchronize, so that streams run beside each other. */
__attribute__((visibility("default"))) void emulated_defer(int on) { deferred = on; }
__attribute__((visibility("default"))) void emulated_synchronize() { cudaDeviceSynchronize(); }
__attribute__((visibility("default"))) void emulated_seed(uint64_t seed) { rng.seed(seed); }
/* From now on so many CTAs of a GPU fit at once, a cluster's 8 at least; 0: as many as it has multiprocessors. */
__attribute__((visibility("default"))) void emulated_room(int ctas) { room_of_gpu = ctas ? ctas : kMultiprocessors; }
}
