// Linears in trellis codes on a GPU, straight from their circles (layout.py, code.py). Those that
// share an input are multiplied together, by inputs that are brought into rotated columns once.
//
//   prologue:  x'[t, k] = (rotation of x[t, order])[k] / factor[t, g]                      in fp16
//   product:   y[t, n]  = row_scale[n] * sum_g factor[t, g] * group_scale[g]
//                         * sum_k x'[t, k] value[n, k]
//   decode:    w[n, k]  = row_scale[n] * group_scale[g] * value[n, k]
//
// The eight values of a lane are what the lane holds of the left operand of mma.m16n8k16, and come
// from one piece of the circle: two or three words, shifted once. No weight is written to memory.
// factor is the power of two that brings a group's largest input below 1, so fp16 is never left.
// A block multiplies one row of tiles; its warps share the groups, and their sums are added in turn.

#include "circles_cuda.h"

namespace {

constexpr int kGroup = 128, kTile = 16, kWarps = 8;

struct Group {
  const uint8_t* circles;  // [tile rows][columns][32 rate]
  int64_t rate;
  int64_t columns;  // of tiles
};

// Sums of one group: tokens [8 NT] of 16 rows.
template <int RATE, int NT>
__device__ __forceinline__ void add_group(const uint8_t* circle, int columns, const __half* x,
                                          int64_t stride, int tokens, float (&sums)[NT][4]) {
  const int lane = threadIdx.x % 32, token = lane / 4;
#pragma unroll 4
  for (int c = 0; c < columns; ++c) {
    uint32_t a[4];
    decode<RATE>(load_piece<RATE>(circle + c * 32 * RATE, lane), a);
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      uint32_t b0 = 0, b1 = 0;
      if (token + 8 * n < tokens) {
        const __half* from = x + (token + 8 * n) * stride + c * kTile + 2 * (lane % 4);
        b0 = __ldg(reinterpret_cast<const uint32_t*>(from));
        b1 = __ldg(reinterpret_cast<const uint32_t*>(from + 8));
      }
      multiply(sums[n], a, b0, b1);
    }
  }
}

template <typename T, int NT>
__global__ void __launch_bounds__(32 * kWarps)
    product(const Group* groups, int group_count, Stack stack, int N, int tokens, const __half* x,
            const float* factors, const float* row_scales, T* y) {
  __shared__ float shared[kWarps][NT][4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int member = stack.member_of(blockIdx.x);
  groups += member * group_count;
  factors += member * tokens * group_count;
  const int64_t stride = static_cast<int64_t>(group_count) * kGroup;
  const int64_t row = blockIdx.x - stack.members[member].first_tile;
  float total[NT][4] = {};
  for (int g = warp; g < group_count; g += kWarps) {
    const Group group = groups[g];
    const int columns = static_cast<int>(group.columns), rate = static_cast<int>(group.rate);
    const uint8_t* circle = group.circles + row * columns * 32 * rate;
    const __half* from = x + g * kGroup;
    float sums[NT][4] = {};
    switch (rate) {
      case 1: add_group<1, NT>(circle, columns, from, stride, tokens, sums); break;
      case 2: add_group<2, NT>(circle, columns, from, stride, tokens, sums); break;
      case 3: add_group<3, NT>(circle, columns, from, stride, tokens, sums); break;
      case 4: add_group<4, NT>(circle, columns, from, stride, tokens, sums); break;
      case 5: add_group<5, NT>(circle, columns, from, stride, tokens, sums); break;
      case 6: add_group<6, NT>(circle, columns, from, stride, tokens, sums); break;
      case 7: add_group<7, NT>(circle, columns, from, stride, tokens, sums); break;
      default: add_group<8, NT>(circle, columns, from, stride, tokens, sums); break;
    }
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = 8 * n + 2 * (lane % 4) + i % 2;
        if (token < tokens) total[n][i] += factors[token * group_count + g] * sums[n][i];
      }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared[warp][n][i][lane] = total[n][i];
  __syncthreads();
  const Member own = stack.members[member];
  for (int i = threadIdx.x; i < NT * 128; i += 32 * kWarps) {
    const int n = i / 128, part = i / 32 % 4, from = i % 32;
    const int token = 8 * n + 2 * (from % 4) + part % 2;
    const int64_t n_of_own = row * kTile + from / 4 + 8 * (part / 2), out = own.output + n_of_own;
    if (token >= tokens || n_of_own >= own.rows) continue;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][n][part][from];
    store(y + static_cast<int64_t>(token) * N + out, row_scales[out] * sum);
  }
}

