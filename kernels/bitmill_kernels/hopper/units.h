// What the kernels of packed products share: tables of units, the ring that streams them through
// shared memory, and how a lane reads codes. See decode_cuda.cu for the layout.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace {

// Activations are divided by powers of two from 2^(kMinimumExponent - 127) on.
constexpr int kMinimumExponent = 16;

// Packed columns [first, first + live) of the two groups of a pair.
struct PairRow {
  int width, first[2], live[2];
};

// A unit of a block: where its bytes are, in units of 16; where its sums go; its columns.
struct alignas(16) Source {
  uint32_t low, high, grid;
  int pair;
};
struct alignas(16) Target {
  uint16_t width, ends;  // ends: of the last of its tile in this block, how many end with the tile
  uint16_t live_rows, blocks;
  int output, first_block;
};
struct alignas(16) Columns {
  int first[2];
  uint16_t live[2], width;
};
struct UnitRow {
  Source source;
  Target target;
  Columns columns;
};

// The row before those of a block's units. Activations of unit i are chunk i % chunks.
struct alignas(16) BlockRow {
  int units, chunks;
};

}  // namespace

extern "C" struct DecodeArguments {
  const uint8_t* planes;
  const uint8_t* grid;
  const PairRow* pairs;
  const UnitRow* units;  // for each block one BlockRow, then unit_capacity rows
  const void* x;
  const int* order;
  uint8_t* inputs;  // converted activations of all pairs, null where blocks convert their own
  float* factors;   // what converted activations of each token are multiplied by, or null
  const float* row_scales;  // what sums of each row are multiplied by, or null
  const void* bias;
  float* partial;   // where blocks leave sums of tiles that they share
  int* counters;    // of the decode kernel: who has left its sums
  void* y;
  int pair_count;
  int tokens;
  int x_stride;
  int output_stride;
  int chunk_capacity;
  int unit_capacity;
  int stage_count;
  int stage_bytes;
  int slot_count;  // of the batch kernel's ring of activations
  int is_bf16;
};

namespace {

template <class Row>
__device__ __forceinline__ Row load_row(const Row* from) {
  static_assert(sizeof(Row) == 16);
  const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
  return *reinterpret_cast<const Row*>(&words);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Barriers by pointer or by shared address, which takes fewer instructions to keep and add to.
__device__ __forceinline__ void barrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}

__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void barrier_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  barrier_init(shared_address(barrier), count);
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  barrier_arrive(shared_address(barrier));
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, int bytes) {
  barrier_expect(shared_address(barrier), bytes);
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, int parity) {
  barrier_wait(shared_address(barrier), parity);
}
__device__ __forceinline__ void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier,
                                          uint64_t policy) {
  bulk_copy(to, from, bytes, shared_address(barrier), policy);
}

struct Lane {
  int row;     // lane / 4
  int column;  // lane % 4
};

// Loads 4 words (2 for planes of one bit, twice) of a lane's part of 2*ROW_TILES rows: of vector v
// of a plane of BITS bits, taken 16 bytes at a time or, next to a plane of one bit, 8.
template <int BITS, bool NARROW, int ROW_TILES>
__device__ __forceinline__ void load_words(const uint8_t* plane, int v, Lane lane,
                                           uint32_t (&words)[2 * ROW_TILES][4]) {
#pragma unroll
  for (int r = 0; r < 2 * ROW_TILES; ++r) {
    const uint8_t* from = plane + (r * 8 + lane.row) * 32 * BITS + v * 64;
    uint32_t(&to)[4] = words[r];
    if constexpr (BITS == 1) {
      const uint2 here = *reinterpret_cast<const uint2*>(from + lane.column * 8);
      to[0] = to[2] = here.x, to[1] = to[3] = here.y;
    } else if constexpr (NARROW) {
      const uint2 first = *reinterpret_cast<const uint2*>(from + lane.column * 8);
      const uint2 second = *reinterpret_cast<const uint2*>(from + 32 + lane.column * 8);
      to[0] = first.x, to[1] = first.y, to[2] = second.x, to[3] = second.y;
    } else {
      const uint4 here = *reinterpret_cast<const uint4*>(from + lane.column * 16);
      to[0] = here.x, to[1] = here.y, to[2] = here.z, to[3] = here.w;
    }
  }
}

