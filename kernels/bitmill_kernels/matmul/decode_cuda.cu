// Decode product on Hopper and later: y = x W^T for up to 32 tokens, W in the runtime layout.
//
//   y[t, n] = factor[t] * sum over groups g of
//             scale[n, g] * (sum_k code[n, k] * x[t, k] - zero[n, g] * sums[g, t])  + bias[n]
//
// The same equation and layout as decode_triton.py; what differs is how the bytes travel.
//
// One block per slot of every multiprocessor takes an equal share of the bytes: a run of
// consecutive units, a unit being one tile of rows times one pair of groups. An extra warp streams
// the units' planes and scale words into a ring in shared memory by bulk copies, across tiles and
// widths without a pause; a table made by the host tells it where they are. Every other warp owns 16*ROW_TILES rows of
// each unit and multiplies them by mma.m16n8k16 with the weights as the left operand:
//
//   rows of a pair are 32w contiguous bytes, so a lane's 8 or 16 bytes of row lane/4 are whole
//   words of two columns; one AND (two for joined planes) makes a register of the left operand.
//   The order of columns inside the product is free, so activations are laid out in the order
//   that this reading gives: vectors of 16 bytes, [group][4][token][lane % 4], then for each
//   group and token the power of two they were divided by (times 2^24) and their sum.
//
// Where a block needs few pairs, it converts their activations itself. Else they are converted
// once, by the prologue kernel, and travel with the weights.
//
// Where a tile is shared by several blocks, each warp leaves its partial sums in the workspace
// and the last to arrive adds them in block order: bitwise the same result on every launch. No
// block ever waits for another. A launch may begin while the one before it drains: until
// griddepcontrol.wait it touches nothing but weights and tables.

#include "../hopper/units.h"

