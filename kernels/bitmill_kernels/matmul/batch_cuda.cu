// Product of many tokens on Hopper: y = x W^T for up to 128 tokens a launch, W in the runtime
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
// groups 16 products of 16 columns, in the layout of wgmma.h. bf16 activations are divided by a
// power of two for each token, which another kernel finds; fp16 ones stay as they are.

#include "../hopper/wgmma.h"

namespace {

constexpr int kProducts = 16;  // of a pair: 16 columns each

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
    for (int group = 0; group < 2; ++group) {
      inputs[group] = next_inputs<TOKENS>(reader, &slot[group]);
    }
#pragma unroll
    for (int group = 0; group < 2; ++group) {
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

// Two columns of a row of activations; from one word where they lie in one.
__device__ __forceinline__ float2 load_inputs(const DecodeArguments& p, int64_t row, int first,
                                              int second, bool in_words) {
  if (in_words && second == first + 1) {
    const uint16_t* at = static_cast<const uint16_t*>(p.x) + row + first;
    const uint32_t both = *reinterpret_cast<const uint32_t*>(at);
    return p.is_bf16 ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&both))
                     : __half22float2(*reinterpret_cast<const __half2*>(&both));
  }
  return make_float2(first < 0 ? 0.0f : load_input(p, row + first),
                     second < 0 ? 0.0f : load_input(p, row + second));
}

// Brings the activations of every pair into the order and layout of the products: a thread writes
// 8 columns of one token, neighbours in threads are neighbours in tokens. It finds the columns before
// it waits for the activations; blocks are so small that they can wait beside the product before.
__global__ void __launch_bounds__(kPrologueThreads, 16)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int tile) {
  asm volatile("griddepcontrol.launch_dependents;");
  constexpr int kPieces = kProducts * 2;
  const int items = (p.tokens + 7) / 8 * 8 * p.pair_count * kPieces;
  const bool in_words = ((reinterpret_cast<uintptr_t>(p.x) >> 1 | p.x_stride) & 1) == 0;
  bool waited = false;
  for (int item = blockIdx.x * kPrologueThreads + threadIdx.x; item < items;
       item += gridDim.x * kPrologueThreads) {
    const int token = item % 8 + item / (p.pair_count * kPieces * 8) * 8;
    const int piece = item / 8 % (p.pair_count * kPieces);
    const PairRow pair = p.pairs[piece / kPieces];
    const int product = piece / 2 % 8, group = piece / 16 % 2, part = piece % 2;
    const int low = low_plane(pair.width), j = product / low, step = product % low;
    const bool narrow = pair.width == 1 || pair.width == 3 || pair.width == 5;
    int from[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int column = i / 2;
      const int word = narrow ? 8 * step + 2 * column + part
                              : 16 * (step / 2) + 4 * column + 2 * (step % 2) + part;
      const int c = j * 16 * low + 2 * word + i % 2, k = pair.first[group] + c;
      from[i] = c >= pair.live[group] ? -1 : p.order ? __ldg(p.order + k) : k;
    }
    if (!waited) asm volatile("griddepcontrol.wait;" ::: "memory");
    waited = true;
    if (token >= p.tokens) continue;
    const float inverse = p.factors ? __frcp_rn(__ldcg(p.factors + token)) : 1.0f;
    const int64_t row = static_cast<int64_t>(token) * p.x_stride;
    uint4 out;
    __half2* halves = reinterpret_cast<__half2*>(&out);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool words = in_words && from[2 * i] >= 0 && from[2 * i] % 2 == 0;
      const float2 value = load_inputs(p, row, from[2 * i], from[2 * i + 1], words);
      halves[i] = __floats2half2_rn(value.x * inverse, value.y * inverse);
    }
    const int within = token % tile, eighth = piece % kPieces;
    const size_t before = static_cast<size_t>(token / tile) * p.pair_count + piece / kPieces;
    uint8_t* to = p.inputs + (before * 2 + eighth / 16) * group_bytes(tile);
    *reinterpret_cast<uint4*>(to + input_offset(tile, within, eighth % 16)) = out;
  }
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
    const int items = (arguments->tokens + 7) / 8 * 8 * arguments->pair_count * kProducts * 2;
    const int most = (items + kPrologueThreads - 1) / kPrologueThreads;
    status = launch_kernel(arrange_kernel, min(most, 4 * blocks), kPrologueThreads, 0, overlap, s,
                           *arguments, tile);
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
#undef BITMILL_SHAPE
  return -1;
}