__device__ __forceinline__ int low_plane(int width) {
  return width == 3 ? 2 : width == 5 || width == 6 ? 4 : width;
}

__device__ __forceinline__ float load_bias(const DecodeArguments& p, int output) {
  if (p.bias == nullptr) return 0.0f;
  return p.is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p.bias)[output])
                   : __half2float(static_cast<const __half*>(p.bias)[output]);
}

__device__ __forceinline__ void store_output(const DecodeArguments& p, int token, int output,
                                             float value) {
  const int64_t at = static_cast<int64_t>(token) * p.output_stride + output;
  if (p.is_bf16) {
    static_cast<__nv_bfloat16*>(p.y)[at] = __float2bfloat16_rn(value);
  } else {
    static_cast<__half*>(p.y)[at] = __float2half_rn(value);
  }
}

__device__ __forceinline__ float load_input(const DecodeArguments& p, int64_t at) {
  return p.is_bf16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(p.x)[at])
                   : __half2float(static_cast<const __half*>(p.x)[at]);
}

// Room of a pair's activations in a stage of the ring: what lies behind begins with a line of 128
// bytes, however many tokens there are.
__device__ __forceinline__ int staged_bytes(int x_bytes) { return (x_bytes + 127) / 128 * 128; }

// Streams the planes and scales of all units into the ring, and the activations where a prologue
// kernel converted them: `x_bytes` of each pair, 0 where blocks convert their own. Lane j works out
// the addresses of every 32nd unit and issues its copies.
template <int ROWS>
__device__ void produce(const DecodeArguments& p, const UnitRow* units, uint64_t* full,
                        uint64_t* empty, uint8_t* ring, int lane, int x_bytes) {
  uint64_t once, keep;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
  const int count = load_row(reinterpret_cast<const BlockRow*>(units - 1)).units;
  const int first = min(count, p.stage_count);
  for (int base = 0; base < count; base += 32) {
    const int mine = min(base + lane, p.unit_capacity - 1);
    const Source unit = load_row(&units[mine].source);
    const int width = load_row(&units[mine].target).width;
    const int stage = mine % p.stage_count, parity = (mine / p.stage_count - 1) & 1;
    const int low_bytes = ROWS * 32 * low_plane(width);
    const int high_bytes = ROWS * 32 * width - low_bytes;
    const uint8_t* low = p.planes + (static_cast<size_t>(unit.low) << 4);
    const uint8_t* high = p.planes + (static_cast<size_t>(unit.high) << 4);
    const uint8_t* grid = p.grid + (static_cast<size_t>(unit.grid) << 4);
    const uint8_t* inputs = p.inputs + static_cast<size_t>(unit.pair) * x_bytes;
    uint8_t* staged = ring + stage * p.stage_bytes;
    uint8_t* scales = staged + staged_bytes(x_bytes);
    uint8_t* planes = scales + ROWS * 8;
    for (int i = base; i < min(base + 32, count); ++i) {
      if (i - base == lane) {
        if (i >= first) barrier_wait(empty + stage, parity);
        barrier_expect(full + stage, x_bytes + ROWS * 8 + low_bytes + high_bytes);
        bulk_copy(planes, low, low_bytes, full + stage, once);
        if (high_bytes) bulk_copy(planes + low_bytes, high, high_bytes, full + stage, once);
        bulk_copy(scales, grid, ROWS * 8, full + stage, once);
        if (x_bytes && i >= first) bulk_copy(staged, inputs, x_bytes, full + stage, keep);
      }
      __syncwarp();
      if (x_bytes && i == first - 1) {  // the ring is full of weights: now for the activations
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");  // the prologue wrote by ordinary stores
        if (lane < first) bulk_copy(staged, inputs, x_bytes, full + stage, keep);
        __syncwarp();
      }
    }
  }
}

template <class... Parameters, class... Values>
cudaError_t launch_kernel(void (*kernel)(Parameters...), int blocks, int threads, int shared,
                          bool overlap, cudaStream_t stream, const Values&... values) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Parameters(values)...);
}

}  // namespace