namespace {

constexpr int kPrologueWarps = 2;
constexpr int kTokensAtOnce = 4;  // that a warp converts of several, so that loads overlap

__device__ __forceinline__ void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                         uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One field of two columns: bits of the low plane joined with those of the high plane.
template <int LOW, int HIGH>
__device__ __forceinline__ uint32_t field(uint32_t low, uint32_t high, int j) {
  const uint32_t low_mask = (((1u << LOW) - 1u) * 0x00010001u) << (LOW * j);
  if constexpr (HIGH == 0) {
    return low & low_mask;
  } else {
    const uint32_t high_mask = ((((1u << HIGH) - 1u) << LOW) * 0x00010001u) << (LOW * j);
    return (low & low_mask) | (high & high_mask);
  }
}

// Adds one group of a unit to total[row tile][token tile]. `low`, `high` and `scales` point at the
// warp's first row; `inputs` at the pair's activations.
template <int LOW, int HIGH, int GROUP, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_group(const uint8_t* low, const uint8_t* high,
                                          const uint8_t* scales, const uint8_t* inputs, int tokens,
                                          const int (&token)[TOKEN_TILES], Lane lane,
                                          float (&total)[ROW_TILES][TOKEN_TILES][4]) {
  constexpr int kVectors = LOW >= 2 ? LOW / 2 : 1;
  constexpr int kSteps = 4 / kVectors;
  constexpr bool kNarrow = LOW == 1 || HIGH == 1;
  float sum[ROW_TILES][TOKEN_TILES][4] = {};
  uint32_t high_words[2 * ROW_TILES][4];
  if constexpr (HIGH != 0) load_words<HIGH, false, ROW_TILES>(high, 0, lane, high_words);
#pragma unroll(LOW == 8 ? 1 : kVectors)
  for (int v = 0; v < kVectors; ++v) {
    uint32_t a[2 * ROW_TILES][4];
    uint32_t b[2 * ROW_TILES][4];
    load_words<LOW, kNarrow, ROW_TILES>(low, v, lane, a);
#pragma unroll
    for (int r = 0; r < 2 * ROW_TILES; ++r) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (GROUP == 1) a[r][i] >>= 8;
        b[r][i] = 0;
        if constexpr (HIGH != 0) {
          const int slice = kNarrow ? 2 * v + i / 2 : v;
          const int shift = LOW - HIGH * slice;
          b[r][i] = GROUP ? high_words[r][i] >> (8 - shift) : high_words[r][i] << shift;
        }
      }
    }
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // Two products share one vector of activations: two fields of width 1, else one field of
      // two pairs of words.
      const int vector = LOW == 1 ? step : step * LOW / 2 + v;
      const int first = LOW == 1 ? 2 * step : step;
      const int second = LOW == 1 ? 2 * step + 1 : step;
#pragma unroll
      for (int n = 0; n < TOKEN_TILES; ++n) {
        const uint4 x = *reinterpret_cast<const uint4*>(
            inputs + ((GROUP * 4 + vector) * tokens + token[n]) * 64 + lane.column * 16);
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          multiply(sum[r][n], field<LOW, HIGH>(a[2 * r][0], b[2 * r][0], first),
                   field<LOW, HIGH>(a[2 * r + 1][0], b[2 * r + 1][0], first),
                   field<LOW, HIGH>(a[2 * r][1], b[2 * r][1], first),
                   field<LOW, HIGH>(a[2 * r + 1][1], b[2 * r + 1][1], first), x.x, x.y);
        }
#pragma unroll
        for (int r = 0; r < ROW_TILES; ++r) {
          multiply(sum[r][n], field<LOW, HIGH>(a[2 * r][2], b[2 * r][2], second),
                   field<LOW, HIGH>(a[2 * r + 1][2], b[2 * r + 1][2], second),
                   field<LOW, HIGH>(a[2 * r][3], b[2 * r][3], second),
                   field<LOW, HIGH>(a[2 * r + 1][3], b[2 * r + 1][3], second), x.z, x.w);
        }
      }
    }
  }
  const float2* tails = reinterpret_cast<const float2*>(inputs + 512 * tokens) + GROUP * tokens;
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float2 tail = tails[min(n * 8 + 2 * lane.column + e, tokens - 1)];
#pragma unroll
      for (int r = 0; r < 2 * ROW_TILES; ++r) {
        const __half2 word =
            *reinterpret_cast<const __half2*>(scales + (r * 8 + lane.row) * 8 + GROUP * 4);
        const float2 grid = __half22float2(word);
        const int cell = (r % 2) * 2 + e;
        const float product = sum[r / 2][n][cell] * tail.x - grid.y * tail.y;
        total[r / 2][n][cell] += grid.x * product;
      }
    }
  }
}

template <int LOW, int HIGH, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void add_unit(const uint8_t* low, const uint8_t* high,
                                         const uint8_t* scales, const uint8_t* inputs, int tokens,
                                         const int (&token)[TOKEN_TILES], Lane lane,
                                         float (&total)[ROW_TILES][TOKEN_TILES][4]) {
  add_group<LOW, HIGH, 0>(low, high, scales, inputs, tokens, token, lane, total);
  add_group<LOW, HIGH, 1>(low, high, scales, inputs, tokens, token, lane, total);
}

template <int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ void store_outputs(const DecodeArguments& p, const Target& tile,
                                              int warp_row, Lane lane,
                                              const float (&total)[ROW_TILES][TOKEN_TILES][4]) {
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) {
    const int row = warp_row + r * 8 + lane.row;
    if (row >= tile.live_rows) continue;
    const int output = tile.output + row;
    const float bias = load_bias(p, output);
#pragma unroll
    for (int n = 0; n < TOKEN_TILES; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int t = n * 8 + 2 * lane.column + e;
        if (t >= p.tokens) continue;
        store_output(p, t, output, total[r / 2][n][(r % 2) * 2 + e] + bias);
      }
    }
  }
}

