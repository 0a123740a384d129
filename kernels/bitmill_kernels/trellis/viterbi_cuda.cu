// The best circles for a group's columns of tiles on a GPU, with feedback between them (group.py).
//
// The search is that of viterbi_cpu.cpp, in halves of a word for two tiles at once: values are
// halves as they are, and costs are kept above a low one of their own step, so those of paths that
// may win are small and exact to about a thousandth. Which old bits were the cheapest is not kept:
// kept costs of every step go to global memory, and a warp a tile walks back, comparing in fp32 all
// states that lead to where it stands. Kept costs of both steps lie in shared memory, one word more
// after every 2^B, so that threads of neighbouring j, which read 2^B words apart, meet no bank
// twice. A block searches for P pairs of tiles, which share the values of states.
//
// Rows do not know of each other, so a block takes its rows through all columns of the group, with s
// the emphasis of rows:
//   x = s w / step,  v = the circle of least |x - s v|^2,  E = (w - step v) U_bb^-1,
//   w_k -= E U_bk for k > b

#include "circles_cuda.h"

namespace {

constexpr int kStateBits = 16, kTile = 16, kValues = kTile * kTile, kMaxThreads = 512;
constexpr float kLargest = 16.f;    // of targets; values end below 4
constexpr float kNever = 16384.f;   // above all costs of the steps before any state can be reached
constexpr int kReached = 8, kLevelled = 4;  // costs are lowered from this step on, so often

__device__ __forceinline__ __half2 as_halves(uint32_t bits) {
  return *reinterpret_cast<__half2*>(&bits);
}

__device__ __forceinline__ uint32_t as_word(__half2 halves) {
  return *reinterpret_cast<uint32_t*>(&halves);
}

// Bits that order as the numbers do.
__device__ __forceinline__ uint32_t ordered(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 ? ~0u : 0x80000000u);
}

// Values of the state whose hash is h; where it has one, twice.
template <int V>
__device__ __forceinline__ __half2 values_of(uint32_t h) {
  const __half2 own = as_halves(masked(h));
  if (V == 1) return __hadd2(__low2half2(own), __high2half2(own));
  return __hadd2(own, as_halves(masked(__byte_perm(h, 0, 0x0123))));
}

// Place in the tile, 16 row + column, of value i of a circle (code.py).
__device__ __forceinline__ int position(int i) {
  const int lane = i / 8, part = i / 2 % 4;
  return kTile * (lane / 4 + 8 * (part % 2)) + 2 * (lane % 4) + 8 * (part / 2) + i % 2;
}

template <int B, int V>
struct Shape {
  static constexpr int R = kStateBits - B, kCount = 1 << R, kOlds = 1 << B, kRead = kCount >> B;
  static constexpr int kSteps = kValues / V;
  static constexpr int kThreads = kCount < kMaxThreads ? kCount : kMaxThreads;
  // A thread takes kTogether of the j that read the same costs, kApart from each other.
  static constexpr int kApart = kRead > kThreads ? kRead : kThreads;
  static constexpr int kTogether = kRead > kThreads ? kOlds : kCount > kThreads ? 2 : 1;
  static constexpr int kRound = kRead > kThreads ? kCount : kTogether * kThreads;
  static constexpr int kSize = kCount + (kCount >> B);
  static constexpr int64_t kHistory = static_cast<int64_t>(kSteps) * kCount;
  __host__ __device__ static constexpr int place(int p) { return p + (p >> B); }
  // Kept costs of two steps, targets and emphases in halves, targets, errors and emphases of both
  // tiles of a pair.
  static constexpr int shared_bytes(int pairs) {
    return pairs * (2 * kSize + 5 * kValues + 3 * kTile) * 4;
  }
};

