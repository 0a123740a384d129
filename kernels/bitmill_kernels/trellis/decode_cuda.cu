// Products with linears in trellis codes that share an input, on Hopper for up to 16 tokens,
// straight from their circles (layout.py, code.py), of activations as arrange_cuda.h says:
//
//   y[t, n] = row_scale[n] * sum_g factor[t, g] group_scale[g] * sum_k x'[t, k] value[n, k]
//
// All linears are multiplied in one launch, and inputs arranged once. A unit is a tile of rows of
// one group: its circles lie one after the other. Each block takes an equal run of consecutive
// units, tile by tile, groups of one rate after those of another. One warp streams circles and
// activations into a ring; every other one multiplies 16 ROW_TILES rows by mma.m16n8k16, and waits
// for nothing but the ring. factor is the power of two that brings a group's largest input below
// 2^15; times each linear's scale of the group it travels with the group's activations.

#include "arrange_cuda.h"
#include "circles_cuda.h"

namespace {

constexpr int kTile = 16, kTiles = kGroup / kTile;
constexpr int kArrangeWarps = 4;

// Groups of a linear in the order of their units.
struct alignas(32) Group {
  const uint8_t* circles;  // [rows / 16][8][32 rate]
  int rate;
  int run;    // so many groups from here on have this rate
  int index;  // in column order
};

// All units of a launch, and which blocks take them.
struct Units {
  int groups, count;

  __device__ __forceinline__ int first_of(int block) const {
    return static_cast<int>(static_cast<int64_t>(block) * count / gridDim.x);
  }
  __device__ __forceinline__ int block_of(int unit) const {
    return static_cast<int>((static_cast<int64_t>(unit + 1) * gridDim.x - 1) / count);
  }
};

// Bytes of a group's arranged activations: 256 a token, then for each linear what sums of the
// tokens are multiplied by.
__host__ __device__ constexpr int factor_bytes(int tokens) { return (tokens + 3) / 4 * 16; }
__host__ __device__ constexpr int input_bytes(int tokens, int members) {
  return 256 * tokens + members * factor_bytes(tokens);
}

// Arranges one token of a group: a warp. A lane has the scale of the group in its linear.
__device__ __forceinline__ void arrange(const DecodeArguments& p, const GroupColumns& group,
                                        float scale, int members, int token, uint8_t* to) {
  float value[4];
  group.rotate(p, static_cast<int64_t>(token) * p.x_stride, value);
  float largest = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) largest = fmaxf(largest, fabsf(value[i]));
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
  }
  const float factor = factor_of(largest);
  lay_out(to, p.tokens, token, group.lane, value, __frcp_rn(factor));
  if (group.lane >= members) return;
  to += 256 * p.tokens + group.lane * factor_bytes(p.tokens);
  reinterpret_cast<float*>(to)[token] = factor * scale;
}

__global__ void __launch_bounds__(kArrangeWarps * 32)
    arrange_kernel(const __grid_constant__ DecodeArguments p, int columns,
                   const float* group_scales, int members) {
  asm volatile("griddepcontrol.launch_dependents;");
  const int item = blockIdx.x * kArrangeWarps + threadIdx.x / 32;
  if (item >= p.pair_count * p.tokens) return;
  const int g = item / p.tokens, lane = threadIdx.x % 32;
  const GroupColumns group(p, g, columns, lane);
  const float scale = __ldg(group_scales + min(lane, members - 1) * p.pair_count + g);
  asm volatile("griddepcontrol.wait;" ::: "memory");
  arrange(p, group, scale, members, item % p.tokens,
          p.inputs + static_cast<size_t>(g) * input_bytes(p.tokens, members));
}

__device__ __forceinline__ uint4 load_matrices(uint32_t from) {
  uint4 found;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(from)
               : "memory");
  return found;
}

__device__ __forceinline__ float2 load_factors(uint32_t from) {
  float2 found;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
               : "=f"(found.x), "=f"(found.y)
               : "r"(from)
               : "memory");
  return found;
}

