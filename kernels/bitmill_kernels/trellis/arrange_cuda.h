// How activations are brought to circles on Hopper: ordered, rotated and divided by a power of two,
// in fp16,
//
//   x'[t, k] = (rotation of x[t, order])[k] / factor
//
// for many tokens times group_scale[g], and laid out in shared memory as hopper/wgmma.h reads it,
// but for one thing. A product takes 16 columns, and lane j has of its left operand columns
// 2 (j % 4), 2 (j % 4) + 8 and one further of both. Two tiles exchange columns, so that a lane's
// part of two products are two pieces of one circle that follow each other: the first takes columns
// 0, 1, 4, 5, 8, 9, 12 and 13 of both tiles, the second the others, and half of the lanes read
// either circle.

#pragma once

#include "../hopper/wgmma.h"

namespace {

constexpr int kGroup = 128;

// What a warp knows of a group of a linear's columns: a lane has four of them.
struct GroupColumns {
  int first, count, lane;
  int from[4];

  __device__ __forceinline__ GroupColumns(const DecodeArguments& p, int g, int columns, int lane)
      : first(g * kGroup + 4 * lane), count(min(kGroup, columns - g * kGroup)), lane(lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      from[i] = first + i < columns && p.order ? __ldg(p.order + first + i) : first + i;
    }
  }

  // Those of a row of activations that begins at x[row], rotated.
  __device__ __forceinline__ void rotate(const DecodeArguments& p, int64_t row,
                                         float (&value)[4]) const {
    int size[4];  // of the power of two of columns that are rotated together
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * lane + i;
      size[i] = kGroup;
      if (count < kGroup) {
        for (int start = 0; at < count; start += size[i]) {
          size[i] = 1 << (31 - __clz(count - start));
          if (at < start + size[i]) break;
        }
      }
      value[i] = 0.0f;
      if (at < count) {
        uint32_t h = static_cast<uint32_t>(first + i + 1) * 0x9e3779b1u;
        h = (h ^ (h >> 15)) * 0x85ebca77u;
        value[i] = load_input(p, row + from[i]);
        if (h >> 31) value[i] = -value[i];
      } else {
        size[i] = 1;
      }
    }
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) {
      float other[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        other[i] = step < 4 ? value[i ^ step] : __shfl_xor_sync(0xffffffffu, value[i], step / 4);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const bool upper = (4 * lane + i) & step;
        if (step < size[i]) value[i] = upper ? other[i] - value[i] : value[i] + other[i];
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] *= rsqrtf(static_cast<float>(size[i]));
  }
};

// Writes a lane's four columns, times `scale`, as those of token `token` of `tokens` of a group.
__device__ __forceinline__ void lay_out(uint8_t* group, int tokens, int token, int lane,
                                        const float (&value)[4], float scale) {
  const int eighth = lane / 8 * 4 + lane / 2 % 2, word = lane / 4 % 2 * 2 + lane % 2;
  uint8_t* to = group + word * 4;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    *reinterpret_cast<uint32_t*>(to + input_offset(tokens, token, eighth + 2 * i)) =
        word_of(__floats2half2_rn(value[2 * i] * scale, value[2 * i + 1] * scale));
  }
}

}  // namespace
