// Product of many tokens on Hopper: y = x W^T for up to 256 tokens a launch, W in the runtime
// layout and never written to memory.
//
//   y[t, n] = factor[t] * sum_k half(scale[n, g] * (code[n, k] - zero[n, g])) * x[t, k] + bias[n]
//
// Units, tables, ring and ordered sums are those of decode_cuda.cu; what differs is who multiplies.
// Four warps, a warpgroup, share 64 rows, and `wgmma` takes their weights from registers and the
// activations of all tokens from shared memory. So a weight is decoded once a block, however many
// tokens there are:
//
//   one logical instruction (two for joined planes) puts the field of two columns under the
//   exponent of 1024, one packed multiplication and addition takes the place value and the zero
//   point out, exactly, and one packed multiplication applies the scale. This rounding, to a half,
//   is the only one before the sums, which are fp32.
//
// The prologue kernel writes activations in the order in which fields are read: for each pair of
// groups 16 products of 16 columns, in the layout of wgmma.h. Four lanes read 32 neighbouring columns
// of a group and exchange words, which makes whole eighths of its products. bf16 activations are
// divided by a power of two for each token, which another kernel finds; fp16 ones stay as they are.

#include "../hopper/wgmma.h"

namespace {

// Moved columns are picked out of rows in shared memory, from so many activations on and up to so
// many bytes of a row.
constexpr int kRowThreads = 512, kMostRowBytes = 200 << 10;
constexpr int64_t kLeastByRows = 1 << 18;

// word & mask | others, in one instruction.
__device__ __forceinline__ uint32_t select(uint32_t word, uint32_t mask, uint32_t others) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(out) : "r"(word), "r"(mask), "r"(others));
  return out;
}

// Two weights: scale * (field j of two columns - zero). `magic` is 1024 twice, in a register.
template <int LOW, int HIGH>
__device__ __forceinline__ uint32_t weight(uint32_t low, uint32_t high, int j, uint32_t magic,
                                           __half2 scale, __half2 zero) {
  uint32_t word = magic;
  if constexpr (HIGH != 0) {
    word = select(high, ((((1u << HIGH) - 1u) << LOW) * 0x00010001u) << (LOW * j), word);
  }
  word = select(low, (((1u << LOW) - 1u) * 0x00010001u) << (LOW * j), word);
  const __half2 field = *reinterpret_cast<const __half2*>(&word);
  const __half2 place = __float2half2_rn(1.0f / static_cast<float>(1 << (LOW * j)));
  const __half2 offset = __float2half2_rn(-1024.0f / static_cast<float>(1 << (LOW * j)));
  __half2 code;
  if constexpr (LOW == 1) {  // eighths of a zero point do not fit beside 1024
    code = __hsub2(__hfma2(field, place, offset), zero);
  } else {
    code = __hfma2(field, place, __hsub2(offset, zero));
  }
  return word_of(__hmul2(code, scale));
}

// Units are 64 or more rows of a pair of groups: fp16 scales and zero points, then planes.
struct Affine {
  static constexpr int kGroups = 2;
  uint32_t magic = 0x64006400u;

  __device__ Affine() {
    asm volatile("" : "+r"(magic));  // or every use would carry it as a constant of its own
  }

  template <int ROWS>
  __device__ static void copy(const DecodeArguments& p, const Source& unit, const Target& target,
                              uint8_t* to, uint32_t full, uint64_t policy) {
    const int low_bytes = ROWS * 32 * low_plane(target.width);
    const int high_bytes = ROWS * 32 * target.width - low_bytes;
    uint8_t* planes = to + ROWS * 8;
    barrier_expect(full, ROWS * 8 + low_bytes + high_bytes);
    bulk_copy(planes, p.planes + (static_cast<size_t>(unit.low) << 4), low_bytes, full, policy);
    if (high_bytes) {
      const uint8_t* high = p.planes + (static_cast<size_t>(unit.high) << 4);
      bulk_copy(planes + low_bytes, high, high_bytes, full, policy);
    }
    bulk_copy(to, p.grid + (static_cast<size_t>(unit.grid) << 4), ROWS * 8, full, policy);
  }

