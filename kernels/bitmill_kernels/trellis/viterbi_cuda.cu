// The best circles for tiles on a GPU (code.py); the algorithm is that of viterbi_cpu.cpp.
//
// A block searches for S tiles together, which share the values of states: these are computed, not
// read. Kept costs of both steps lie in shared memory, one word more after every 2^B, so that
// threads of neighbouring j, which read 2^B words apart, meet no bank twice. The lowest B bits of a
// cost give way to the old bits o, so that one minimum finds both; o of each step and j goes to
// global memory, from where one thread a tile walks back.

#include <cstdint>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace {

constexpr int kStateBits = 16, kValues = 256, kMaxThreads = 512;
constexpr uint32_t kMultiplier = 0x962cae47u, kKept = 0x8fff8fffu, kFlipped = 0x3b603b60u;
constexpr float kNever = 1e30f;

__device__ __forceinline__ uint32_t masked(uint32_t h) { return (h & kKept) ^ kFlipped; }

__device__ __forceinline__ __half2 as_halves(uint32_t bits) {
  return *reinterpret_cast<__half2*>(&bits);
}

// Values of the state whose hash is h.
template <int V>
__device__ __forceinline__ float2 values_of(uint32_t h) {
  const __half2 own = as_halves(masked(h));
  if (V == 1) return make_float2(__half2float(__hadd(__low2half(own), __high2half(own))), 0.f);
  return __half22float2(__hadd2(own, as_halves(masked(__byte_perm(h, 0, 0x0123)))));
}

template <int B, int V>
struct Shape {
  static constexpr int R = kStateBits - B, kCount = 1 << R, kOlds = 1 << B, kRead = kCount >> B;
  static constexpr int kSteps = kValues / V;
  static constexpr int kThreads = kCount < kMaxThreads ? kCount : kMaxThreads;
  static constexpr int kTogether = kCount / kThreads % 2 == 0 && kThreads % kRead == 0 ? 2 : 1;
  static constexpr int kSize = kCount + (kCount >> B);
  __host__ __device__ static constexpr int place(int p) { return p + (p >> B); }
  static constexpr int shared_bytes(int tiles) {
    return tiles * (2 * kSize + kValues) * static_cast<int>(sizeof(float));
  }
};

template <int B, int V, int S>
__device__ void forward(const float* from, float* to, const float (&x)[S][V], uint8_t* olds,
                        int64_t tile_olds) {
  using H = Shape<B, V>;
  constexpr int U = H::kTogether;
  constexpr uint32_t kOldMask = H::kOlds - 1;
  for (int first = threadIdx.x; first < H::kCount; first += U * H::kThreads) {
    const float* read = from + H::place((first % H::kRead) << B);
    uint32_t h[U];
    float best[U][S];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      h[u] = (static_cast<uint32_t>(first + u * H::kThreads) << B) * kMultiplier;
#pragma unroll
      for (int q = 0; q < S; ++q) best[u][q] = 3e38f;
    }
#pragma unroll 4
    for (int o = 0; o < H::kOlds; ++o) {
      float kept[S];
#pragma unroll
      for (int q = 0; q < S; ++q) kept[q] = read[q * H::kSize + o];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const float2 v = values_of<V>(h[u]);
        h[u] += kMultiplier;
#pragma unroll
        for (int q = 0; q < S; ++q) {
          const float d = x[q][0] - v.x;
          float cost = fmaf(d, d, kept[q]);
          if (V == 2) {
            const float e = x[q][V - 1] - v.y;
            cost = fmaf(e, e, cost);
          }
          cost = __uint_as_float((__float_as_uint(cost) & ~kOldMask) | o);
          best[u][q] = fminf(best[u][q], cost);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = first + u * H::kThreads;
#pragma unroll
      for (int q = 0; q < S; ++q) {
        const uint32_t bits = __float_as_uint(best[u][q]);
        to[q * H::kSize + H::place(j)] = __uint_as_float(bits & ~kOldMask);
        olds[q * tile_olds + j] = bits & kOldMask;
      }
    }
  }
}