// Column threadIdx.x of a group of a token, rotated; 0 where there is none. All 128 threads of a
// block. x: the token's activations, in the source's columns.
template <typename T>
__device__ __forceinline__ float rotated(const T* x, int K, const int* order, int g) {
  __shared__ float values[kGroup];
  const int thread = threadIdx.x, k = g * kGroup + thread, count = min(kGroup, K - g * kGroup);
  int start = 0, size = kGroup;
  while (thread < count) {
    size = 1 << (31 - __clz(count - start));
    if (thread < start + size) break;
    start += size;
  }
  float own = 0.f;
  if (thread < count) {
    uint32_t h = static_cast<uint32_t>(k + 1) * 0x9e3779b1u;
    h = (h ^ (h >> 15)) * 0x85ebca77u;
    own = to_float(x[order ? order[k] : k]);
    if (h >> 31) own = -own;
  }
  const int at = thread - start;
  for (int step = 1; step < kGroup; step *= 2) {
    values[thread] = own;
    __syncthreads();
    if (thread < count && step < size)
      own = at & step ? values[thread - step] - own : own + values[thread + step];
    __syncthreads();
  }
  return thread < count ? own * rsqrtf(static_cast<float>(size)) : 0.f;
}

// One group of one token a block of 128 threads. factors f32 [members, tokens, G]: times the scale
// that each linear has for the group.
template <typename T>
__global__ void prologue(const T* x, int K, const int* order, const float* group_scales, int members,
                         __half* out, float* factors) {
  __shared__ float largest[4];
  const int g = blockIdx.x, thread = threadIdx.x;
  const int64_t token = blockIdx.y;
  const float own = rotated(x + token * K, K, order, g);
  float most = fabsf(own);
  for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  if (thread % 32 == 0) largest[thread / 32] = most;
  __syncthreads();
  most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  int exponent = 0;
  if (most > 0.f) frexpf(most, &exponent);
  exponent = max(-120, min(120, exponent));
  out[(token * gridDim.x + g) * kGroup + thread] = __float2half(own * ldexpf(1.f, -exponent));
  for (int m = thread; m < members; m += kGroup)
    factors[(m * gridDim.y + token) * gridDim.x + g] =
        ldexpf(1.f, exponent) * group_scales[m * gridDim.x + g];
}

// out [tokens, K]: activations as decoded rows take them. One group of one token a block.
template <typename T>
__global__ void rotate(const T* x, int K, const int* order, T* out) {
  const int64_t token = blockIdx.x;
  const int g = blockIdx.y, k = g * kGroup + threadIdx.x;
  const float own = rotated(x + token * K, K, order, g);
  if (k < K) store(out + token * K + k, own);
}

// Room of a warp for half a group's columns of a row of tiles; rows begin in other banks.
constexpr int kHalf = kGroup / 2;
template <typename T>
using HalfGroup = T[kTile][kHalf + 16 / sizeof(T)];

// To an even place.
__device__ __forceinline__ void store_two(float* to, float one, float two) {
  *reinterpret_cast<float2*>(to) = float2{one, two};
}
__device__ __forceinline__ void store_two(__half* to, float one, float two) {
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(one, two);
}
__device__ __forceinline__ void store_two(__nv_bfloat16* to, float one, float two) {
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(one, two);
}

// Decodes four tiles of a group from column c on.
template <int RATE, typename T>
__device__ __forceinline__ void decode_half(const uint8_t* circles, int c, int columns, float scale,
                                            const float (&row_scale)[2], HalfGroup<T>& to) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kHalf / kTile; ++i) {
    if (c + i >= columns) break;
    uint32_t a[4];
    decode<RATE>(load_piece<RATE>(circles + (c + i) * 32 * RATE, lane), a);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&a[r]));
      const float own = row_scale[r % 2];
      store_two(&to[lane / 4 + 8 * (r % 2)][i * kTile + 2 * (lane % 4) + 8 * (r / 2)],
                own * (scale * v.x), own * (scale * v.y));
    }
  }
}