  template <int ROWS, int TOKENS>
  __device__ __forceinline__ void add_unit(int width, const uint8_t* staged, Reader& reader,
                                           float (&total)[TOKENS / 2]) const {
    switch (width) {
#define BITMILL_WIDTH(WIDTH, LOW, HIGH)                                             \
  case WIDTH:                                                                       \
    return add_planes<LOW, HIGH, ROWS, TOKENS>(staged, reader, total);
      BITMILL_WIDTH(1, 1, 0)
      BITMILL_WIDTH(2, 2, 0)
      BITMILL_WIDTH(3, 2, 1)
      BITMILL_WIDTH(4, 4, 0)
      BITMILL_WIDTH(5, 4, 1)
      BITMILL_WIDTH(6, 4, 2)
      BITMILL_WIDTH(8, 8, 0)
#undef BITMILL_WIDTH
    }
  }

  template <int LOW, int HIGH, int ROWS, int TOKENS>
  __device__ __forceinline__ void add_planes(const uint8_t* staged, Reader& reader,
                                             float (&total)[TOKENS / 2]) const {
    constexpr int kVectors = LOW >= 2 ? LOW / 2 : 1;
    constexpr int kSteps = 4 / kVectors;
    constexpr bool kNarrow = LOW == 1 || HIGH == 1;
    const Lane lane = reader.lane;
    const uint8_t* planes = staged + ROWS * 8;
    uint32_t slot[2];
    uint32_t inputs[2];
    constexpr bool kBothAtOnce = TOKENS <= 128;  // else registers are too few
#pragma unroll
    for (int group = 0; kBothAtOnce && group < 2; ++group) {
      inputs[group] = next_inputs<TOKENS>(reader, &slot[group]);
    }
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      if constexpr (!kBothAtOnce) inputs[group] = next_inputs<TOKENS>(reader, &slot[group]);
      const int first = reader.rows;
      const uint8_t* low = planes + first * 32 * LOW;
      const uint8_t* high = planes + ROWS * 32 * LOW + first * 32 * HIGH;
      __half2 scale[2], zero[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 word = *reinterpret_cast<const __half2*>(
            staged + (first + half * 8 + lane.row) * 8 + group * 4);
        scale[half] = __low2half2(word), zero[half] = __high2half2(word);
      }
      uint32_t high_words[2][4];
      if constexpr (HIGH != 0) load_words<HIGH, false, 1>(high, 0, lane, high_words);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        uint32_t a[2][4], b[2][4];
        load_words<LOW, kNarrow, 1>(low, v, lane, a);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (group == 1) a[half][i] >>= 8;
            b[half][i] = 0;
            if constexpr (HIGH != 0) {
              const int shift = LOW - HIGH * (kNarrow ? 2 * v + i / 2 : v);
              const uint32_t word = high_words[half][i];
              b[half][i] = group ? word >> (8 - shift) : word << shift;
            }
          }
        }
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const int vector = LOW == 1 ? step : step * LOW / 2 + v;
          const int batch = v * kSteps + step;
          uint32_t(&made)[2][4] = next_batch(reader, batch, slot[group]);
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int j = LOW == 1 ? 2 * step + e : step;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const int word = 2 * e + i / 2;
              made[e][i] = weight<LOW, HIGH>(a[i % 2][word], b[i % 2][word], j, magic,
                                             scale[i % 2], zero[i % 2]);
            }
          }
          multiply_batch<TOKENS>(total, made, inputs[group], 2 * vector,
                                 group == 0 && v == 0 && step == 0 ? reader.older : 1);
        }
      }
    }
  }
};

// bf16 activations as halves, divided by a token's power of two.
__device__ __forceinline__ uint4 halves_of(uint4 words, float factor) {
  const float inverse = __int_as_float((254 << 23) - __float_as_int(factor));
  uint32_t* each = reinterpret_cast<uint32_t*>(&words);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&each[i]));
    each[i] = word_of(__floats2half2_rn(pair.x * inverse, pair.y * inverse));
  }
  return words;
}

// Four lanes hold four words of two columns each, in the order of a group; each gets the words of
// one piece of the products. Narrow pieces are words 0, 2, 4, 6 or 1, 3, 5, 7 of two lanes, others one
// word of each lane.
__device__ __forceinline__ uint4 exchange(uint4 words, int lane, bool narrow) {
  const bool odd = lane & 1, upper = lane & 2;
  if (!narrow) {
    const uint32_t x = __shfl_xor_sync(0xffffffffu, upper ? words.x : words.z, 2);
    const uint32_t y = __shfl_xor_sync(0xffffffffu, upper ? words.y : words.w, 2);
    words = upper ? make_uint4(x, y, words.z, words.w) : make_uint4(words.x, words.y, x, y);
  }
  const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? words.x : words.y, 1);
  const uint32_t z = __shfl_xor_sync(0xffffffffu, odd ? words.z : words.w, 1);
  words = odd ? make_uint4(x, words.y, z, words.w) : make_uint4(words.x, x, words.z, z);
  return narrow ? make_uint4(words.x, words.z, words.y, words.w) : words;
}

