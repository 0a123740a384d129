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

// The hash of the state at bit `at` of 32 bits that hold it. A permutation of bytes cuts a state out,
// behind a multiplication where it lies across bytes: a shift and a mask would take two places in the
// pipeline that is busiest, and products have one of their own.
__device__ __forceinline__ uint32_t hash_at(uint32_t bits, int at) {
  const int up = (8 - at % 8) % 8, byte = (at + up) / 8;
  return __byte_perm(bits << up, 0, 0x4400 | (byte + 1) << 4 | byte) * kMultiplier;
}

// The hash of a state of a byte and, above it, another one.
__device__ __forceinline__ uint32_t hash_of(uint32_t low, uint32_t high) {
  return low * kMultiplier + high * (kMultiplier << 8);
}

// The hash of state j of a piece.
template <int RATE>
__device__ __forceinline__ uint32_t hash_of(const Piece<RATE>& piece, int j) {
  if constexpr (RATE <= 3) {
    return RATE == 3 ? hash_at(piece.bits[j / 2], j % 2 * 6) : hash_at(piece.bits[0], j * 2 * RATE);
  } else if constexpr (RATE == 4) {
    return j == 3 ? hash_of(piece.bits[0] >> 24, piece.bits[1]) : hash_at(piece.bits[0], 8 * j);
  } else {
    const int p = j * RATE;
    const uint32_t above = p / 32 < 2 ? piece.bits[(p / 32 + 1) % 3] : 0;
    return (__funnelshift_r(piece.bits[p / 32], above, p % 32) & 0xffffu) * kMultiplier;
  }
}

// Both weights of a hash.
__device__ __forceinline__ uint32_t weights_of(uint32_t hash) {
  return added(masked(hash), masked(__byte_perm(hash, 0, 0x0123)));
}

// The lane's four registers of a tile.
template <int RATE>
__device__ __forceinline__ void decode(const Piece<RATE>& piece, uint32_t (&a)[4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if (RATE <= 4) {
      a[r] = weights_of(hash_of(piece, r));
    } else {
      const uint32_t one = masked(hash_of(piece, 2 * r)), two = masked(hash_of(piece, 2 * r + 1));
      a[r] = added(__byte_perm(one, two, 0x5410), __byte_perm(one, two, 0x7632));
    }
  }
}

// What a lane reads of a tile in shared memory for pieces 2 i and 2 i + 1: fewer words than those of
// two pieces that do not follow each other.
template <int RATE, bool BY_TWO = RATE <= 4>
struct TwoPieces {
  uint32_t word[3];
};
template <int RATE>
struct TwoPieces<RATE, false> {
  Piece<RATE> one, two;
};

template <int RATE>
__device__ __forceinline__ TwoPieces<RATE> load_two(const uint8_t* circle, int i) {
  const uint32_t* words = reinterpret_cast<const uint32_t*>(circle);
  if constexpr (RATE == 1) {
    return {words[i / 2], words[(i + 1) / 2 % 8], static_cast<uint32_t>(i % 2 * 16)};
  } else if constexpr (RATE == 2) {
    return {words[i], words[(i + 1) % 16], 0};
  } else if constexpr (RATE == 3) {
    const int at = i * 3 / 2, shift = i % 2 * 16;
    const uint32_t middle = words[at + 1], last = words[i == 15 ? 0 : at + 2];
    return {__funnelshift_r(words[at], middle, shift), __funnelshift_r(middle, last, shift), 0};
  } else if constexpr (RATE == 4) {
    const uint2 both = *reinterpret_cast<const uint2*>(words + 2 * i);
    return {both.x, both.y, circle[(i + 1) % 16 * 8]};
  } else {
    return {load_piece<RATE, false>(circle, 2 * i), load_piece<RATE, false>(circle, 2 * i + 1)};
  }
}

// The registers of both pieces.
template <int RATE>
__device__ __forceinline__ void decode(const TwoPieces<RATE>& pieces, uint32_t (&one)[4],
                                       uint32_t (&two)[4]) {
  if constexpr (RATE > 4) {
    decode<RATE>(pieces.one, one);
    decode<RATE>(pieces.two, two);
  } else {
    const uint32_t first = pieces.word[0], second = pieces.word[1];
    uint32_t hash[8];
    if constexpr (RATE == 1) {
      const uint32_t bits = __funnelshift_r(first, second, pieces.word[2]);
#pragma unroll
      for (int j = 0; j < 8; ++j) hash[j] = hash_at(bits, 2 * j);
    } else if constexpr (RATE == 2) {
      const uint32_t middle = __funnelshift_r(first, second, 16);
#pragma unroll
      for (int j = 0; j < 8; ++j) hash[j] = hash_at(j < 4 ? first : middle, j % 4 * 4);
    } else if constexpr (RATE == 3) {
      const uint32_t middle = __funnelshift_r(first, second, 18);
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        hash[j] = hash_at(first, 6 * j), hash[3 + j] = hash_at(middle, 6 * j);
      }
      hash[6] = hash_at(second, 4), hash[7] = hash_at(second, 10);
    } else {
#pragma unroll
      for (int j = 0; j < 3; ++j) {
        hash[j] = hash_at(first, 8 * j), hash[4 + j] = hash_at(second, 8 * j);
      }
      hash[3] = hash_at(__funnelshift_r(first, second, 24), 0);
      hash[7] = hash_of(second >> 24, pieces.word[2]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) one[j] = weights_of(hash[j]), two[j] = weights_of(hash[4 + j]);
  }
}

// Adds 16 rows x 16 columns, the registers of a tile, times 16 columns x 8 tokens.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One of the linears of a product, which share their input. Tiles of rows are numbered through all of
// them; each linear begins with one of its own.
struct alignas(16) Member {
  int first_tile, rows;
  int output;  // of its first row
};

struct Stack {
  const Member* members;
  int count, tiles;

  // The linear that has a tile: `from` or one behind it.
  __device__ __forceinline__ int member_of(int tile, int from = 0) const {
    while (from + 1 < count && tile >= __ldg(&members[from + 1].first_tile)) ++from;
    return from;
  }
};

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
