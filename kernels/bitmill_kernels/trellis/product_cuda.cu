// Linears in trellis codes on a GPU, straight from their circles (layout.py, code.py).
//
//   prologue:  x'[t, k] = group_scale[g] * (rotation of x[t, order])[k] / factor[t, g]     in fp16
//   product:   y[t, n]  = row_scale[n] * sum_g factor[t, g] * sum_k x'[t, k] value[n, k]
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
    product(const Group* groups, int group_count, int N, int tokens, const __half* x,
            const float* factors, const float* row_scales, T* y) {
  __shared__ float shared[kWarps][NT][4][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t stride = static_cast<int64_t>(group_count) * kGroup, row = blockIdx.x;
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
  for (int i = threadIdx.x; i < NT * 128; i += 32 * kWarps) {
    const int n = i / 128, part = i / 32 % 4, from = i % 32;
    const int token = 8 * n + 2 * (from % 4) + part % 2;
    const int out = row * kTile + from / 4 + 8 * (part / 2);
    if (token >= tokens || out >= N) continue;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w][n][part][from];
    store(y + static_cast<int64_t>(token) * N + out, row_scales[out] * sum);
  }
}

// One group of one token a block of 128 threads.
template <typename T>
__global__ void prologue(const T* x, int K, const int* order, const float* group_scales, __half* out,
                         float* factors) {
  __shared__ float values[kGroup];
  __shared__ float largest[4];
  const int g = blockIdx.x, thread = threadIdx.x, k = g * kGroup + thread;
  const int64_t token = blockIdx.y;
  const int count = min(kGroup, K - g * kGroup);
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
    own = to_float(x[token * K + (order ? order[k] : k)]);
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
  own *= group_scales[g] * rsqrtf(static_cast<float>(size));
  if (thread >= count) own = 0.f;
  float most = fabsf(own);
  for (int step = 16; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
  if (thread % 32 == 0) largest[thread / 32] = most;
  __syncthreads();
  most = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3]));
  int exponent = 0;
  if (most > 0.f) frexpf(most, &exponent);
  exponent = max(-120, min(120, exponent));
  out[(token * gridDim.x + g) * kGroup + thread] = __float2half(own * ldexpf(1.f, -exponent));
  if (thread == 0) factors[token * gridDim.x + g] = ldexpf(1.f, exponent);
}

template <int RATE, typename T>
__device__ __forceinline__ void write_tile(const uint8_t* circle, int n, int first_row, int end_row,
                                           int k, int K, const float* row_scales, float scale,
                                           T* out) {
  const int lane = threadIdx.x % 32;
  uint32_t a[4];
  decode<RATE>(load_piece<RATE>(circle, lane), a);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int at = n + lane / 4 + 8 * (r % 2), column = k + 2 * (lane % 4) + 8 * (r / 2);
    if (at >= end_row) continue;
    const float2 v = __half22float2(*reinterpret_cast<const __half2*>(&a[r]));
    const float own = row_scales[at];
    T* to = out + static_cast<int64_t>(at - first_row) * K + column;
    if (column < K) store(to, own * (scale * v.x));
    if (column + 1 < K) store(to + 1, own * (scale * v.y));
  }
}

// Eight tiles of a group a block; rows from first_row, a multiple of 16, to end_row.
template <typename T>
__global__ void decode_rows(const Group* groups, int first_row, int end_row, int K,
                            const float* row_scales, const float* group_scales, T* out) {
  const int g = blockIdx.y, c = threadIdx.x / 32;
  const Group group = groups[g];
  if (c >= group.columns) return;
  const int rate = static_cast<int>(group.rate), n = first_row + kTile * blockIdx.x;
  const uint8_t* circle =
      group.circles + ((n / kTile) * group.columns + c) * 32 * static_cast<int64_t>(rate);
  const int k = g * kGroup + c * kTile;
  const float scale = group_scales[g];
  switch (rate) {
    case 1: return write_tile<1>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 2: return write_tile<2>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 3: return write_tile<3>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 4: return write_tile<4>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 5: return write_tile<5>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 6: return write_tile<6>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    case 7: return write_tile<7>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
    default: return write_tile<8>(circle, n, first_row, end_row, k, K, row_scales, scale, out);
  }
}

template <typename T>
cudaError_t multiply_all(const void* x, int tokens, int K, const int* order,
                         const float* group_scales, const Group* groups, int group_count, int N,
                         const float* row_scales, __half* inner, float* factors, void* y,
                         cudaStream_t stream) {
  prologue<T><<<dim3(group_count, tokens), kGroup, 0, stream>>>(
      static_cast<const T*>(x), K, order, group_scales, inner, factors);
  const int blocks = (N + kTile - 1) / kTile, threads = 32 * kWarps;
  T* out = static_cast<T*>(y);
  if (tokens <= 8)
    product<T, 1><<<blocks, threads, 0, stream>>>(groups, group_count, N, tokens, inner, factors,
                                                  row_scales, out);
  else if (tokens <= 16)
    product<T, 2><<<blocks, threads, 0, stream>>>(groups, group_count, N, tokens, inner, factors,
                                                  row_scales, out);
  else
    product<T, 4><<<blocks, threads, 0, stream>>>(groups, group_count, N, tokens, inner, factors,
                                                  row_scales, out);
  return cudaGetLastError();
}

}  // namespace

// x [tokens, K] and y [tokens, N] of dtype 1 (fp16) or 2 (bf16); 1 to 32 tokens; order i32 [K] or
// null; scratch: inner f16 [tokens, 128 G], factors f32 [tokens, G]. Returns a cudaError_t, as all
// functions here.
extern "C" int bitmill_trellis_product_cuda(const void* x, int dtype, int tokens, int K,
                                            const int* order, const float* group_scales,
                                            const void* groups, int group_count, int N,
                                            const float* row_scales, void* inner, float* factors,
                                            void* y, void* stream) {
  const auto call = dtype == 1 ? multiply_all<__half> : multiply_all<__nv_bfloat16>;
  return call(x, tokens, K, order, group_scales, static_cast<const Group*>(groups), group_count, N,
              row_scales, static_cast<__half*>(inner), factors, y,
              static_cast<cudaStream_t>(stream));
}

// out [end_row - first_row, K] of dtype 0 (fp32), 1 or 2.
extern "C" int bitmill_trellis_decode_cuda(const void* groups, int group_count, int first_row,
                                           int end_row, int K, const float* row_scales,
                                           const float* group_scales, int dtype, void* out,
                                           void* stream) {
  const dim3 grid((end_row - first_row + kTile - 1) / kTile, group_count);
  const Group* from = static_cast<const Group*>(groups);
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (dtype == 0)
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, first_row, end_row, K, row_scales, group_scales,
                                             static_cast<float*>(out));
  else if (dtype == 1)
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, first_row, end_row, K, row_scales, group_scales,
                                             static_cast<__half*>(out));
  else
    decode_rows<<<grid, 32 * kWarps, 0, s>>>(from, first_row, end_row, K, row_scales, group_scales,
                                             static_cast<__nv_bfloat16*>(out));
  return cudaGetLastError();
}