// One step: kept costs behind it, less `low`, from those before it. against: less the emphasis.
template <int B, int V, int P>
__device__ __forceinline__ void forward(const uint32_t* from, uint32_t* to,
                                        const __half2 (&x)[P][V], const __half2 (&against)[P],
                                        const __half2 (&low)[P], uint32_t* history) {
  using H = Shape<B, V>;
  constexpr int U = H::kTogether;
  for (int i = threadIdx.x; i < H::kCount / U; i += H::kThreads) {
    const int first = i / H::kApart * H::kRound + i % H::kApart;
    const uint32_t* read = from + H::place((first % H::kRead) << B);
    uint32_t h[U];
    __half2 best[U][P];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      h[u] = (static_cast<uint32_t>(first + u * H::kApart) << B) * kMultiplier;
#pragma unroll
      for (int q = 0; q < P; ++q) best[u][q] = as_halves(0x7bff7bffu);
    }
#pragma unroll 4
    for (int o = 0; o < H::kOlds; ++o) {
      __half2 kept[P];
#pragma unroll
      for (int q = 0; q < P; ++q) kept[q] = as_halves(read[q * H::kSize + o]);
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const __half2 v = values_of<V>(h[u]);
        h[u] += kMultiplier;
#pragma unroll
        for (int q = 0; q < P; ++q) {
          const __half2 d = __hfma2(against[q], V == 2 ? __low2half2(v) : v, x[q][0]);
          __half2 cost = __hfma2(d, d, kept[q]);
          if (V == 2) {
            const __half2 e = __hfma2(against[q], __high2half2(v), x[q][V - 1]);
            cost = __hfma2(e, e, cost);
          }
          best[u][q] = __hmin2(best[u][q], cost);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int j = first + u * H::kApart;
#pragma unroll
      for (int q = 0; q < P; ++q) {
        const uint32_t word = as_word(__hsub2(best[u][q], low[q]));
        to[q * H::kSize + H::place(j)] = word;
        history[q * H::kHistory + j] = word;
      }
    }
  }
}

