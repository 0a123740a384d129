// Products of many tokens by `wgmma`: weights are its left operand, in registers, and activations of
// all tokens its right one, in shared memory. A block's warpgroups share 64 rows each; one warp more
// streams weights and activations into two rings.

#pragma once

#include "sums.h"

namespace {

constexpr int kPrologueThreads = 128, kFactorThreads = 256;
constexpr int kBarrierBytes = 1024;  // and after these the rings

// Bytes of one group's activations, 128 columns, for a tile of `tokens`.
__host__ __device__ constexpr int group_bytes(int tokens) { return 256 * tokens; }

__device__ __forceinline__ void warpgroup_arrive() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void warpgroup_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void warpgroup_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Adds, or sets where `adds` is 0, 64 rows x 16 columns from registers times 16 columns x tokens from
// shared memory.
#define BITMILL_SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define BITMILL_SUMS_8(d, i) BITMILL_SUMS_4(d, i), BITMILL_SUMS_4(d, i + 4)
#define BITMILL_SUMS_16(d, i) BITMILL_SUMS_8(d, i), BITMILL_SUMS_8(d, i + 8)
#define BITMILL_SUMS_32(d, i) BITMILL_SUMS_16(d, i), BITMILL_SUMS_16(d, i + 16)
#define BITMILL_WORDS(a, inputs, adds) \
  "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(inputs), "r"(adds)
#define BITMILL_WGMMA(TOKENS, names, a0, a1, a2, a3, b, adds)                                \
  "{\n.reg .pred add;\nsetp.ne.s32 add, " adds ", 0;\n"                                      \
  "wgmma.mma_async.sync.aligned.m64n" #TOKENS "k16.f32.f16.f16 {" names "}, "                \
  "{" a0 ", " a1 ", " a2 ", " a3 "}, " b ", add, 1, 1, 0;\n}\n"

#define BITMILL_NAMES_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define BITMILL_NAMES_16 BITMILL_NAMES_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define BITMILL_NAMES_32                                                                     \
  BITMILL_NAMES_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
                   "%30, %31"
#define BITMILL_NAMES_64                                                                     \
  BITMILL_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
                   "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, "   \
                   "%60, %61, %62, %63"
#define BITMILL_NAMES_128                                                                     \
  BITMILL_NAMES_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, "  \
                   "%78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "    \
                   "%92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, "    \
                   "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "  \
                   "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

__device__ __forceinline__ void multiply(float (&d)[16], const uint32_t (&a)[4], uint64_t inputs,
                                         int adds) {
  asm volatile(BITMILL_WGMMA(32, BITMILL_NAMES_16, "%16", "%17", "%18", "%19", "%20", "%21")
               : BITMILL_SUMS_16(d, 0)
               : BITMILL_WORDS(a, inputs, adds));
}

__device__ __forceinline__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t inputs,
                                         int adds) {
  asm volatile(BITMILL_WGMMA(64, BITMILL_NAMES_32, "%32", "%33", "%34", "%35", "%36", "%37")
               : BITMILL_SUMS_32(d, 0)
               : BITMILL_WORDS(a, inputs, adds));
}

__device__ __forceinline__ void multiply(float (&d)[64], const uint32_t (&a)[4], uint64_t inputs,
                                         int adds) {
  asm volatile(BITMILL_WGMMA(128, BITMILL_NAMES_64, "%64", "%65", "%66", "%67", "%68", "%69")
               : BITMILL_SUMS_32(d, 0), BITMILL_SUMS_32(d, 32)
               : BITMILL_WORDS(a, inputs, adds));
}

__device__ __forceinline__ void multiply(float (&d)[128], const uint32_t (&a)[4], uint64_t inputs,
                                         int adds) {
  asm volatile(BITMILL_WGMMA(256, BITMILL_NAMES_128, "%128", "%129", "%130", "%131", "%132", "%133")
               : BITMILL_SUMS_32(d, 0), BITMILL_SUMS_32(d, 32), BITMILL_SUMS_32(d, 64),
                 BITMILL_SUMS_32(d, 96)
               : BITMILL_WORDS(a, inputs, adds));
}