// Counts a warp that leaves its sums of a tile; how many have before it, for all of its lanes.
__device__ __forceinline__ int arrive_at(int* counter, int thread) {
  int arrived = 0;
  __syncwarp();
  if (thread == 0) {
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
                 : "=r"(arrived)
                 : "l"(counter)
                 : "memory");
  }
  return __shfl_sync(0xffffffffu, arrived, 0);
}

// Leaves this warp's sums in the workspace; the last block of the tile adds them in order.
// Slot 1 of a block is for the tile that begins in it, slot 0 for the one it continues.
template <int WARPS, int ROW_TILES, int TOKEN_TILES>
__device__ __forceinline__ bool reduce(const DecodeArguments& p, const Target& tile, int warp,
                                       Lane lane, float (&total)[ROW_TILES][TOKEN_TILES][4]) {
  constexpr int kCells = ROW_TILES * TOKEN_TILES * 4;
  const int thread = lane.row * 4 + lane.column;
  const int slot = tile.first_block == blockIdx.x ? 1 : 0;
  float* mine = p.partial + ((blockIdx.x * 2 + slot) * WARPS + warp) * kCells * 32 + thread;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    const int t = (i / 4 % TOKEN_TILES) * 8 + 2 * lane.column + i % 2;
    if (t < p.tokens) __stcg(mine + i * 32, total[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4]);
  }
  int* counter = p.counters + tile.first_block * WARPS + warp;
  if (arrive_at(counter, thread) != tile.blocks - 1) return false;
#pragma unroll
  for (int i = 0; i < kCells; ++i) total[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4] = 0.0f;
#pragma unroll(32 / kCells)
  for (int b = 0; b < tile.blocks; ++b) {
    const int from_slot = b == 0 ? 1 : 0;
    const float* from =
        p.partial + (((tile.first_block + b) * 2 + from_slot) * WARPS + warp) * kCells * 32 + thread;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int t = (i / 4 % TOKEN_TILES) * 8 + 2 * lane.column + i % 2;
      if (t < p.tokens) {
        total[i / (4 * TOKEN_TILES)][i / 4 % TOKEN_TILES][i % 4] += __ldcg(from + i * 32);
      }
    }
  }
  if (thread == 0) *counter = 0;
  return true;
}

// Bytes of one pair's activations: 8 vectors of 4 x 16 bytes a token, then (scale, sum) twice.
__device__ __forceinline__ int input_bytes(int tokens) { return 528 * tokens; }

// Two activations of a word.
__device__ __forceinline__ float2 values_of(uint32_t word, bool is_bf16) {
  if (is_bf16) return {__int_as_float(word << 16), __int_as_float(word & 0xffff0000u)};
  return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Loads what a lane converts of some tokens of a pair: of each, words of four columns from
// `columns` of a group of `live` columns from `first` on.
template <int TOKENS>
__device__ __forceinline__ void load_values(const DecodeArguments& p, const int (&columns)[2],
                                            int first, int live, bool whole,
                                            const int64_t (&at)[TOKENS],
                                            float2 (&values)[TOKENS][4]) {
  if (whole) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const uint16_t* row = static_cast<const uint16_t*>(p.x) + at[t] + first;
      const uint2 words[2] = {*reinterpret_cast<const uint2*>(row + columns[0]),
                              *reinterpret_cast<const uint2*>(row + columns[1])};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values[t][2 * i] = values_of(words[i].x, p.is_bf16);
        values[t][2 * i + 1] = values_of(words[i].y, p.is_bf16);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int c = columns[i / 4] + i % 4;
    const int k = c >= live ? -1 : p.order ? p.order[first + c] : first + c;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const float value = k < 0 ? 0.0f : load_input(p, at[t] + k);
      (i % 2 ? values[t][i / 2].y : values[t][i / 2].x) = value;
    }
  }
}

