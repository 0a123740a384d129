// Enough of CUDA to run a kernel on the host: one thread of the host for each of a block.
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ static
#define __grid_constant__
#define __host__

using std::max;
using std::min;
struct dim3 {
  int x = 1, y = 1;
};
inline thread_local dim3 threadIdx, blockIdx, gridDim;
inline std::unique_ptr<std::barrier<>> block_barrier;
inline std::vector<std::unique_ptr<std::barrier<>>> warp_barriers;
inline std::vector<float> lanes_out;
inline std::vector<uint32_t> dynamic_shared(1 << 16);

typedef _Float16 __half;
struct __half2 {
  __half x, y;
};
struct float2 {
  float x, y;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct int4 {
  int x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32]->arrive_and_wait(); }
template <typename T>
inline T __ldg(const T* from) {
  return *from;
}
template <typename T>
inline T __ldcg(const T* from) {
  return *from;
}
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t both = (static_cast<uint64_t>(b) << 32) | a;
  uint32_t found = 0;
  for (int i = 0; i < 4; ++i)
    found |= static_cast<uint32_t>((both >> (8 * ((order >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return found;
}
inline __half2 __hadd2(__half2 a, __half2 b) {
  return {static_cast<__half>(a.x + b.x), static_cast<__half>(a.y + b.y)};
}
inline __half2 __hsub2(__half2 a, __half2 b) {
  return {static_cast<__half>(a.x - b.x), static_cast<__half>(a.y - b.y)};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto one = [](__half u, __half v, __half w) {
    return static_cast<__half>(std::fma(float(u), float(v), float(w)));
  };
  return {one(a.x, b.x, c.x), one(a.y, b.y, c.y)};
}
inline __half2 __hmin2(__half2 a, __half2 b) { return {min(a.x, b.x), min(a.y, b.y)}; }
inline __half2 __low2half2(__half2 v) { return {v.x, v.x}; }
inline __half2 __high2half2(__half2 v) { return {v.y, v.y}; }
inline __half2 __floats2half2_rn(float x, float y) {
  return {static_cast<__half>(x), static_cast<__half>(y)};
}
inline float2 __half22float2(__half2 v) { return {static_cast<float>(v.x), static_cast<float>(v.y)}; }
inline uint32_t __float_as_uint(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}
inline int __float_as_int(float v) { return static_cast<int>(__float_as_uint(v)); }
inline float __int_as_float(int bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}
inline float __frcp_rn(float v) { return 1.0f / v; }
inline __half __float2half(float v) { return static_cast<__half>(v); }
inline __half __float2half_rn(float v) { return static_cast<__half>(v); }
inline float __half2float(__half v) { return static_cast<float>(v); }
struct __nv_bfloat16 {
  uint16_t bits;
};
inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 v) {
  return {__bfloat162float(v.x), __bfloat162float(v.y)};
}
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v ? __builtin_clz(v) : 32; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T v, int step) {
  const int thread = threadIdx.x, warp = thread / 32;
  std::memcpy(&lanes_out[thread], &v, 4);
  warp_barriers[warp]->arrive_and_wait();
  T found;
  std::memcpy(&found, &lanes_out[thread ^ step], 4);
  warp_barriers[warp]->arrive_and_wait();
  return found;
}
template <typename T>
inline T __shfl_sync(unsigned lanes, T v, int lane) {
  return __shfl_xor_sync(lanes, v, threadIdx.x % 32 ^ lane);
}
inline bool __all_sync(unsigned lanes, bool v) {
  int all = v;
  for (int step = 16; step; step /= 2) all &= __shfl_xor_sync(lanes, all, step);
  return all;
}
inline uint32_t __reduce_min_sync(unsigned lanes, uint32_t v) {
  for (int step = 16; step; step /= 2) v = min(v, __shfl_xor_sync(lanes, v, step));
  return v;
}

// The definition of mma.m16n8k16 (PTX ISA, fragments of f16 operands).
struct Operands {
  uint32_t a[4], b[2];
};
inline std::vector<Operands> operands;
inline float half_of(uint32_t word, int i) {
  const uint16_t bits = static_cast<uint16_t>(word >> (16 * i));
  __half value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
}
inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  std::copy(a, a + 4, operands[thread].a);
  operands[thread].b[0] = b0, operands[thread].b[1] = b1;
  warp_barriers[warp]->arrive_and_wait();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const Operands& left = operands[32 * warp + 4 * (row % 8) + k % 8 / 2];
      const Operands& right = operands[32 * warp + 4 * column + k % 8 / 2];
      c[i] += half_of(left.a[row / 8 + 2 * (k / 8)], k % 2) * half_of(right.b[k / 8], k % 2);
    }
  }
  warp_barriers[warp]->arrive_and_wait();
}

inline void launch(dim3 grid, int threads, const std::function<void()>& kernel) {
  block_barrier = std::make_unique<std::barrier<>>(threads);
  warp_barriers.clear();
  for (int i = 0; i < (threads + 31) / 32; ++i)
    warp_barriers.push_back(std::make_unique<std::barrier<>>(min(32, threads)));
  lanes_out.resize(threads);
  operands.resize(threads);
  for (int y = 0; y < grid.y; ++y)
    for (int x = 0; x < grid.x; ++x) {
      std::vector<std::thread> all;
      for (int i = 0; i < threads; ++i)
        all.emplace_back([=] {
          threadIdx.x = i, blockIdx = {x, y}, gridDim = grid;
          kernel();
        });
      for (std::thread& one : all) one.join();
    }
}