// targets [count][256], olds [tiles][kSteps][kCount], circles [count][bytes].
template <int B, int V, int S>
__global__ void __launch_bounds__(kMaxThreads)
    search(const float* targets, int count, uint8_t* olds, uint8_t* circles, int bytes, int seam) {
  using H = Shape<B, V>;
  extern __shared__ float memory[];
  __shared__ int ends[S];
  float *kept = memory, *next = memory + S * H::kSize, *x = memory + 2 * S * H::kSize;
  const int tile = blockIdx.x * S, thread = threadIdx.x;
  constexpr int64_t kTileOlds = static_cast<int64_t>(H::kSteps) * H::kCount;
  uint8_t* own = olds + tile * kTileOlds;
  for (int i = thread; i < S * kValues; i += H::kThreads)
    x[i] = targets[static_cast<int64_t>(min(tile + i / kValues, count - 1)) * kValues + i % kValues];
  auto run = [&](int first, int steps) {
    for (int t = 0; t < steps; ++t) {
      const int at = (first + t) % H::kSteps * V;
      float now[S][V];
#pragma unroll
      for (int q = 0; q < S; ++q)
#pragma unroll
        for (int v = 0; v < V; ++v) now[q][v] = x[q * kValues + at + v];
      forward<B, V, S>(kept, next, now, own + static_cast<int64_t>(t) * H::kCount, kTileOlds);
      __syncthreads();
      float* other = kept;
      kept = next;
      next = other;
    }
  };
  auto before = [&](int q, int t, int j) {
    const int old = own[q * kTileOlds + static_cast<int64_t>(t) * H::kCount + j];
    return (j << B | old) & (H::kCount - 1);
  };
  for (int i = thread; i < S * H::kSize; i += H::kThreads) kept[i] = 0.f;
  __syncthreads();
  run(H::kSteps - seam, 2 * seam);
  // One warp a tile finds the cheapest end and walks back to the seam.
  if (thread / 32 < S) {
    const int q = thread / 32, lane = thread % 32;
    float least = 3e38f;
    int j = 0;
    for (int p = lane; p < H::kCount; p += 32) {
      const float cost = kept[q * H::kSize + H::place(p)];
      if (cost < least) least = cost, j = p;
    }
    for (int step = 16; step; step /= 2) {
      const float other = __shfl_xor_sync(~0u, least, step);
      const int at = __shfl_xor_sync(~0u, j, step);
      if (other < least || (other == least && at < j)) least = other, j = at;
    }
    if (lane == 0) {
      for (int t = 2 * seam - 1; t >= seam; --t) j = before(q, t, j);
      ends[q] = j;
    }
  }
  __syncthreads();
  for (int i = thread; i < S * H::kSize; i += H::kThreads)
    kept[i] = i % H::kSize == H::place(ends[i / H::kSize]) ? 0.f : kNever;
  __syncthreads();
  run(0, H::kSteps);
  if (thread % 32 || thread / 32 >= S || tile + thread / 32 >= count) return;
  const int q = thread / 32;
  uint32_t* circle = reinterpret_cast<uint32_t*>(circles + static_cast<int64_t>(tile + q) * bytes);
  // Bits arrive from the last to the first; a word is written when its lowest bit is there.
  uint64_t word = 0;
  int have = 0, place = bytes / 4;
  for (int t = H::kSteps - 1, j = ends[q]; t >= 0; --t) {
    const int old = own[q * kTileOlds + static_cast<int64_t>(t) * H::kCount + j];
    word = word << B | old;
    have += B;
    if (have >= 32) {
      have -= 32;
      circle[--place] = static_cast<uint32_t>(word >> have);
    }
    j = (j << B | old) & (H::kCount - 1);
  }
}

template <int B, int V, int S>
cudaError_t launch(const float* targets, int count, uint8_t* olds, uint8_t* circles, int bytes,
                   int seam, cudaStream_t stream) {
  using H = Shape<B, V>;
  const int shared = H::shared_bytes(S);
  static const cudaError_t allowed = cudaFuncSetAttribute(
      search<B, V, S>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (allowed != cudaSuccess) return allowed;
  search<B, V, S><<<(count + S - 1) / S, H::kThreads, shared, stream>>>(targets, count, olds,
                                                                        circles, bytes, seam);
  return cudaGetLastError();
}

template <int B, int V>
cudaError_t by_tiles(int together, const float* targets, int count, uint8_t* olds,
                     uint8_t* circles, int bytes, int seam, cudaStream_t stream) {
  if constexpr (B > 2) {
    if (together >= 4) return launch<B, V, 4>(targets, count, olds, circles, bytes, seam, stream);
    if (together >= 2) return launch<B, V, 2>(targets, count, olds, circles, bytes, seam, stream);
  }
  return launch<B, V, 1>(targets, count, olds, circles, bytes, seam, stream);
}

}  // namespace

// targets f32 [count, 256] in the sequence of the circle; together: tiles of a block, 1, 2 or 4;
// olds: scratch of (count rounded up to `together`) * (256 / V) * 2^(16 - B) bytes; circles u8
// [count, 32 rate], whole words. Returns a cudaError_t.
extern "C" int bitmill_trellis_encode_cuda(const float* targets, int count, int rate, int seam,
                                           int together, uint8_t* olds, uint8_t* circles,
                                           void* stream) {
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  switch (rate) {
    case 1: return by_tiles<2, 2>(together, targets, count, olds, circles, 32, seam, s);
    case 2: return by_tiles<4, 2>(together, targets, count, olds, circles, 64, seam, s);
    case 3: return by_tiles<6, 2>(together, targets, count, olds, circles, 96, seam, s);
    case 4: return by_tiles<8, 2>(together, targets, count, olds, circles, 128, seam, s);
    case 5: return by_tiles<5, 1>(together, targets, count, olds, circles, 160, seam, s);
    case 6: return by_tiles<6, 1>(together, targets, count, olds, circles, 192, seam, s);
    case 7: return by_tiles<7, 1>(together, targets, count, olds, circles, 224, seam, s);
    default: return by_tiles<8, 1>(together, targets, count, olds, circles, 256, seam, s);
  }
}