// block f32 [M][columns]; steps [M]; emphasis [M], halves of a word in f32; upper f32
// [columns][stride] and inverses [columns of tiles][16][16], or neither; missed [M][columns]; rows:
// numbers of `count` rows of tiles; history: words [pairs][kHistory]; circles [count][columns of
// tiles][bytes].
template <int B, int V, int P>
__global__ void __launch_bounds__(kMaxThreads, 1)
    encode(float* block, const float* steps, const float* emphasis, const float* upper,
           int64_t stride, const float* inverses, float* missed, const int* rows, int count,
           int columns, int seam, uint32_t* history, uint8_t* circles) {
  using H = Shape<B, V>;
  constexpr int S = 2 * P, kWarps = H::kThreads / 32, kBytes = 32 * B / V;
  constexpr uint32_t kOldMask = H::kOlds - 1;
  extern __shared__ uint32_t memory[];
  __shared__ int ends[S];
  uint32_t *kept = memory, *next = kept + P * H::kSize, *halves = next + P * H::kSize;
  uint32_t* against = halves + P * kValues;
  float *x = reinterpret_cast<float*>(against + P * kTile), *lost = x + S * kValues;
  float* counts = lost + S * kValues;  // emphases of the rows of all tiles
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, tile = blockIdx.x * S;
  const int across = (columns + kTile - 1) / kTile;
  history += static_cast<int64_t>(blockIdx.x) * P * H::kHistory;
  auto row_of = [&](int i) {  // of entry i of [S][16][16]
    return static_cast<int64_t>(kTile) * rows[min(tile + i / kValues, count - 1)] +
           i % kValues / kTile;
  };
  auto run = [&](int first, int length) {
    for (int t = 0; t < length; ++t) {
      const int at = (first + t) % H::kSteps * V;
      const bool lowered = t >= kReached && t % kLevelled == 0;
      __half2 now[P][V], less[P], low[P];
#pragma unroll
      for (int q = 0; q < P; ++q) {
#pragma unroll
        for (int v = 0; v < V; ++v) now[q][v] = as_halves(halves[q * kValues + at + v]);
        less[q] = as_halves(against[q * kTile + position(at) / kTile]);
        low[q] = as_halves(0);
        if (lowered) {
          low[q] = as_halves(kept[q * H::kSize + H::place(lane * (H::kCount / 32))]);
#pragma unroll
          for (int step = 16; step; step /= 2)
            low[q] = __hmin2(low[q], as_halves(__shfl_xor_sync(~0u, as_word(low[q]), step)));
        }
      }
      forward<B, V, P>(kept, next, now, less, low, history + static_cast<int64_t>(t) * H::kCount);
      __syncthreads();
      uint32_t* other = kept;
      kept = next;
      next = other;
    }
  };
  // The cheapest state at step t of those with the upper bits j, for value `at` of tile q; all
  // lanes get it. start: what the first state begins with.
  auto before = [&](int q, int t, int at, int j, int start) {
    const uint32_t* costs = history + q / 2 * H::kHistory + static_cast<int64_t>(t - 1) * H::kCount;
    const float s = counts[q * kTile + position(at) / kTile];
    uint32_t least = ~0u;
    for (int o = lane; o < H::kOlds; o += 32) {
      const int state = j << B | o, p = state & (H::kCount - 1);
      float cost = p == start ? 0.f : kNever;
      if (t > 0) {
        const float2 both = __half22float2(as_halves(__ldcg(costs + p)));
        cost = q % 2 ? both.y : both.x;
      }
      const float2 v = __half22float2(values_of<V>(static_cast<uint32_t>(state) * kMultiplier));
      const float d = fmaf(-s, v.x, x[q * kValues + at]);
      cost = fmaf(d, d, cost);
      if (V == 2) {
        const float e = fmaf(-s, v.y, x[q * kValues + at + V - 1]);
        cost = fmaf(e, e, cost);
      }
      least = min(least, (ordered(cost) & ~kOldMask) | o);
    }
    return j << B | static_cast<int>(__reduce_min_sync(~0u, least) & kOldMask);
  };

  for (int i = thread; i < S * kTile; i += H::kThreads) counts[i] = emphasis[row_of(i * kTile)];
  __syncthreads();
  for (int i = thread; i < P * kTile; i += H::kThreads) {
    const float* own = counts + i / kTile * 2 * kTile + i % kTile;
    against[i] = as_word(__floats2half2_rn(-own[0], -own[kTile]));
  }
  for (int b = 0; b < across; ++b) {
    const int start = b * kTile, width = min(kTile, columns - start);
    for (int i = thread; i < S * kValues; i += H::kThreads) {
      const int place = position(i % kValues), column = place % kTile;
      const int64_t row = row_of(i - i % kValues + place);
      const float step = steps[row];
      float w = 0.f;
      if (column < width && step > 0.f) w = block[row * columns + start + column] * (1.f / step);
      w *= counts[i / kValues * kTile + place / kTile];
      x[i] = fminf(fmaxf(w, -kLargest), kLargest);
    }
    for (int i = thread; i < P * H::kSize; i += H::kThreads) kept[i] = 0;
    __syncthreads();
    for (int i = thread; i < P * kValues; i += H::kThreads) {
      const float* own = x + i / kValues * 2 * kValues + i % kValues;
      halves[i] = as_word(__floats2half2_rn(own[0], own[kValues]));
    }
    __syncthreads();
    run(H::kSteps - seam, 2 * seam);
    for (int q = warp; q < S; q += kWarps) {
      uint32_t least = ~0u;
      for (int p = lane; p < H::kCount; p += 32) {
        const float2 both = __half22float2(as_halves(kept[q / 2 * H::kSize + H::place(p)]));
        least = min(least, (ordered(q % 2 ? both.y : both.x) & 0xffff0000u) | p);
      }
      int j = __reduce_min_sync(~0u, least) & 0xffff;
      for (int t = 2 * seam - 1; t >= seam; --t)
        j = before(q, t, (t - seam + H::kSteps) % H::kSteps * V, j, -1) & (H::kCount - 1);
      if (lane == 0) ends[q] = j;
    }
    __syncthreads();
    const uint32_t never = as_word(__floats2half2_rn(kNever, kNever));
    for (int i = thread; i < P * H::kSize; i += H::kThreads) kept[i] = never;
    __syncthreads();
    if (thread < S)
      reinterpret_cast<uint16_t*>(kept)[2 * (thread / 2 * H::kSize + H::place(ends[thread])) +
                                        thread % 2] = 0;
    __syncthreads();
    run(0, H::kSteps);
    for (int q = warp; q < S; q += kWarps) {
      const bool real = tile + q < count;
      uint8_t* circle = circles + (static_cast<int64_t>(tile + q) * across + b) * kBytes;
      // Bits arrive from the last to the first; a word is written when its lowest bit is there.
      uint64_t word = 0;
      int have = 0, place = kBytes / 4;
      for (int t = H::kSteps - 1, j = ends[q]; t >= 0; --t) {
        const int state = before(q, t, t * V, j, ends[q]);
        j = state & (H::kCount - 1);
        word = word << B | (state & kOldMask);
        have += B;
        if (have >= 32) {
          have -= 32;
          --place;
          if (lane == 0 && real)
            reinterpret_cast<uint32_t*>(circle)[place] = static_cast<uint32_t>(word >> have);
        }
        const float2 v = __half22float2(values_of<V>(static_cast<uint32_t>(state) * kMultiplier));
        if (lane < V) lost[q * kValues + position(t * V + lane)] = lane ? v.y : v.x;
      }
    }
    __syncthreads();
    if (upper == nullptr) continue;
    for (int i = thread; i < S * kValues; i += H::kThreads) {
      const int64_t row = row_of(i);
      const int column = i % kTile;
      lost[i] = column < width ? block[row * columns + start + column] - lost[i] * steps[row] : 0.f;
    }
    __syncthreads();
    for (int i = thread; i < S * kValues; i += H::kThreads) {
      const float* inverse = inverses + b * kValues + i % kTile;
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kTile; ++k) sum = fmaf(lost[i - i % kTile + k], inverse[kTile * k], sum);
      x[i] = sum;
      if (i % kTile < width && tile + i / kValues < count)
        missed[row_of(i) * columns + start + i % kTile] = sum;
    }
    __syncthreads();
    const int behind = columns - start - kTile;
    for (int i = thread; i < S * kTile * behind; i += H::kThreads) {
      const int r = i / behind, column = start + kTile + i % behind;
      if (tile + r / kTile >= count) break;
      float sum = 0.f;
#pragma unroll
      for (int k = 0; k < kTile; ++k)
        sum = fmaf(x[r * kTile + k], upper[(start + k) * stride + column], sum);
      block[row_of(r * kTile) * columns + column] -= sum;
    }
    __syncthreads();
  }
}