__device__ __forceinline__ bool barrier_test(uint32_t barrier, int parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.test_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.b32 %0, 1, 0, done;\n}\n"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}

// Streams all units of a block. Lane j issues the copies of every 32nd one.
template <int ROWS>
__device__ void stream(const DecodeArguments& p, const Group* groups, const Units& units,
                       const Stack& stack, const Ring& ring, uint8_t* stages, int lane) {
  uint64_t once, keep;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(keep));
  const int first = units.first_of(blockIdx.x), count = units.first_of(blockIdx.x + 1) - first;
  const int begin = min(count, ring.count), x_bytes = input_bytes(p.tokens, stack.count);
  const auto copy_inputs = [&](int i, int g) {
    const int stage = i % ring.count;
    bulk_copy(stages + stage * p.stage_bytes, p.inputs + static_cast<size_t>(g) * x_bytes, x_bytes,
              ring.full(stage), keep);
  };
  int tile = (first + lane) / units.groups, place = (first + lane) % units.groups, member = 0;
  for (int base = 0; base < count; base += 32) {
    const int mine = base + lane;
    Group group = {};
    Member own = {};
    if (mine < count) {
      member = stack.member_of(tile, member);
      own = stack.members[member];
      group = groups[member * units.groups + place];
    }
    for (int i = base; i < min(base + 32, count); ++i) {
      if (i == mine) {
        const int stage = i % ring.count;
        const int part = tile - own.first_tile, live = min(ROWS, own.rows - part * ROWS);
        const int bytes = (live + kTile - 1) / kTile * kTiles * 32 * group.rate;
        if (i >= ring.count) barrier_wait(ring.empty(stage), (i / ring.count + 1) & 1);
        barrier_expect(ring.full(stage), bytes + x_bytes);
        bulk_copy(stages + stage * p.stage_bytes + x_bytes,
                  group.circles +
                      static_cast<int64_t>(part) * (ROWS / kTile * kTiles * 32) * group.rate,
                  bytes, ring.full(stage), once);
        if (i >= begin) copy_inputs(i, group.index);
      }
      __syncwarp();
      if (i == begin - 1) {  // the ring is full of circles: now for the activations
        asm volatile("griddepcontrol.wait;" ::: "memory");
        asm volatile("fence.proxy.async;" ::: "memory");  // the prologue wrote by ordinary stores
        if (lane < begin) copy_inputs(lane, group.index);
        __syncwarp();
      }
    }
    for (place += 32; place >= units.groups; place -= units.groups) ++tile;
  }
}

// A warp at work.
struct Work {
  Ring ring;
  int lane, warp, tokens;
  int factors_at, circles_at;  // in a stage
  const uint8_t* staged;  // the ring's stages
  uint32_t stages;        // and their shared address
  int stage_bytes;
  bool ready;  // whether the next stage is known to be full
};

