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

template <bool GLOBAL>
__device__ __forceinline__ uint32_t load_word(const uint32_t* from) {
  return GLOBAL ? __ldg(from) : *from;
}

// 32 bits of a circle from bit `first` on. GLOBAL: the circle lies in global memory.
template <int RATE, bool GLOBAL>
__device__ __forceinline__ uint32_t load_bits(const uint8_t* circle, int first) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(circle);
  const int at = first >> 5, next = at + 1;
  return __funnelshift_r(load_word<GLOBAL>(words + at),
                         load_word<GLOBAL>(words + (next < 8 * RATE ? next : 0)), first & 31);
}

// What a lane reads of a tile: the bits of its states.
template <int RATE>
struct Piece {
  static constexpr int kWords = RATE == 3 || RATE == 4 ? 2 : RATE <= 2 ? 1 : 3;
  uint32_t bits[kWords];
};

template <int RATE, bool GLOBAL = true>
__device__ __forceinline__ Piece<RATE> load_piece(const uint8_t* circle, int lane) {
  Piece<RATE> piece;
  if constexpr (RATE <= 3) {
    piece.bits[0] = load_bits<RATE, GLOBAL>(circle, 8 * RATE * lane);
    // Two of a rate of 3 each have a word: all four would need 34 bits.
    if constexpr (RATE == 3) {
      piece.bits[1] = load_bits<RATE, GLOBAL>(circle, 8 * RATE * lane + 12);
    }
  } else if constexpr (RATE == 4) {
    piece.bits[0] = load_word<GLOBAL>(reinterpret_cast<const uint32_t*>(circle) + lane);
    const uint8_t* next = circle + (lane + 1) % 32 * 4;
    piece.bits[1] = GLOBAL ? __ldg(next) : *next;
  } else {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(circle);
    const int first = lane * RATE, shift = (first & 3) * 8;
    uint32_t read[4];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int at = (first >> 2) + i;
      read[i] = load_word<GLOBAL>(words + (at < 8 * RATE ? at : at - 8 * RATE));
    }
    read[3] = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) piece.bits[i] = __funnelshift_r(read[i], read[i + 1], shift);
  }
  return piece;
}

// The hash of state j of a piece. A permutation of bytes cuts a state out, behind a multiplication
// where it lies across bytes: a shift and a mask would take two places in the pipeline that is
// busiest, and products have one of their own.
template <int RATE>
__device__ __forceinline__ uint32_t hash_of(const Piece<RATE>& piece, int j) {
  if constexpr (RATE <= 3) {
    const uint32_t bits = RATE == 3 ? piece.bits[j / 2] : piece.bits[0];
    const int p = RATE == 3 ? j % 2 * 6 : j * 2 * RATE, up = (8 - p % 8) % 8;
    const int byte = (p + up) / 8;
    return __byte_perm(bits << up, 0, 0x4400 | (byte + 1) << 4 | byte) * kMultiplier;
  } else if constexpr (RATE == 4) {
    if (j == 3) return (piece.bits[0] >> 24) * kMultiplier + piece.bits[1] * (kMultiplier << 8);
    return __byte_perm(piece.bits[0], 0, 0x4400 | (j + 1) << 4 | j) * kMultiplier;
  } else {
    const int p = j * RATE;
    const uint32_t above = p / 32 < 2 ? piece.bits[(p / 32 + 1) % 3] : 0;
    return (__funnelshift_r(piece.bits[p / 32], above, p % 32) & 0xffffu) * kMultiplier;
  }
}

// The lane's four registers of a tile.
template <int RATE>
__device__ __forceinline__ void decode(const Piece<RATE>& piece, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (RATE <= 4) {
      const uint32_t h = hash_of(piece, r);
      a[r] = added(masked(h), masked(__byte_perm(h, 0, 0x0123)));
    } else {
      const uint32_t one = masked(hash_of(piece, 2 * r)), two = masked(hash_of(piece, 2 * r + 1));
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