// Converts TOKENS tokens of one pair from `token` on, as far as there are so many: a warp, a half
// of it for each group. Each group is divided by a power of two that brings it below 2^15, and
// each field by its place value.
template <int TOKENS, class Row>
__device__ __forceinline__ void convert(const DecodeArguments& p, const Row& pair, int token,
                                        int thread, uint8_t* to) {
  const int group = thread / 16, vector = thread % 16 / 4, column = thread % 4;
  const int low = low_plane(pair.width);
  const bool narrow = pair.width == 1 || pair.width == 3 || pair.width == 5;
  const int first = group ? pair.first[1] : pair.first[0];
  const int live = group ? pair.live[1] : pair.live[0];
  int columns[2], shifts[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int product = 2 * vector + i;
    const int j = product / low, step = product % low;
    const int word = narrow ? 8 * step + 2 * column : 16 * (step / 2) + 4 * column + 2 * (step % 2);
    columns[i] = j * 16 * low + 2 * word;
    shifts[i] = low * j;
  }
  // Words of four columns lie together where none are moved and none are missing.
  const bool whole = p.order == nullptr && pair.live[0] == 128 && pair.live[1] == 128 &&
                     (reinterpret_cast<uintptr_t>(p.x) | 2 * p.x_stride) % 8 == 0;
  int64_t at[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    at[t] = static_cast<int64_t>(min(token + t, p.tokens - 1)) * p.x_stride;
  }
  float2 values[TOKENS][4];
  load_values(p, columns, first, live, whole, at, values);
  float largest[TOKENS], total[TOKENS];
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    largest[t] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      largest[t] = fmaxf(largest[t], fmaxf(fabsf(values[t][i].x), fabsf(values[t][i].y)));
    }
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      largest[t] = fmaxf(largest[t], __shfl_xor_sync(0xffffffffu, largest[t], step));
    }
  }
#pragma unroll
  for (int t = 0; t < TOKENS; ++t) {
    const int exponent = max(__float_as_int(largest[t]) >> 23, kMinimumExponent) - 14;
    const float inverse = __int_as_float((254 - exponent) << 23);
    uint4 out;
    __half2* halves = reinterpret_cast<__half2*>(&out);
    total[t] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float down = inverse * __int_as_float((127 - shifts[i / 2]) << 23);
      halves[i] = __floats2half2_rn(values[t][i].x * down, values[t][i].y * down);
      const float2 seen = __half22float2(halves[i]);
      total[t] += (seen.x + seen.y) * __int_as_float((127 + shifts[i / 2]) << 23);
    }
    if (token + t < p.tokens) {
      uint8_t* vectors = to + ((group * 4 + vector) * p.tokens + token + t) * 64;
      *reinterpret_cast<uint4*>(vectors + column * 16) = out;
    }
  }
#pragma unroll
  for (int step = 8; step > 0; step /= 2) {
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) total[t] += __shfl_xor_sync(0xffffffffu, total[t], step);
  }
  if (thread % 16 == 0) {
    float2* tails = reinterpret_cast<float2*>(to + 512 * p.tokens) + group * p.tokens;
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      const int exponent = max(__float_as_int(largest[t]) >> 23, kMinimumExponent) - 14;
      const float scale = __int_as_float(exponent << 23);
      if (token + t < p.tokens) tails[token + t] = {scale * 16777216.0f, total[t] * scale};
    }
  }
}

// Converts the activations of a block's first `count` units, one of each pair it needs: its warps
// take turns at TOKENS tokens of a pair.
template <int WARPS, int TOKENS>
__device__ __forceinline__ void convert_own(const DecodeArguments& p, const UnitRow* units,
                                            int count, int warp, int thread, uint8_t* chunks) {
  const int turns = (p.tokens + TOKENS - 1) / TOKENS;
  Columns next = load_row(&units[min(warp / turns, count - 1)].columns);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  for (int turn = warp; turn < count * turns; turn += WARPS) {
    const Columns columns = next;
    next = load_row(&units[min((turn + WARPS) / turns, count - 1)].columns);
    convert<TOKENS>(p, columns, turn % turns * TOKENS, thread,
                    chunks + turn / turns * input_bytes(p.tokens));
  }
}

