// Products with linears in trellis codes that share an input, on Hopper by `wgmma`
// (hopper/wgmma.h), straight from their circles (layout.py, code.py), for any number of tokens, of
// activations as arrange_cuda.h says:
//
//   y[t, n] = factor[t] * row_scale[n] * sum_k x'[t, k] value[n, k]
//
// x' is each linear's own, as scales of groups are in it. A unit is a tile of rows of one group: its
// circles lie one after the other. factor keeps the inputs of a token in fp16: its largest one,
// times the most that a rotation and a scale of a group can make of it, stays below 2^15.

#include "arrange_cuda.h"
#include "circles_cuda.h"

namespace {

constexpr int kTile = 16, kTiles = kGroup / kTile;
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
    // Two tiles at once, half of the lanes reading either: see arrange_cuda.h.
    const int column = reader.lane.column, pair = reader.lane.row * 2 + column % 2;
    uint32_t slot;
    const uint32_t inputs = next_inputs<TOKENS>(reader, &slot);
    const uint8_t* circles = staged + (reader.rows / kTile * kTiles + column / 2) * (32 * RATE);
    TwoPieces<RATE> pieces = load_two<RATE>(circles, pair);
#pragma unroll
    for (int batch = 0; batch < 4; ++batch) {
      uint32_t(&made)[2][4] = next_batch(reader, batch, slot);
      decode(pieces, made[0], made[1]);
      if (batch < 3) pieces = load_two<RATE>(circles + (batch + 1) * 64 * RATE, pair);
      multiply_batch<TOKENS>(total, made, inputs, 2 * batch, batch == 0 ? reader.older : 1);
    }
  }
};

// Arranges activations: a warp takes a group of a token, and writes it with each linear's scale, one
// linear's groups behind another's; a block's warps share the token. A block
// looks for the token's factor itself where `finds` says so, else another kernel has. Blocks are so
// small that they can wait beside the product before.
__global__ void __launch_bounds__(kPrologueThreads, 16)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int columns,
                   const float* group_scales, float largest_scale, int tile, int finds) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int groups = (columns + kGroup - 1) / kGroup, parts = (groups + kWarps - 1) / kWarps;
  const int token = blockIdx.x / parts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int g = blockIdx.x % parts * kWarps + warp;
  const int64_t row = static_cast<int64_t>(token) * p.x_stride;
  const GroupColumns group(p, g, columns, lane);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float factor;
  if (finds) {
    factor = token_factor<kPrologueThreads>(p, row, columns, largest_scale);
    if (g == 0 && lane == 0) p.factors[token] = factor;
  } else {
    factor = __ldcg(p.factors + token);
  }
  if (g >= groups) return;
  float value[4];
  group.rotate(p, row, value);
  uint8_t* to =
      p.inputs + (static_cast<size_t>(token / tile) * p.pair_count + g) * group_bytes(tile);
#pragma unroll 1
  for (; g < p.pair_count; g += groups, to += static_cast<size_t>(groups) * group_bytes(tile)) {
    lay_out(to, tile, token % tile, lane, value, __ldg(group_scales + g) * __frcp_rn(factor));
  }
}

}  // namespace

// Multiplies any number of tokens, `tile` in a launch; see bitmill_batch of matmul/batch_cuda.cu.
// pair_count is the number of groups of all linears, one linear's behind another's; their scales f32
// [pair_count] are at most `largest_scale`.
extern "C" int bitmill_trellis_batch(const DecodeArguments* arguments, int columns,
                                     const float* group_scales, float largest_scale, int groups,
                                     int tile, int blocks, int shared, int overlap,
                                     void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const float scale = largest_scale * kLargestRotation;
  // Every block of a token reads all of it to find its factor; past some megabytes that takes longer
  // than another kernel.
  const int parts = ((columns + kGroup - 1) / kGroup + kWarps - 1) / kWarps;
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
  BITMILL_SHAPE(4, 32)
  BITMILL_SHAPE(2, 32)
  BITMILL_SHAPE(4, 64)
  BITMILL_SHAPE(2, 64)
  BITMILL_SHAPE(2, 128)
  BITMILL_SHAPE(2, 256)
#undef BITMILL_SHAPE
  return -1;
}
