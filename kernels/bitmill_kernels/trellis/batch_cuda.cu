// Products with a linear in trellis codes on Hopper by `wgmma` (hopper/wgmma.h), straight from its
// circles (layout.py, code.py), for any number of tokens:
//
//   arrange:  x'[t, k] = group_scale[g] * (rotation of x[t, order])[k] / factor[t]           in fp16
//   product:  y[t, n]  = factor[t] * row_scale[n] * sum_k x'[t, k] value[n, k]
//
// A unit is a tile of rows of one group: its circles lie one after the other. What a lane holds of
// the left operand comes from one piece of a circle, as in product_cuda.cu. factor is a power of two
// that keeps a token's inputs in fp16: its largest input, times the most that a rotation and a scale
// of a group can make of it, stays below 2^15.

#include "../hopper/wgmma.h"
#include "decode_cuda.h"

namespace {

constexpr int kGroup = 128, kTile = 16, kTiles = kGroup / kTile;
constexpr int kWarps = kPrologueThreads / 32;
constexpr int64_t kMostRead = 1 << 22;
constexpr float kLargestRotation = 11.3138f;  // sqrt(128), rounded up

// Units are the circles of rows of one group: [rows / 16][8][32 rate].
struct Trellis {
  static constexpr int kGroups = 1;

  template <int ROWS>
  __device__ static void copy(const DecodeArguments&, const Source& unit, const Target& target,
                              uint8_t* to, uint32_t full, uint64_t policy) {
    const uint64_t from = (static_cast<uint64_t>(unit.high) << 32 | unit.low) << 4;
    const int bytes = (target.live_rows + kTile - 1) / kTile * kTiles * 32 * target.width;
    barrier_expect(full, bytes);
    bulk_copy(to, reinterpret_cast<const uint8_t*>(from), bytes, full, policy);
  }

  template <int ROWS, int TOKENS>
  __device__ __forceinline__ void add_unit(int rate, const uint8_t* staged, Reader& reader,
                                           float (&total)[TOKENS / 2]) const {
    switch (rate) {
      case 1: return add_circles<1, TOKENS>(staged, reader, total);
      case 2: return add_circles<2, TOKENS>(staged, reader, total);
      case 3: return add_circles<3, TOKENS>(staged, reader, total);
      case 4: return add_circles<4, TOKENS>(staged, reader, total);
      case 5: return add_circles<5, TOKENS>(staged, reader, total);
      case 6: return add_circles<6, TOKENS>(staged, reader, total);
      case 7: return add_circles<7, TOKENS>(staged, reader, total);
      case 8: return add_circles<8, TOKENS>(staged, reader, total);
    }
  }

  template <int RATE, int TOKENS>
  __device__ __forceinline__ void add_circles(const uint8_t* staged, Reader& reader,
                                              float (&total)[TOKENS / 2]) const {
    const int lane = reader.lane.row * 4 + reader.lane.column;
    uint32_t slot;
    const uint32_t inputs = next_inputs<TOKENS>(reader, &slot);
    const uint8_t* circles = staged + reader.rows / kTile * (kTiles * 32 * RATE);
    Piece<RATE> pieces[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) pieces[e] = load_piece<RATE, false>(circles + e * 32 * RATE, lane);
#pragma unroll
    for (int batch = 0; batch < 4; ++batch) {
      uint32_t(&made)[2][4] = next_batch(reader, batch, slot);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        decode<RATE>(pieces[e], made[e]);
        const int next = 2 * batch + 2 + e;
        if (next < 8) pieces[e] = load_piece<RATE, false>(circles + next * 32 * RATE, lane);
      }
      multiply_batch<TOKENS>(total, made, inputs, 2 * batch, batch == 0 ? reader.older : 1);
    }
  }
};

// Brings activations into the layout of wgmma.h, rotated: a warp takes a group of a token, a lane
// four columns of it; a block's warps share the token. A block looks for the token's factor itself
// where `finds` says so, else another kernel has. Blocks are so small that they can wait beside the
// product before.
__global__ void __launch_bounds__(kPrologueThreads, 16)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int columns,
                   const float* group_scales, float largest_scale, int tile, int finds) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int parts = (p.pair_count + kWarps - 1) / kWarps;
  const int token = blockIdx.x / parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = blockIdx.x % parts * kWarps + warp, first = g * kGroup + 4 * lane;
  const int64_t row = static_cast<int64_t>(token) * p.x_stride;
  int from[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    from[i] = first + i < columns && p.order ? __ldg(p.order + first + i) : first + i;
  }
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float factor;
  if (finds) {
    factor = token_factor<kPrologueThreads>(p, row, columns, largest_scale);
    if (g == 0 && lane == 0) p.factors[token] = factor;
  } else {
    factor = __ldcg(p.factors + token);
  }
  if (g >= p.pair_count) return;
  const int count = min(kGroup, columns - g * kGroup);
  int size[4];  // of the power of two of columns that are rotated together
  float value[4];
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
  const float scale = group_scales[g], inverse = __frcp_rn(factor);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] *= scale * rsqrtf(static_cast<float>(size[i])) * inverse;
  }
  uint8_t* to = p.inputs +
                (static_cast<size_t>(token / tile) * p.pair_count + g) * group_bytes(tile) +
                input_offset(tile, token % tile, lane / 2) + lane % 2 * 8;
  *reinterpret_cast<uint2*>(to) = make_uint2(word_of(__floats2half2_rn(value[0], value[1])),
                                             word_of(__floats2half2_rn(value[2], value[3])));
}

}  // namespace

// Multiplies any number of tokens, `tile` in a launch; see bitmill_batch of matmul/batch_cuda.cu.
// pair_count is the number of groups, their scales f32 [groups] are at most `largest_scale`.
extern "C" int bitmill_trellis_batch(const DecodeArguments* arguments, int columns,
                                     const float* group_scales, float largest_scale, int groups,
                                     int tile, int blocks, int shared, int overlap,
                                     void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const float scale = largest_scale * kLargestRotation;
  // Every block of a token reads all of it to find its factor; past some megabytes that takes longer
  // than another kernel.
  const int parts = (arguments->pair_count + kWarps - 1) / kWarps;
  const int finds = static_cast<int64_t>(arguments->tokens) * parts * columns <= kMostRead;
  cudaError_t status = cudaSuccess;
  if (!finds) {
    status = launch_kernel(factor_kernel, arguments->tokens, kFactorThreads, 0, overlap, s,
                           *arguments, columns, scale);
  }
  if (status == cudaSuccess) {
    status = launch_kernel(arrange_kernel, arguments->tokens * parts, kPrologueThreads, 0, overlap,
                           s, *arguments, columns, group_scales, scale, tile, finds);
  }
  if (status != cudaSuccess) return status;
#define BITMILL_SHAPE(GROUPS, TOKENS)     \
  if (groups == GROUPS && tile == TOKENS) \
    return launch<Trellis, GROUPS, TOKENS>(*arguments, blocks, shared, overlap, s);
  BITMILL_SHAPE(4, 8)
  BITMILL_SHAPE(2, 8)
  BITMILL_SHAPE(4, 16)
  BITMILL_SHAPE(2, 16)
  BITMILL_SHAPE(4, 32)
  BITMILL_SHAPE(2, 32)
  BITMILL_SHAPE(4, 64)
  BITMILL_SHAPE(2, 64)
  BITMILL_SHAPE(2, 128)
  BITMILL_SHAPE(2, 256)
#undef BITMILL_SHAPE
  return -1;
}