// Adds `count` units of groups of one rate. Whether the next stage is full is asked before this
// one's products, as the answer takes a while.
template <int RATE, int ROW_TILES, int TOKENS>
__device__ __forceinline__ void add_units(Work& work, int count,
                                          float (&total)[ROW_TILES][TOKENS / 2]) {
  constexpr int kEights = TOKENS / 8;
  const int lane = work.lane, column = lane % 4, piece = lane / 4 * 2 + column % 2;
  const int bytes = work.tokens * 256;
  // A lane's row of the matrices that ldmatrix loads: eight columns of a token, as in wgmma.h.
  uint32_t own[kEights];
#pragma unroll
  for (int n = 0; n < kEights; ++n) {
    const int token = min(lane % 8 + 8 * n, work.tokens - 1);
    own[n] = token * 128 + (lane / 8 ^ token % 8) * 16;
  }
  for (int i = 0; i < count; ++i) {
    const int at = work.ring.at * work.stage_bytes;
    const uint32_t inputs = work.stages + at;
    const uint8_t* circles = work.staged + at + work.circles_at +
                             (work.warp * ROW_TILES * kTiles + column / 2) * (32 * RATE);
    const Ring ring = work.ring;
    if (!work.ready) ring.wait_full();
    work.ring.next();
    work.ready = barrier_test(work.ring.full(work.ring.at), work.ring.parity);
    float sums[ROW_TILES][TOKENS / 2] = {};
#pragma unroll
    for (int pair = 0; pair < kTiles / 2; ++pair) {
      uint4 x[kEights];
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        x[n] = load_matrices(inputs + pair / 2 * (bytes / 2) + (own[n] ^ pair % 2 * 64));
      }
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
        uint32_t a[2][4];
        decode(load_two<RATE>(circles + (r * kTiles + 2 * pair) * (32 * RATE), piece), a[0], a[1]);
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
          float(&own_sums)[4] = *reinterpret_cast<float(*)[4]>(&sums[r][4 * n]);
          multiply(own_sums, a[0], x[n].x, x[n].y);
          multiply(own_sums, a[1], x[n].z, x[n].w);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
      const float2 factor = load_factors(inputs + work.factors_at + (8 * n + 2 * column) * 4);
#pragma unroll
      for (int r = 0; r < ROW_TILES; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          total[r][4 * n + c] += (c % 2 ? factor.y : factor.x) * sums[r][4 * n + c];
        }
      }
    }
    __syncwarp();
    release(ring.empty(ring.at), lane);
  }
}

template <int WARPS, int ROW_TILES, int TOKENS>
__device__ void consume(const DecodeArguments& p, const Group* all_groups, const Units& units,
                        const Stack& stack, const Ring& ring, const uint8_t* stages, int warp,
                        int lane) {
  constexpr int kRows = WARPS * ROW_TILES * kTile;
  const int first = units.first_of(blockIdx.x), end = units.first_of(blockIdx.x + 1);
  int tile = first / units.groups, place = first % units.groups;
  Work work = {ring, lane, warp, p.tokens};
  work.circles_at = input_bytes(p.tokens, stack.count);
  work.staged = stages, work.stages = shared_address(stages), work.stage_bytes = p.stage_bytes;
  float total[ROW_TILES][TOKENS / 2] = {};
  int member = 0;
  for (int unit = first; unit < end;) {
    member = stack.member_of(tile, member);
    const Group* groups = all_groups + member * units.groups;
    work.factors_at = 256 * p.tokens + member * factor_bytes(p.tokens);
    const int rate = __ldg(&groups[place].rate);
    const int count = min(__ldg(&groups[place].run), end - unit);
    switch (rate) {
      case 1: add_units<1, ROW_TILES, TOKENS>(work, count, total); break;
      case 2: add_units<2, ROW_TILES, TOKENS>(work, count, total); break;
      case 3: add_units<3, ROW_TILES, TOKENS>(work, count, total); break;
      case 4: add_units<4, ROW_TILES, TOKENS>(work, count, total); break;
      case 5: add_units<5, ROW_TILES, TOKENS>(work, count, total); break;
      case 6: add_units<6, ROW_TILES, TOKENS>(work, count, total); break;
      case 7: add_units<7, ROW_TILES, TOKENS>(work, count, total); break;
      case 8: add_units<8, ROW_TILES, TOKENS>(work, count, total); break;
    }
    unit += count;
    place += count;
    if (place < units.groups && unit < end) continue;
    const int last = (tile + 1) * units.groups - 1;
    const int first_block = units.block_of(tile * units.groups), last_block = units.block_of(last);
    const bool ends = units.first_of(last_block + 1) == last + 1;
    const Member own = stack.members[member];
    const int row = (tile - own.first_tile) * kRows;
    Target target;
    target.live_rows = static_cast<uint16_t>(min(kRows, own.rows - row));
    target.blocks = static_cast<uint16_t>(last_block - first_block + 1);
    target.ends = static_cast<uint16_t>(max(last_block - first_block + ends, 1));
    target.output = own.output + row;
    target.first_block = first_block;
#pragma unroll
    for (int r = 0; r < ROW_TILES; ++r) {
      const int part = warp * ROW_TILES + r;
      finish<WARPS * ROW_TILES, TOKENS>(p, target, part, part * kTile, {lane / 4, lane % 4},
                                        total[r]);
#pragma unroll
      for (int i = 0; i < TOKENS / 2; ++i) total[r][i] = 0.0f;
    }
    ++tile;
    place = 0;
  }
}