// Activations of a group lie in the 128-byte swizzle of `wgmma`: two halves of 64 columns, in each a
// token's 128 bytes after those of the token before, and in these its eighths of 8 columns in an
// order that depends on the token. Where 8 columns of a token are:
__device__ __forceinline__ int input_offset(int tokens, int token, int eighth) {
  return (eighth / 8 * tokens + token) * 128 + (eighth % 8 ^ token % 8) * 16;
}

// Where `wgmma` finds the activations of one of a group's products. Those of the group begin at the
// shared address `inputs`, a multiple of 1024; eights of tokens are 1024 bytes apart.
template <int TOKENS>
__device__ __forceinline__ uint64_t input_descriptor(uint32_t inputs, int product) {
  const uint32_t low = (inputs >> 4) + product / 4 * (TOKENS * 8) + product % 4 * 2 + (1 << 16);
  return static_cast<uint64_t>(1u << 30 | 64) << 32 | low;
}

__device__ __forceinline__ uint32_t word_of(__half2 value) {
  return *reinterpret_cast<const uint32_t*>(&value);
}

// The barriers of a ring, by shared address, and a place in it, as its readers go round. Each place
// has a barrier that says that it is full, and `count` further one that says that it has been read.
struct Ring {
  uint32_t barriers;
  int count, at = 0, parity = 0;

  __device__ void begin(int readers) const {
    for (int i = 0; i < count; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), readers);
    }
  }
  __device__ __forceinline__ uint32_t full(int place) const { return barriers + place * 8; }
  __device__ __forceinline__ uint32_t empty(int place) const { return full(place + count); }
  __device__ __forceinline__ void next() {
    if (++at == count) at = 0, parity ^= 1;
  }
  __device__ __forceinline__ void wait_full() const { barrier_wait(full(at), parity); }
};

// Where a block's rings lie: weights of units, and activations of groups.
struct Memory {
  Ring stages, slots;
  uint8_t* staged;
  uint8_t* inputs;
};

__device__ __forceinline__ Memory memory_of(const DecodeArguments& p, uint8_t* memory, int tokens) {
  const uint32_t barriers = shared_address(memory);
  Memory found;
  found.stages = {barriers, p.stage_count};
  found.slots = {barriers + p.stage_count * 16, p.slot_count};
  found.inputs = memory + kBarrierBytes;
  found.staged = found.inputs + p.slot_count * group_bytes(tokens);
  return found;
}

// Lets the producer write the place whose barrier this is, if there is one.
__device__ __forceinline__ void release(uint32_t empty, int thread) {
  if (empty != 0 && thread == 0) barrier_arrive(empty);
}

__device__ __forceinline__ uint32_t word_of(const DecodeArguments& p, float low, float high) {
  if (p.is_bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  return word_of(__floats2half2_rn(low, high));
}

// Stores sums of rows `row` + lane / 4 and 8 further, of those eights of tokens that are its own.
// Two lanes of neighbouring rows exchange sums, so that each stores both rows of one token.
template <int EIGHTS, class Own>
__device__ __forceinline__ void store_outputs(const DecodeArguments& p, const Target& tile, int row,
                                              Lane lane, const float (&total)[EIGHTS * 4],
                                              const Own& own_eight) {
  const int odd = lane.row % 2;
  const bool in_pairs =
      ((reinterpret_cast<uintptr_t>(p.y) >> 1 | p.output_stride | tile.output) & 1) == 0;
  float bias[2], row_scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int output = tile.output + min(row + half * 8 + lane.row, tile.live_rows - 1);
    bias[half] = load_bias(p, output);
    row_scale[half] = p.row_scales ? __ldg(p.row_scales + output) : 1.0f;
  }
#pragma unroll
  for (int n = 0; n < EIGHTS; ++n) {
    if (!own_eight(n)) continue;
    const int t = n * 8 + 2 * lane.column, token = t + odd;
    float factor[2] = {1.0f, 1.0f};
    if (p.factors) {
      factor[0] = __ldcg(p.factors + min(t, p.tokens - 1));
      factor[1] = __ldcg(p.factors + min(t + 1, p.tokens - 1));
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float own[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        own[e] = total[n * 4 + half * 2 + e] * (factor[e] * row_scale[half]) + bias[half];
      }
      const float other = __shfl_xor_sync(0xffffffffu, odd ? own[0] : own[1], 4);
      const float low = odd ? other : own[0], high = odd ? own[1] : other;
      const int even = row + half * 8 + lane.row - odd;
      if (token >= p.tokens || even >= tile.live_rows) continue;
      const bool both = even + 1 < tile.live_rows;
      if (in_pairs && both) {
        uint16_t* y = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(token) * p.output_stride +
                      tile.output + even;
        *reinterpret_cast<uint32_t*>(y) = word_of(p, low, high);
      } else {
        store_output(p, token, tile.output + even, low);
        if (both) store_output(p, token, tile.output + even + 1, high);
      }
    }
  }
}