template <int WARPS, int ROW_TILES, int TOKEN_TILES>
__device__ void consume(const DecodeArguments& p, const UnitRow* units, uint64_t* full,
                        uint64_t* empty, const uint8_t* ring, uint8_t* chunks, int warp,
                        int thread) {
  constexpr int kRows = WARPS * ROW_TILES * 16;
  const Lane lane = {thread / 4, thread % 4};
  const int warp_row = warp * ROW_TILES * 16;
  const int x_bytes = input_bytes(p.tokens);
  const BlockRow block = load_row(reinterpret_cast<const BlockRow*>(units - 1));
  Target next = load_row(&units->target);
  const bool own = p.inputs == nullptr;
  if (TOKEN_TILES == 1 && own) {  // what is compiled for more tokens never converts
    if (p.tokens == 1) {
      convert_own<WARPS, 1>(p, units, block.chunks, warp, thread, chunks);
    } else {
      convert_own<WARPS, kTokensAtOnce>(p, units, block.chunks, warp, thread, chunks);
    }
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
  }
  int token[TOKEN_TILES];
#pragma unroll
  for (int n = 0; n < TOKEN_TILES; ++n) token[n] = min(n * 8 + lane.row, p.tokens - 1);
  float total[ROW_TILES][TOKEN_TILES][4] = {};
  for (int i = 0, stage = 0, parity = 0, chunk = 0; i < block.units; ++i) {
    const Target unit = next;
    next = load_row(&units[min(i + 1, p.unit_capacity - 1)].target);
    const uint8_t* staged = ring + stage * p.stage_bytes;
    const uint8_t* inputs = own ? chunks + chunk * x_bytes : staged;
    const uint8_t* grid = staged + (own ? 0 : staged_bytes(x_bytes));
    const uint8_t* scales = grid + warp_row * 8;
    const uint8_t* planes = grid + kRows * 8;
    if (++chunk == block.chunks) chunk = 0;
    barrier_wait(full + stage, parity);
    switch (unit.width) {
#define BITMILL_WIDTH(WIDTH, LOW, HIGH)                                                        \
  case WIDTH:                                                                                  \
    add_unit<LOW, HIGH>(planes + warp_row * 32 * LOW,                                          \
                        planes + kRows * 32 * LOW + warp_row * 32 * HIGH, scales, inputs,      \
                        p.tokens, token, lane, total);                                         \
    break;
      BITMILL_WIDTH(1, 1, 0)
      BITMILL_WIDTH(2, 2, 0)
      BITMILL_WIDTH(3, 2, 1)
      BITMILL_WIDTH(4, 4, 0)
      BITMILL_WIDTH(5, 4, 1)
      BITMILL_WIDTH(6, 4, 2)
      BITMILL_WIDTH(8, 8, 0)
#undef BITMILL_WIDTH
    }
    __syncwarp();
    if (thread == 0) barrier_arrive(empty + stage);
    if (++stage == p.stage_count) stage = 0, parity ^= 1;
    if (unit.ends) {
      if (unit.blocks == 1 || reduce<WARPS>(p, unit, warp, lane, total)) {
        store_outputs(p, unit, warp_row, lane, total);
      }
#pragma unroll
      for (int c = 0; c < ROW_TILES * TOKEN_TILES * 4; ++c) {
        total[c / (4 * TOKEN_TILES)][c / 4 % TOKEN_TILES][c % 4] = 0.0f;
      }
    }
  }
}