template <int WARPS, int ROW_TILES, int TOKENS, int BLOCKS>
__global__ void __launch_bounds__((WARPS + 1) * 32, BLOCKS)
    decode_kernel(const __grid_constant__ DecodeArguments p, const Group* groups,
                  const __grid_constant__ Stack stack) {
  constexpr int kRows = WARPS * ROW_TILES * kTile;
  extern __shared__ __align__(1024) uint8_t shared[];
  const Ring ring = {shared_address(shared), p.stage_count};
  asm volatile("griddepcontrol.launch_dependents;");
  if (threadIdx.x == 0) {
    ring.begin(WARPS);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const Units units = {p.pair_count, stack.tiles * p.pair_count};
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint8_t* stages = shared + kBarrierBytes;
  if (warp == WARPS) {
    stream<kRows>(p, groups, units, stack, ring, stages, lane);
  } else {
    consume<WARPS, ROW_TILES, TOKENS>(p, groups, units, stack, ring, stages, warp, lane);
  }
}

template <int WARPS, int ROW_TILES, int TOKENS, int BLOCKS>
cudaError_t launch(const DecodeArguments& p, const Group* groups, const Stack& stack, int columns,
                   const float* group_scales, int blocks, int shared, bool overlap,
                   cudaStream_t stream) {
  auto kernel = decode_kernel<WARPS, ROW_TILES, TOKENS, BLOCKS>;
  cudaError_t status =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (status != cudaSuccess) return status;
  const int items = p.pair_count * p.tokens;
  status = launch_kernel(arrange_kernel, (items + kArrangeWarps - 1) / kArrangeWarps,
                         kArrangeWarps * 32, 0, overlap, stream, p, columns, group_scales,
                         stack.count);
  if (status != cudaSuccess) return status;
  return launch_kernel(kernel, blocks, (WARPS + 1) * 32, shared, overlap, stream, p, groups, stack);
}

}  // namespace

// Multiplies up to `tile` tokens by linears of so many columns, at most 32. groups: a `Group` for
// each group, pair_count a linear, of scales f32 [members, pair_count]; members: a `Member` for
// each linear, of `tiles` in all; blocks no more than run at once. Returns a cudaError_t; 0 is
// success, -1 a shape that is not compiled.
extern "C" int bitmill_trellis_decode(const DecodeArguments* arguments, int columns,
                                      const float* group_scales, const void* groups,
                                      const void* members, int member_count, int tiles, int warps,
                                      int row_tiles, int per_processor, int tile, int blocks,
                                      int shared, int overlap, void* stream) {
  const auto s = static_cast<cudaStream_t>(stream);
  const auto table = static_cast<const Group*>(groups);
  const Stack stack = {static_cast<const Member*>(members), member_count, tiles};
#define BITMILL_SHAPE(WARPS, ROW_TILES, TOKENS, BLOCKS)                                          \
  if (warps == WARPS && row_tiles == ROW_TILES && tile == TOKENS && per_processor == BLOCKS)     \
    return launch<WARPS, ROW_TILES, TOKENS, BLOCKS>(*arguments, table, stack, columns,           \
                                                    group_scales, blocks, shared, overlap, s);
  BITMILL_SHAPE(8, 2, 8, 2)
  BITMILL_SHAPE(4, 1, 8, 4)
  BITMILL_SHAPE(8, 2, 16, 2)
  BITMILL_SHAPE(4, 1, 16, 4)
#undef BITMILL_SHAPE
  return -1;
}
