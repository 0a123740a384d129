// Dequantized rows on Hopper and later, for products of many tokens:
//
//   out[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),  columns in packed order
//
// The same equation and layout as dequantize_triton.py. A block takes kRows rows of one pair of
// groups, a thread 16 bytes of the low plane at a time: 8 columns of every field of both groups,
// each a store of 8 values. Codes become fp16 by the exponent bits of 1024 above them; that and
// both subtractions are exact, the product with the scale is rounded once. Next to nothing is
// computed, so the time is that of writing `out`.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kRows = 64;
constexpr int kThreads = 256;

// Byte offsets in units of 16; packed columns [first, first + live) of the two groups.
struct PairPlace {
  int width;
  uint32_t low, high, grid;
  int first[2], live[2];
};

}  // namespace

extern "C" struct DequantizeArguments {
  const uint8_t* planes;
  const uint8_t* grid;
  const PairPlace* pairs;
  void* out;
  int pair_count;
  int row;  // first row of the linear, the multiple of 64 that out begins with
  int rows;
  int K;
  int dtype;  // 0 fp16, 1 bf16, 2 fp32
};

namespace {

template <class Value>
struct alignas(16) Eight {
  Value values[8];
};

__device__ __forceinline__ void scale_two(__half* to, __half2 difference, __half2 scale) {
  *reinterpret_cast<__half2*>(to) = __hmul2(difference, scale);
}

__device__ __forceinline__ void scale_two(__nv_bfloat16* to, __half2 difference, __half2 scale) {
  const float2 d = __half22float2(difference), s = __half22float2(scale);
  *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(d.x * s.x, d.y * s.y);
}

__device__ __forceinline__ void scale_two(float* to, __half2 difference, __half2 scale) {
  const float2 d = __half22float2(difference), s = __half22float2(scale);
  to[0] = d.x * s.x, to[1] = d.y * s.y;
}

template <class Value>
__device__ __forceinline__ void store(Value* to, const Eight<Value>& eight, int live, bool aligned) {
  if (aligned && live >= 8) {
    *reinterpret_cast<Eight<Value>*>(to) = eight;
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < live) to[i] = eight.values[i];
    }
  }
}

template <int LOW, int HIGH, class Value>
__device__ __forceinline__ void expand(const DequantizeArguments& p, const PairPlace& pair,
                                       int first_row) {
  constexpr int kVectors = 2 * LOW;  // 16 bytes each, a row
  constexpr int kHighVectors = HIGH ? 2 * HIGH : 1;
  constexpr int kTasks = kRows * kVectors / kThreads > 0 ? kRows * kVectors / kThreads : 1;
  const uint8_t* low = p.planes + (static_cast<size_t>(pair.low) << 4);
  const uint8_t* high = p.planes + (static_cast<size_t>(pair.high) << 4);
  const uint8_t* grid = p.grid + (static_cast<size_t>(pair.grid) << 4);
  const bool aligned = p.K % 8 == 0;
#pragma unroll 2
  for (int task = 0; task < kTasks; ++task) {
    const int item = task * kThreads + threadIdx.x;
    const int row = first_row + item / kVectors, v = item % kVectors;
    if (item >= kRows * kVectors || row >= p.rows) continue;
    const size_t at = static_cast<size_t>(p.row + row);
    const uint4 low_words = __ldg(reinterpret_cast<const uint4*>(low + at * 32 * LOW) + v);
    uint4 high_words = {};
    if constexpr (HIGH != 0) {
      high_words =
          __ldg(reinterpret_cast<const uint4*>(high + at * 32 * HIGH) + v % kHighVectors);
    }
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(grid + at * 8));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    const uint32_t* l = reinterpret_cast<const uint32_t*>(&low_words);
    const uint32_t* h = reinterpret_cast<const uint32_t*>(&high_words);
    Value* out = static_cast<Value*>(p.out) + static_cast<size_t>(row) * p.K;
    const int slice = HIGH * (v / kHighVectors);  // bits of the high plane that this slice skips
#pragma unroll
    for (int g = 0; g < 2; ++g) {
      const uint32_t word = g ? words.y : words.x;
      const __half2 both = *reinterpret_cast<const __half2*>(&word);
      const __half2 scale = __low2half2(both), zero = __high2half2(both);
#pragma unroll
      for (int j = 0; j < 8 / LOW; ++j) {
        Eight<Value> eight;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          uint32_t code = (l[i] >> (LOW * j + 8 * g)) & (((1u << LOW) - 1) * 0x00010001u);
          if constexpr (HIGH != 0) {
            const uint32_t upper = h[i] >> (LOW * j + slice + 8 * g);
            code |= (upper & (((1u << HIGH) - 1) * 0x00010001u)) << LOW;
          }
          code |= 0x64006400u;
          const __half2 biased = *reinterpret_cast<const __half2*>(&code);
          const __half2 exact = __hsub2(biased, __half2half2(__ushort_as_half(0x6400)));
          scale_two(&eight.values[2 * i], __hsub2(exact, zero), scale);
        }
        const int column = 16 * LOW * j + 8 * v;
        store(out + pair.first[g] + column, eight, pair.live[g] - column, aligned);
      }
    }
  }
}

template <class Value>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(const __grid_constant__ DequantizeArguments p) {
  asm volatile("griddepcontrol.launch_dependents;");
  const PairPlace pair = p.pairs[blockIdx.x];
  const int first_row = blockIdx.y * kRows;
  switch (pair.width) {
    case 1: return expand<1, 0, Value>(p, pair, first_row);
    case 2: return expand<2, 0, Value>(p, pair, first_row);
    case 3: return expand<2, 1, Value>(p, pair, first_row);
    case 4: return expand<4, 0, Value>(p, pair, first_row);
    case 5: return expand<4, 1, Value>(p, pair, first_row);
    case 6: return expand<4, 2, Value>(p, pair, first_row);
    default: return expand<8, 0, Value>(p, pair, first_row);
  }
}

}  // namespace

// Writes out [rows, K]. Returns a cudaError_t; 0 is success.
extern "C" int bitmill_dequantize_rows(const DequantizeArguments* arguments, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(arguments->pair_count, (arguments->rows + kRows - 1) / kRows);
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  switch (arguments->dtype) {
    case 0: return cudaLaunchKernelEx(&config, dequantize_kernel<__half>, *arguments);
    case 1: return cudaLaunchKernelEx(&config, dequantize_kernel<__nv_bfloat16>, *arguments);
    default: return cudaLaunchKernelEx(&config, dequantize_kernel<float>, *arguments);
  }
}