// Stores the outputs of a tile. Blocks that share it store a part of its cells each.
template <int WARPS, int TOKENS>
__device__ __forceinline__ void finish(const DecodeArguments& p, const Target& tile, int warp,
                                       int row, Lane lane, float (&total)[TOKENS / 2]) {
  constexpr int kCells = TOKENS / 8, kPart = kCells < 4 ? kCells : kCells / 4;
  const int self = tile.blocks > 1 ? blockIdx.x - tile.first_block : 0;
  const int takers = tile.ends;
  const auto own = [&](int cell) { return cell / kPart * takers / 4 == self; };
  if (tile.blocks > 1) {
    const auto live = [&](int cell) { return cell * 8 + 2 * lane.column < p.tokens; };
    share_sums<WARPS, kCells, kPart>(p, tile, warp, lane.row * 4 + lane.column, self, own, live,
                                     total);
  }
  if (self < takers) store_outputs<kCells>(p, tile, row, lane, total, own);
}

// One warpgroup more than multiply: its first warp streams, all of it gives its registers away. A
// block begins with so few that blocks of a prologue kernel can wait beside it.
template <int GROUPS>
constexpr int kThreads = (GROUPS + 1) * 128;
template <int GROUPS, int TOKENS>
constexpr int kRegisters = TOKENS == 256 ? 168 : GROUPS == 4 ? 96 : 128;
template <int GROUPS, int TOKENS>
constexpr int kStreamRegisters = TOKENS == 256 || GROUPS == 4 ? 24 : 40;
template <int GROUPS, int TOKENS>
constexpr int kReadRegisters = TOKENS == 256 ? 240 : GROUPS == 4 ? 112 : 168;

// One warp streams the weights of all units into one ring, and the activations of their groups into
// another, which it begins once the prologue kernels are done. Lane j issues the copies of every 32nd
// unit, whose row it has read ahead.
template <class Code, int ROWS, int TOKENS>
__device__ void stream(const DecodeArguments& p, const UnitRow* units, const Memory& memory,
                       int lane) {
  constexpr int kBytes = group_bytes(TOKENS), kGroups = Code::kGroups;
  uint64_t once, keep;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
  const int count = load_row(reinterpret_cast<const BlockRow*>(units - 1)).units;
  const int last = p.unit_capacity - 1;
  int pair = 0;
  Source source = {};
  Target target = {};
  const auto copy_inputs = [&](int i) {
    if (i % 32 == 0) pair = __ldg(&units[min(i + lane, last)].source.pair);
    if (i % 32 == lane) {
      const uint8_t* from = p.inputs + static_cast<size_t>(pair) * kGroups * kBytes;
      for (int n = kGroups * i; n < kGroups * (i + 1); ++n, from += kBytes) {
        const int slot = n % p.slot_count;
        barrier_wait(memory.slots.empty(slot), (n / p.slot_count + 1) & 1);
        barrier_expect(memory.slots.full(slot), kBytes);
        bulk_copy(memory.inputs + slot * kBytes, from, kBytes, memory.slots.full(slot), keep);
      }
    }
    __syncwarp();
  };
  const auto copy_weights = [&](int i) {
    if (i % 32 == 0) {
      source = load_row(&units[min(i + lane, last)].source);
      target = load_row(&units[min(i + lane, last)].target);
    }
    if (i % 32 == lane) {
      const int stage = i % p.stage_count;
      barrier_wait(memory.stages.empty(stage), (i / p.stage_count + 1) & 1);
      Code::template copy<ROWS>(p, source, target, memory.staged + stage * p.stage_bytes,
                                memory.stages.full(stage), once);
    }
    __syncwarp();
  };
  const int stages = min(count, p.stage_count), slots = min(count, p.slot_count / kGroups);
  for (int i = 0; i < stages; ++i) copy_weights(i);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("fence.proxy.async;" ::: "memory");  // the prologue wrote by ordinary stores
  for (int i = 0; i < slots; ++i) copy_inputs(i);
  // Weights wait until unit i has been read, activations until its last group has, or, where units do
  // not fill the slots, the group before: then they come first.
  const bool inputs_first = p.slot_count % kGroups != 0;
  for (int i = 0; i < count; ++i) {
    const bool inputs = i + slots < count;
    if (inputs_first && inputs) copy_inputs(i + slots);
    if (i + stages < count) copy_weights(i + stages);
    if (!inputs_first && inputs) copy_inputs(i + slots);
  }
}

