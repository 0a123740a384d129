// How blocks that share a tile of rows bring its sums together, in a fixed order.
//
// A block leaves sums in global memory, and who needs them reads until they are there: a word that
// has not been written yet holds kNothing, which no sum is. So sums themselves say that they are
// there, one way through the L2 instead of three (sums written, counter written, sums read). Who has
// read a word puts kNothing back, for the next launch; the workspace begins with nothing else.

#pragma once

#include "units.h"

namespace {

constexpr uint32_t kNothing = 0xffffffffu;  // a NaN; arithmetic makes 0x7fffffff

__device__ __forceinline__ uint4 look(const uint4* from) {
  uint4 found;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "l"(from)
               : "memory");
  return found;
}

__device__ __forceinline__ void put(uint4* to, uint4 words) {
  asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(words.x),
               "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ uint32_t word_of_sum(float sum) {
  const uint32_t word = __float_as_uint(sum);
  return word == kNothing ? 0x7fffffffu : word;
}

__device__ __forceinline__ bool is_whole(uint4 words) {
  return words.x != kNothing && words.y != kNothing && words.z != kNothing && words.w != kNothing;
}

// Exchanges sums of a warp between blocks that share a tile, `self` among them in their order. Those
// that end with the tile, the takers, divide its cells of four sums a lane, AT_ONCE neighbours always
// to one block: each leaves its sums of the others' cells, and adds to its `own` what all others have
// left. A block that goes on to another tile leaves all. So a block waits only for blocks that do not
// wait before they leave their sums: all must run at once, or begin in order. A block has two slots:
// 1 for the tile that it begins, 0 for the one that it continues. Cells that are not `live` in this
// lane are left out.
template <int WARPS, int CELLS, int AT_ONCE, class Own, class Live>
__device__ __forceinline__ void share_sums(const DecodeArguments& p, const Target& tile, int warp,
                                           int thread, int self, const Own& own,
                                           const Live& live, float (&total)[CELLS * 4]) {
  constexpr int kBlocks = AT_ONCE < 2 ? 4 : 2;  // whose sums are fetched together
  const auto cells = [&](int block) {
    const int slot = block == 0 ? 1 : 0;
    return reinterpret_cast<uint4*>(p.partial) +
           (((tile.first_block + block) * 2 + slot) * WARPS + warp) * (CELLS * 32) + thread;
  };
  uint4* mine = cells(self);
#pragma unroll
  for (int i = 0; i < CELLS; ++i) {
    if (own(i) || !live(i)) continue;
    const float* sums = &total[4 * i];
    put(mine + i * 32, make_uint4(word_of_sum(sums[0]), word_of_sum(sums[1]), word_of_sum(sums[2]),
                                  word_of_sum(sums[3])));
  }
  if (self >= tile.ends) return;
#pragma unroll
  for (int i = 0; i < CELLS; i += AT_ONCE) {
    if (!own(i)) continue;
#pragma unroll 1
    for (int first = 0; first < tile.blocks; first += kBlocks) {
      const auto wanted = [&](int b, int j) {
        return first + b < tile.blocks && first + b != self && live(i + j);
      };
      uint4 parts[kBlocks][AT_ONCE];
      bool whole;
      do {
        whole = true;
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) {
            parts[b][j] = wanted(b, j) ? look(cells(first + b) + (i + j) * 32) : uint4{};
          }
        }
#pragma unroll
        for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
          for (int j = 0; j < AT_ONCE; ++j) whole = whole && is_whole(parts[b][j]);
        }
      } while (!whole);
#pragma unroll
      for (int b = 0; b < kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < AT_ONCE; ++j) {
          float* sum = &total[4 * (i + j)];
          sum[0] += __uint_as_float(parts[b][j].x), sum[1] += __uint_as_float(parts[b][j].y);
          sum[2] += __uint_as_float(parts[b][j].z), sum[3] += __uint_as_float(parts[b][j].w);
          if (wanted(b, j)) {
            put(cells(first + b) + (i + j) * 32, make_uint4(kNothing, kNothing, kNothing, kNothing));
          }
        }
      }
    }
  }
  __syncwarp();
}

}  // namespace