template <int WARPS, int ROW_TILES, int TOKEN_TILES, int BLOCKS>
__global__ void __launch_bounds__((WARPS + 1) * 32, BLOCKS)
    decode_kernel(const __grid_constant__ DecodeArguments p) {
  extern __shared__ __align__(128) uint8_t memory[];
  uint64_t* full = reinterpret_cast<uint64_t*>(memory);
  uint64_t* empty = full + p.stage_count;
  uint8_t* chunks = memory + p.stage_count * 16;
  const int inputs = p.chunk_capacity * input_bytes(p.tokens);
  uint8_t* ring = memory + (p.stage_count * 16 + inputs + 127) / 128 * 128;
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x == 0) {
    for (int s = 0; s < p.stage_count; ++s) {
      barrier_init(full + s, 1);
      barrier_init(empty + s, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const UnitRow* units = p.units + static_cast<size_t>(blockIdx.x) * (1 + p.unit_capacity) + 1;
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  if (warp == WARPS) {
    const int staged = p.inputs ? input_bytes(p.tokens) : 0;
    produce<WARPS * ROW_TILES * 16>(p, units, full, empty, ring, thread, staged);
  } else {
    consume<WARPS, ROW_TILES, TOKEN_TILES>(p, units, full, empty, ring, chunks, warp,
                                           thread);
  }
}

// Converts the activations of every pair: one warp for each pair and token.
__global__ void __launch_bounds__(kPrologueWarps * 32)
    prologue_kernel(const __grid_constant__ DecodeArguments p) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int item = blockIdx.x * kPrologueWarps + threadIdx.x / 32;
  if (item >= p.pair_count * p.tokens) return;
  const int pair = item / p.tokens;
  const PairRow row = p.pairs[pair];
  asm volatile("griddepcontrol.wait;" ::: "memory");
  convert<1>(p, row, item % p.tokens, threadIdx.x % 32,
             p.inputs + static_cast<size_t>(pair) * input_bytes(p.tokens));
}

template <int WARPS, int ROW_TILES, int TOKEN_TILES, int BLOCKS>
cudaError_t launch(const DecodeArguments& arguments, int blocks, int shared, bool overlap,
                   cudaStream_t stream) {
  auto kernel = decode_kernel<WARPS, ROW_TILES, TOKEN_TILES, BLOCKS>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  if (arguments.inputs != nullptr) {
    const int items = arguments.pair_count * arguments.tokens;
    status = launch_kernel(prologue_kernel, (items + kPrologueWarps - 1) / kPrologueWarps,
                           kPrologueWarps * 32, 0, overlap, stream, arguments);
    if (status != cudaSuccess) return status;
  }
  return launch_kernel(kernel, blocks, (WARPS + 1) * 32, shared, overlap, stream, arguments);
}

}  // namespace

// Multiplies, converting first where `inputs` is given. `overlap` lets each launch begin while the
// one before it drains. Returns a cudaError_t; 0 is success, -1 a shape that is not compiled.
extern "C" int bitmill_decode(const DecodeArguments* arguments, int warps, int row_tiles,
                              int blocks_per_processor, int blocks, int shared, int overlap,
                              void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const int token_tiles = (arguments->tokens + 7) / 8;
#define BITMILL_SHAPE(WARPS, ROW_TILES, TOKEN_TILES, BLOCKS)                              \
  if (warps == WARPS && row_tiles == ROW_TILES && blocks_per_processor == BLOCKS &&       \
      token_tiles <= TOKEN_TILES)                                                         \
    return launch<WARPS, ROW_TILES, TOKEN_TILES, BLOCKS>(*arguments, blocks, shared, overlap, s);
  BITMILL_SHAPE(8, 2, 1, 1)
  BITMILL_SHAPE(8, 2, 2, 1)
  BITMILL_SHAPE(8, 2, 4, 1)
  BITMILL_SHAPE(4, 2, 1, 3)
  BITMILL_SHAPE(4, 2, 2, 3)
  BITMILL_SHAPE(4, 2, 4, 2)
  BITMILL_SHAPE(4, 1, 1, 4)
  BITMILL_SHAPE(4, 1, 2, 4)
#undef BITMILL_SHAPE
  return -1;
}
