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
constexpr float kLargestRotation = 11.3138f;  // sqrt(128), rounded up

// Units are the circles of rows of one group: [rows / 16][8][32 rate].
struct Trellis {
  static constexpr int kGroups = 1;

  template <int ROWS>
  __device__ static void copy(const DecodeArguments&, const Source& unit, const Target& target,
                              uint8_t* to, uint64_t* full, uint64_t policy) {
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
    uint64_t* slot;
    const uint32_t inputs = next_inputs<TOKENS>(reader, &slot);
    const uint8_t* circles = staged + reader.rows / kTile * (kTiles * 32 * RATE);
#pragma unroll
    for (int batch = 0; batch < 4; ++batch) {
      uint32_t(&made)[2][4] = next_batch(reader, batch, slot);
      decode<RATE, false>(circles + batch * 64 * RATE, lane, made[0]);
      decode<RATE, false>(circles + batch * 64 * RATE + 32 * RATE, lane, made[1]);
      multiply_batch<TOKENS>(total, made, inputs, 2 * batch, batch == 0 ? reader.older : 1);
    }
  }
};

// One group of one token a block of 128 threads, in the layout of wgmma.h. A block looks for the
// token's factor itself where `finds` says so, else another kernel has.
__global__ void __launch_bounds__(kGroup)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int columns,
                   const float* group_scales, float largest_scale, int tile, int finds) {
  __shared__ float values[kGroup];
  __shared__ float largest_of[kGroup / 32];
  const int g = blockIdx.x % p.pair_count, token = blockIdx.x / p.pair_count;
  const int thread = threadIdx.x, k = g * kGroup + thread, count = min(kGroup, columns - g * kGroup);
  const int64_t row = static_cast<int64_t>(token) * p.x_stride;
  int start = 0, size = kGroup;  // of the power of two of columns that are rotated together
  while (thread < count) {
    size = 1 << (31 - __clz(count - start));
    if (thread < start + size) break;
    start += size;
  }
  asm volatile("griddepcontrol.launch_dependents;");
  const int from = thread < count && p.order ? __ldg(p.order + k) : k;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  float factor;
  if (finds) {
    float largest = 0.0f;
    for (int i = thread; i < columns; i += kGroup) largest = fmaxf(largest, fabsf(load_input(p, row + i)));
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    if (thread % 32 == 0) largest_of[thread / 32] = largest;
    __syncthreads();
    largest = fmaxf(fmaxf(largest_of[0], largest_of[1]), fmaxf(largest_of[2], largest_of[3]));
    factor = factor_of(largest * largest_scale);
    if (g == 0 && thread == 0) p.factors[token] = factor;
  } else {
    factor = __ldcg(p.factors + token);
  }
  float own = 0.0f;
  if (thread < count) {
    uint32_t h = static_cast<uint32_t>(k + 1) * 0x9e3779b1u;
    h = (h ^ (h >> 15)) * 0x85ebca77u;
    own = load_input(p, row + from);
    if (h >> 31) own = -own;
  }
  const int at = thread - start;
  for (int step = 1; step < kGroup; step *= 2) {
    values[thread] = own;
    __syncthreads();
    if (thread < count && step < size) {
      own = at & step ? values[thread - step] - own : own + values[thread + step];
    }
    __syncthreads();
  }
  own *= group_scales[g] * rsqrtf(static_cast<float>(size)) * __frcp_rn(factor);
  const int within = token % tile;
  uint8_t* to = p.inputs +
                (static_cast<size_t>(token / tile) * p.pair_count + g) * group_bytes(tile) +
                input_offset(tile, within, thread / 8) + thread % 8 * 2;
  *reinterpret_cast<__half*>(to) = __float2half_rn(thread < count ? own : 0.0f);
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
  const int finds = static_cast<int64_t>(arguments->tokens) * columns <= 16384;
  cudaError_t status = cudaSuccess;
  if (!finds) {
    status = launch_kernel(factor_kernel, arguments->tokens, kFactorThreads, 0, overlap, s,
                           *arguments, columns, scale);
  }
  if (status == cudaSuccess) {
    status = launch_kernel(arrange_kernel, arguments->tokens * arguments->pair_count, kGroup, 0,
                           overlap, s, *arguments, columns, group_scales, scale, tile, finds);
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
#undef BITMILL_SHAPE
  return -1;
}