struct Call {
  float* block;
  const float *steps, *emphasis, *upper;
  int64_t stride;
  const float* inverses;
  float* missed;
  const int* rows;
  int count, columns, seam;
  uint32_t* history;
  uint8_t* circles;
  cudaStream_t stream;
};

template <int B, int V, int P>
cudaError_t launch(const Call& c) {
  using H = Shape<B, V>;
  const int shared = H::shared_bytes(P), grid = (c.count + 2 * P - 1) / (2 * P);
  static const cudaError_t allowed = cudaFuncSetAttribute(
      encode<B, V, P>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (allowed != cudaSuccess) return allowed;
  encode<B, V, P><<<grid, H::kThreads, shared, c.stream>>>(
      c.block, c.steps, c.emphasis, c.upper, c.stride, c.inverses, c.missed, c.rows, c.count,
      c.columns, c.seam, c.history, c.circles);
  return cudaGetLastError();
}

template <int B, int V>
cudaError_t by_pairs(int pairs, const Call& call) {
  if constexpr (B > 4) {
    if (pairs == 6) return launch<B, V, 6>(call);
  }
  if constexpr (B > 2) {
    if (pairs == 3) return launch<B, V, 3>(call);
    if (pairs == 2) return launch<B, V, 2>(call);
  }
  return pairs == 1 ? launch<B, V, 1>(call) : cudaErrorInvalidValue;
}

}  // namespace

// See `encode`; block is changed. pairs: of tiles a block, as group.py lists them by rate. history:
// scratch of ceil(count / 2 pairs) * pairs * (256 / V) * 2^(16 - B) words. circles: whole words.
// Returns a cudaError_t.
extern "C" int bitmill_trellis_encode_cuda(float* block, const float* steps, const float* emphasis,
                                           const float* upper, int64_t stride,
                                           const float* inverses, float* missed, const int* rows,
                                           int count, int columns, int rate, int seam, int pairs,
                                           uint32_t* history, uint8_t* circles, void* stream) {
  const Call call{block,  steps, emphasis, upper, stride,  inverses, missed,
                  rows,   count, columns,  seam,  history, circles,  static_cast<cudaStream_t>(stream)};
  switch (rate) {
    case 1: return by_pairs<2, 2>(pairs, call);
    case 2: return by_pairs<4, 2>(pairs, call);
    case 3: return by_pairs<6, 2>(pairs, call);
    case 4: return by_pairs<8, 2>(pairs, call);
    case 5: return by_pairs<5, 1>(pairs, call);
    case 6: return by_pairs<6, 1>(pairs, call);
    case 7: return by_pairs<7, 1>(pairs, call);
    default: return by_pairs<8, 1>(pairs, call);
  }
}