// A warp at work. `weights` are two batches of two products, one made while the other is read, and
// `behind` is the barrier of activations that products under way still read, or 0. `older` says
// whether the tile has sums already.
struct Reader {
  Memory memory;
  Lane lane;
  int rows;  // the warp's first of 16
  uint32_t behind;
  int older;
  uint32_t weights[2][2][4];
};

// The shared address of the next group's activations, once they are there.
template <int TOKENS>
__device__ __forceinline__ uint32_t next_inputs(Reader& reader, uint32_t* slot) {
  Ring& ring = reader.memory.slots;
  const uint32_t inputs = shared_address(reader.memory.inputs) + ring.at * group_bytes(TOKENS);
  *slot = ring.empty(ring.at);
  ring.wait_full();
  ring.next();
  // The same in all lanes, which the compiler does not know: descriptors then take no vector work.
  return __shfl_sync(0xffffffffu, inputs, 0);
}

// The place of batch `batch` of a group, once the batch before the last has been read.
__device__ __forceinline__ uint32_t (&next_batch(Reader& reader, int batch, uint32_t slot))[2][4] {
  warpgroup_wait<1>();
  if (batch == 1) {
    release(reader.behind, reader.lane.row * 4 + reader.lane.column);
    reader.behind = slot;
  }
  return reader.weights[batch % 2];
}

// Multiplies a batch, products `product` and the next of a group, and leaves it under way. `adds` is
// 0 where it begins a sum.
template <int TOKENS>
__device__ __forceinline__ void multiply_batch(float (&total)[TOKENS / 2],
                                               const uint32_t (&made)[2][4], uint32_t inputs,
                                               int product, int adds) {
  warpgroup_arrive();
  multiply(total, made[0], input_descriptor<TOKENS>(inputs, product), adds);
  multiply(total, made[1], input_descriptor<TOKENS>(inputs, product + 1), 1);
  warpgroup_commit();
}

// Keeps what reads sums behind the wait before it: the compiler moves such reads in front of a wait,
// and then cannot leave products under way.
template <int SUMS>
__device__ __forceinline__ void hold(float (&total)[SUMS]) {
#pragma unroll
  for (int i = 0; i < SUMS; ++i) asm volatile("" : "+f"(total[i])::"memory");
}

template <class Code, int GROUPS, int TOKENS>
__device__ void consume(const DecodeArguments& p, const UnitRow* units, const Memory& memory,
                        int warp, int thread) {
  constexpr int kRows = GROUPS * 64, kWarps = GROUPS * 4;
  const int count = load_row(reinterpret_cast<const BlockRow*>(units - 1)).units;
  // Rows of units, as they lie: most units need no more than the width.
  uint4 next = load_row(reinterpret_cast<const uint4*>(&units->target));
  float total[TOKENS / 2];
  Reader reader;
  reader.memory = memory;
  reader.lane = {thread / 4, thread % 4};
  reader.rows = warp * 16;
  reader.behind = 0;
  reader.older = 0;
  Ring& stages = reader.memory.stages;
  Code code;
  for (int i = 0; i < count; ++i) {
    const uint4 row = next;
    next = load_row(reinterpret_cast<const uint4*>(&units[min(i + 1, count - 1)].target));
    stages.wait_full();
    code.template add_unit<kRows, TOKENS>(
        row.x & 0xffff, memory.staged + stages.at * p.stage_bytes, reader, total);
    release(stages.empty(stages.at), thread);  // all of it is in registers
    stages.next();
    reader.older = 1;
    if (row.x > 0xffff) {
      warpgroup_wait<0>();
      hold(total);
      release(reader.behind, thread);
      reader.behind = 0;
      reader.older = 0;
      const Target unit = *reinterpret_cast<const Target*>(&row);
      finish<kWarps, TOKENS>(p, unit, warp, reader.rows, reader.lane, total);
    }
  }
  warpgroup_wait<0>();
}