// A group of 16 rows a warp; rows from first_row, a multiple of 16, to end_row. Half a group at a
// time goes by way of shared memory, so that a row is written in pieces of 16 bytes.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps)
    decode_rows(const Group* groups, int group_count, int first_row, int end_row, int K,
                const float* row_scales, const float* group_scales, T* out) {
  constexpr int kAtOnce = 16 / sizeof(T), kPieces = kHalf / kAtOnce;
  __shared__ __align__(16) HalfGroup<T> shared[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = blockIdx.y * kWarps + warp, n = first_row + kTile * blockIdx.x;
  if (g >= group_count) return;
  HalfGroup<T>& half = shared[warp];
  const Group group = groups[g];
  const int columns = static_cast<int>(group.columns), rate = static_cast<int>(group.rate);
  const uint8_t* circles =
      group.circles + (n / kTile) * static_cast<int64_t>(columns) * (32 * rate);
  const float scale = group_scales[g];
  const float row_scale[2] = {row_scales[min(n + lane / 4, end_row - 1)],
                              row_scales[min(n + lane / 4 + 8, end_row - 1)]};
  const bool whole = K % kAtOnce == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  for (int c = 0; c < columns; c += kHalf / kTile) {
    switch (rate) {
      case 1: decode_half<1, T>(circles, c, columns, scale, row_scale, half); break;
      case 2: decode_half<2, T>(circles, c, columns, scale, row_scale, half); break;
      case 3: decode_half<3, T>(circles, c, columns, scale, row_scale, half); break;
      case 4: decode_half<4, T>(circles, c, columns, scale, row_scale, half); break;
      case 5: decode_half<5, T>(circles, c, columns, scale, row_scale, half); break;
      case 6: decode_half<6, T>(circles, c, columns, scale, row_scale, half); break;
      case 7: decode_half<7, T>(circles, c, columns, scale, row_scale, half); break;
      default: decode_half<8, T>(circles, c, columns, scale, row_scale, half); break;
    }
    __syncwarp();
#pragma unroll
    for (int i = lane; i < kTile * kPieces; i += 32) {
      const int row = i / kPieces, at = i % kPieces * kAtOnce;
      const int column = g * kGroup + c * kTile + at;
      if (n + row >= end_row) continue;
      T* to = out + static_cast<int64_t>(n + row - first_row) * K + column;
      if (whole && column < K) {
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(&half[row][at]);
      } else {
        for (int e = 0; e < kAtOnce && column + e < K; ++e) to[e] = half[row][at + e];
      }
    }
    __syncwarp();
  }
}

template <typename T>
cudaError_t multiply_all(const void* x, int tokens, int K, const int* order, const Group* groups,
                         int group_count, const float* group_scales, const Stack& stack, int N,
                         const float* row_scales, __half* inner, float* factors, void* y,
                         cudaStream_t stream) {
  prologue<T><<<dim3(group_count, tokens), kGroup, 0, stream>>>(
      static_cast<const T*>(x), K, order, group_scales, stack.count, inner, factors);
  const auto call = tokens <= 8 ? product<T, 1> : tokens <= 16 ? product<T, 2> : product<T, 4>;
  call<<<stack.tiles, 32 * kWarps, 0, stream>>>(groups, group_count, stack, N, tokens, inner,
                                                factors, row_scales, static_cast<T*>(y));
  return cudaGetLastError();
}

}  // namespace

// x [tokens, K] and y [tokens, N] of dtype 1 (fp16) or 2 (bf16); 1 to 32 tokens; order i32 [K] or
// null. groups and group_scales f32 [members, G]; members have so many tiles of 16 rows, N rows in
// all. scratch: inner f16 [tokens, 128 G], factors f32 [members, tokens, G]. Returns a cudaError_t,
// as all functions here.
extern "C" int bitmill_trellis_product_cuda(const void* x, int dtype, int tokens, int K,
                                            const int* order, const void* groups, int group_count,
                                            const float* group_scales, const void* members,
                                            int member_count, int tiles, int N,
                                            const float* row_scales, void* inner, float* factors,
                                            void* y, void* stream) {
  const auto call = dtype == 1 ? multiply_all<__half> : multiply_all<__nv_bfloat16>;
  const Stack stack = {static_cast<const Member*>(members), member_count, tiles};
  return call(x, tokens, K, order, static_cast<const Group*>(groups), group_count, group_scales,
              stack, N, row_scales, static_cast<__half*>(inner), factors, y,
              static_cast<cudaStream_t>(stream));
}

// x and out [tokens, K] of dtype 0 (fp32), 1 or 2; order i32 [K] or null.
extern "C" int bitmill_trellis_rotate_cuda(const void* x, int dtype, int tokens, int K,
                                           const int* order, void* out, void* stream) {
  const dim3 grid(tokens, (K + kGroup - 1) / kGroup);
  const auto s = static_cast<cudaStream_t>(stream);
  if (dtype == 0)
    rotate<<<grid, kGroup, 0, s>>>(static_cast<const float*>(x), K, order, static_cast<float*>(out));
  else if (dtype == 1)
    rotate<<<grid, kGroup, 0, s>>>(static_cast<const __half*>(x), K, order,
                                   static_cast<__half*>(out));
  else
    rotate<<<grid, kGroup, 0, s>>>(static_cast<const __nv_bfloat16*>(x), K, order,
                                   static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}

// out [end_row - first_row, K] of dtype 0 (fp32), 1 or 2.
extern "C" int bitmill_trellis_decode_cuda(const void* groups, int group_count, int first_row,
                                           int end_row, int K, const float* row_scales,
                                           const float* group_scales, int dtype, void* out,
                                           void* stream) {
  const dim3 grid((end_row - first_row + kTile - 1) / kTile, (group_count + kWarps - 1) / kWarps);
  const Group* from = static_cast<const Group*>(groups);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (dtype == 0)
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, group_count, first_row, end_row, K, row_scales,
                                             group_scales, static_cast<float*>(out));
  else if (dtype == 1)
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, group_count, first_row, end_row, K, row_scales,
                                             group_scales, static_cast<__half*>(out));
  else
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, group_count, first_row, end_row, K, row_scales,
                                             group_scales, static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}
