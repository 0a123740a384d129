// How trellis codes are read on a GPU: a lane's part of a tile (layout.py, code.py), and conversions.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr uint32_t kMultiplier = 0x962cae47u, kKept = 0x8fff8fffu, kFlipped = 0x3b603b60u;

// (h & kKept) ^ kFlipped, in one instruction where the compiler would take two.
__device__ __forceinline__ uint32_t masked(uint32_t h) {
#ifdef __CUDA_ARCH__
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(out) : "r"(h), "r"(kKept), "r"(kFlipped));
  return out;
#else
  return (h & kKept) ^ kFlipped;
#endif
}

__device__ __forceinline__ uint32_t added(uint32_t a, uint32_t b) {
  const __half2 sum =
      __hadd2(*reinterpret_cast<const __half2*>(&a), *reinterpret_cast<const __half2*>(&b));
  return *reinterpret_cast<const uint32_t*>(&sum);
}

// The lane's four registers of a tile. GLOBAL: the circle lies in global memory.
template <int RATE, bool GLOBAL = true>
__device__ __forceinline__ void decode(const uint8_t* circle, int lane, uint32_t (&a)[4]) {
  constexpr int V = RATE <= 4 ? 2 : 1, B = RATE * V, kWords = RATE <= 4 ? 2 : 3;
  const uint32_t* words = reinterpret_cast<const uint32_t*>(circle);
  const int first = lane * RATE, shift = (first & 3) * 8;
  uint32_t read[kWords + 1], bits[kWords + 1];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const int at = (first >> 2) + i;
    const uint32_t* from = words + (at < 8 * RATE ? at : at - 8 * RATE);
    read[i] = GLOBAL ? __ldg(from) : *from;
  }
  read[kWords] = 0;
#pragma unroll
  for (int i = 0; i < kWords; ++i) bits[i] = __funnelshift_r(read[i], read[i + 1], shift);
  bits[kWords] = 0;
  auto hash = [&](int j) {
    const int p = j * B;
    return (__funnelshift_r(bits[p >> 5], bits[(p >> 5) + 1], p & 31) & 0xffffu) * kMultiplier;
  };
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (V == 2) {
      const uint32_t h = hash(r);
      a[r] = added(masked(h), masked(__byte_perm(h, 0, 0x0123)));
    } else {
      const uint32_t one = masked(hash(2 * r)), two = masked(hash(2 * r + 1));
      a[r] = added(__byte_perm(one, two, 0x5410), __byte_perm(one, two, 0x7632));
    }
  }
}

// Conversions by name: torch compiles without those of the types' own operators.
__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ void store(float* to, float value) { *to = value; }
__device__ __forceinline__ void store(__half* to, float value) { *to = __float2half_rn(value); }
__device__ __forceinline__ void store(__nv_bfloat16* to, float value) {
  *to = __float2bfloat16_rn(value);
}

}  // namespace