template <class Code, int GROUPS, int TOKENS>
__global__ void __launch_bounds__(65536 / kRegisters<GROUPS, TOKENS> / 128 * 128, 1)
    batch_kernel(const __grid_constant__ DecodeArguments p) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) uint8_t shared[];
  const Memory memory = memory_of(p, shared, TOKENS);
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x == 0) {
    memory.stages.begin(GROUPS * 4);
    memory.slots.begin(GROUPS * 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const UnitRow* units = p.units + static_cast<size_t>(blockIdx.x) * (1 + p.unit_capacity) + 1;
  const int warp = threadIdx.x / 32, thread = threadIdx.x % 32;
  if (warp >= GROUPS * 4) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kStreamRegisters<GROUPS, TOKENS>));
    if (warp == GROUPS * 4) {
      stream<Code, GROUPS * 64, TOKENS>(p, units, memory, thread);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kReadRegisters<GROUPS, TOKENS>));
    consume<Code, GROUPS, TOKENS>(p, units, memory, warp, thread);
  }
#endif
}

// The power of two that brings `largest` below 2^15.
__device__ __forceinline__ float factor_of(float largest) {
  return __int_as_float((max(__float_as_int(largest) >> 23, kMinimumExponent) - 14) << 23);
}

// The largest absolute value of 8 activations.
__device__ __forceinline__ float largest_of_eight(const DecodeArguments& p, uint4 words) {
  const uint32_t each[4] = {words.x, words.y, words.z, words.w};
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = p.is_bf16
                            ? __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&each[i]))
                            : __half22float2(*reinterpret_cast<const __half2*>(&each[i]));
    largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
  }
  return largest;
}

// The power of two that brings `scale` times a row's largest activation below 2^15, for all of a
// block of so many threads.
template <int THREADS>
__device__ __forceinline__ float token_factor(const DecodeArguments& p, int64_t row, int columns,
                                              float scale) {
  __shared__ float largest_of[THREADS / 32];
  const uint16_t* x = static_cast<const uint16_t*>(p.x) + row;
  const int eights = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? columns / 8 : 0;
  float largest = 0.0f;
  for (int i = threadIdx.x; i < eights; i += THREADS) {
    largest = fmaxf(largest, largest_of_eight(p, reinterpret_cast<const uint4*>(x)[i]));
  }
  for (int i = 8 * eights + threadIdx.x; i < columns; i += THREADS) {
    largest = fmaxf(largest, fabsf(load_input(p, row + i)));
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  if (threadIdx.x % 32 == 0) largest_of[threadIdx.x / 32] = largest;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < THREADS / 32; ++i) largest = fmaxf(largest, largest_of[i]);
  return factor_of(largest * scale);
}

// `token_factor` of each token.
__global__ void __launch_bounds__(kFactorThreads)
    factor_kernel(const __grid_constant__ DecodeArguments p, int columns, float scale) {
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.x_stride;
  const float factor = token_factor<kFactorThreads>(p, row, columns, scale);
  if (threadIdx.x == 0) p.factors[blockIdx.x] = factor;
}

// All tokens, `TOKENS` in a launch.
template <class Code, int GROUPS, int TOKENS>
cudaError_t launch(const DecodeArguments& whole, int blocks, int shared, bool overlap,
                   cudaStream_t stream) {
  auto kernel = batch_kernel<Code, GROUPS, TOKENS>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  for (int first = 0; first < whole.tokens && status == cudaSuccess; first += TOKENS) {
    DecodeArguments part = whole;
    part.tokens = min(TOKENS, whole.tokens - first);
    part.inputs += static_cast<size_t>(first / TOKENS) * whole.pair_count * Code::kGroups *
                   group_bytes(TOKENS);
    part.y = static_cast<uint8_t*>(whole.y) + static_cast<size_t>(first) * whole.output_stride * 2;
    if (part.factors) part.factors += first;
    status = launch_kernel(kernel, blocks, kThreads<GROUPS>, shared, overlap, stream, part);
  }
  return status;
}

}  // namespace