// What a lane has of a pair: 8 neighbouring columns of one of its groups, and the 8 columns of a
// product that four lanes exchange them for.
struct Part {
  int group, piece;
  bool narrow;
  int from[8];  // columns of x, -1 where there are none
};

__device__ __forceinline__ Part part_of(const DecodeArguments& p, int index, int lane) {
  Part part;
  const int chunk = lane % 16;
  part.group = lane / 16;
  const PairRow pair = p.pairs[index];
  // The same in all lanes, which the compiler does not know.
  const int width = __shfl_sync(0xffffffffu, pair.width, 0), low = low_plane(width);
  part.narrow = width == 1 || width == 3 || width == 5;
  const int field = chunk >> __ffs(low), at = chunk & (2 * low - 1);
  const int step = part.narrow ? at / 2 : at / 4 * 2 + lane % 4 / 2;
  part.piece = 2 * (field * low + step) + lane % 2;
  const int first = pair.first[part.group] + 8 * chunk, live = pair.live[part.group] - 8 * chunk;
#pragma unroll
  for (int i = 0; i < 8; ++i) part.from[i] = i < live ? first + i : -1;
  if (p.order && live >= 8 && reinterpret_cast<uintptr_t>(p.order) % 16 == 0) {
    const int4* order = reinterpret_cast<const int4*>(p.order + first);
    const int4 low_half = order[0], high_half = order[1];
    part.from[0] = low_half.x, part.from[1] = low_half.y;
    part.from[2] = low_half.z, part.from[3] = low_half.w;
    part.from[4] = high_half.x, part.from[5] = high_half.y;
    part.from[6] = high_half.z, part.from[7] = high_half.w;
  } else if (p.order) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (i < live) part.from[i] = p.order[first + i];
    }
  }
  return part;
}

template <bool BF16>
__device__ __forceinline__ void store_part(const DecodeArguments& p, int tile, int token, int index,
                                           int lane, const Part& part, uint4 words) {
  if constexpr (BF16) words = halves_of(words, __ldcg(p.factors + token));
  const int bits = 31 - __clz(tile);
  const size_t before = static_cast<size_t>(token >> bits) * p.pair_count + index;
  uint8_t* to = p.inputs + ((before * 2 + part.group) << bits) * group_bytes(1);
  *reinterpret_cast<uint4*>(to + input_offset(tile, token & (tile - 1), part.piece)) =
      exchange(words, lane, part.narrow);
}

// Columns of a row, one by one.
__device__ __forceinline__ uint4 gather(const uint16_t* row, const int (&from)[8]) {
  uint16_t each[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) each[i] = from[i] < 0 ? 0 : row[from[i]];
  return make_uint4(each[0] | each[1] << 16, each[2] | each[3] << 16, each[4] | each[5] << 16,
                    each[6] | each[7] << 16);
}

// Brings the activations of every pair into the order and layout of the products. A warp takes a
// pair of every `slices`-th token: a lane reads 8 neighbouring columns of a token at once where x has
// them so. It finds the columns before it waits for the activations; blocks are so small that they
// can wait beside the product before.
template <bool BF16>
__global__ void __launch_bounds__(kPrologueThreads, 16)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int tile, int slices) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int warp = blockIdx.x * (kPrologueThreads / 32) +
                   __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  const int lane = threadIdx.x % 32, index = warp % p.pair_count, first = warp / p.pair_count;
  if (first >= slices) return;
  const Part part = part_of(p, index, lane);
  bool whole = ((reinterpret_cast<uintptr_t>(p.x) >> 1 | p.x_stride | part.from[0]) & 7) == 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) whole = whole && part.from[i] == part.from[0] + i;
  whole = __all_sync(0xffffffffu, whole && part.from[0] >= 0);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const uint16_t* x = static_cast<const uint16_t*>(p.x);
  if (whole) {
    constexpr int kAtOnce = BF16 ? 2 : 4;  // more would spill
    for (int token = first; token < p.tokens; token += kAtOnce * slices) {
      uint4 words[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int one = min(token + i * slices, p.tokens - 1);
        const uint16_t* row = x + static_cast<int64_t>(one) * p.x_stride;
        words[i] = *reinterpret_cast<const uint4*>(row + part.from[0]);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int one = token + i * slices;
        if (one < p.tokens) store_part<BF16>(p, tile, one, index, lane, part, words[i]);
      }
    }
  } else {
    for (int token = first; token < p.tokens; token += slices) {
      const uint16_t* row = x + static_cast<int64_t>(token) * p.x_stride;
      store_part<BF16>(p, tile, token, index, lane, part, gather(row, part.from));
    }
  }
}

// The same where columns are moved: a block brings a token's row into shared memory first, and
// arranges every `parts`-th pair of it for each of its warps.
template <bool BF16>
__global__ void __launch_bounds__(kRowThreads)
    arrange_row_kernel(const __grid_constant__ DecodeArguments p, int columns, int tile, int parts) {
  extern __shared__ __align__(16) uint16_t row[];
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int token = blockIdx.x / parts, lane = threadIdx.x % 32;
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(token) * p.x_stride;
  const int eights = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? columns / 8 : 0;
#pragma unroll 4
  for (int i = threadIdx.x; i < eights; i += kRowThreads) {
    reinterpret_cast<uint4*>(row)[i] = reinterpret_cast<const uint4*>(x)[i];
  }
  for (int i = 8 * eights + threadIdx.x; i < columns; i += kRowThreads) row[i] = x[i];
  __syncthreads();
  constexpr int kWarps = kRowThreads / 32;
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 32, 0);
  for (int index = blockIdx.x % parts * kWarps + warp; index < p.pair_count;
       index += parts * kWarps) {
    const Part part = part_of(p, index, lane);
    store_part<BF16>(p, tile, token, index, lane, part, gather(row, part.from));
  }
}

// Both for a product of so many `blocks`, which take a multiprocessor each.
cudaError_t arrange(const DecodeArguments& p, int tile, int blocks, bool overlap, cudaStream_t s) {
  constexpr int kWarps = kPrologueThreads / 32;
  const int most = min(p.tokens, max(1, 4 * blocks * kWarps / p.pair_count));
  const int each = (p.tokens + most - 1) / most, slices = (p.tokens + each - 1) / each;
  const auto kernel = p.is_bf16 ? arrange_kernel<true> : arrange_kernel<false>;
  return launch_kernel(kernel, (slices * p.pair_count + kWarps - 1) / kWarps, kPrologueThreads, 0,
                       overlap, s, p, tile, slices);
}

cudaError_t arrange_rows(const DecodeArguments& p, int columns, int tile, int blocks, bool overlap,
                         cudaStream_t s) {
  constexpr int kWarps = kRowThreads / 32;
  const int most = (p.pair_count + kWarps - 1) / kWarps;
  const int parts = max(1, min(most, blocks / p.tokens));
  const auto kernel = p.is_bf16 ? arrange_row_kernel<true> : arrange_row_kernel<false>;
  const cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostRowBytes);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, p.tokens * parts, kRowThreads, (2 * columns + 15) / 16 * 16, overlap,
                       s, p, columns, tile, parts);
}

}  // namespace

// Multiplies any number of tokens, `tile` in a launch. `columns` are those of x. `overlap` lets each
// launch begin while the one before it drains. Returns a cudaError_t; 0 is success, -1 a shape that
// is not compiled.
extern "C" int bitmill_batch(const DecodeArguments* arguments, int columns, int groups,
                             int tile, int blocks, int shared, int overlap,
                             void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  cudaError_t status = cudaSuccess;
  if (arguments->factors) {
    status = launch_kernel(factor_kernel, arguments->tokens, kFactorThreads, 0, overlap, s,
                           *arguments, columns, 1.0f);
  }
  if (status == cudaSuccess) {
    const bool by_rows = arguments->order && 2 * columns <= kMostRowBytes &&
                         static_cast<int64_t>(arguments->tokens) * columns >= kLeastByRows;
    status = by_rows
                 ? arrange_rows(*arguments, columns, tile, blocks, overlap, s)
                 : arrange(*arguments, tile, blocks, overlap, s);
  }
  if (status != cudaSuccess) return status;
#define BITMILL_SHAPE(GROUPS, TOKENS)       \
  if (groups == GROUPS && tile == TOKENS)   \
    return launch<Affine, GROUPS, TOKENS>(*arguments, blocks, shared, overlap, s);
  BITMILL_SHAPE(4, 32)
  BITMILL_SHAPE(2, 32)
  BITMILL_SHAPE(2, 64)
  BITMILL_SHAPE(2, 128)
  BITMILL_SHAPE(4, 64)
  BITMILL_SHAPE(2, 256)
#undef BITMILL_SHAPE
  return -1;
}
