// Linears in trellis codes on a CPU, straight from their circles (layout.py, code.py).
//
//   bitmill_trellis_multiply:  y[t, n] = row_scale[n] * sum_k x[t, k] * group_scale[g] * value[n, k]
//   bitmill_trellis_rotate:    x of the source's columns, brought into packed, rotated ones
//   bitmill_trellis_decode:    w[n, k] = row_scale[n] * group_scale[g] * value[n, k]
//
// Values are computed from vectors of states, in fp32 and exactly as code.py has them:
//
//   h = state * multiplier;  r = h reversed byte by byte
//   s = f(lower half of h) + f(lower half of r) and f(upper half of h) + f(upper half of r), or
//       f(lower half of h) + f(upper half of h)
//   value = (s + 8192 s) - 8192 s, which rounds s to the 11 bits that fp16 has
//
// f keeps the sign and 12 bits of a half, so its exponents are -3 to 0: the upper half of a word,
// shifted right by 3 with the sign kept, has them where fp32 has them.
//
// 32 values in a row of a circle, a run, are the same 16 columns of two rows: 16 pairs, the even
// values of which lie in vectors, then the odd ones, and x as they do.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "../vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));

constexpr int kTile = 16, kRuns = 8, kPairs = 16, kRun = 2 * kPairs, kMaxTokens = 4;
constexpr int kGroupTiles = 8, kGroup = kGroupTiles * kTile;
constexpr int kRotationSteps = 8;  // that a column takes
constexpr int64_t kThreadWeights = 1 << 17;  // of fewer a thread is not worth its waiting: 10 us
constexpr int kSlack = 64;  // bytes behind a circle that vectors may read

constexpr uint32_t kMultiplier = 0x962cae47u;
// 0x8fff and 0x3b60 where fp32 has sign, exponent and fraction; exponent 12 of fp16 is 124 there.
constexpr int32_t kKept = static_cast<int32_t>(0x81ffe000u), kFlipped = 124 << 23 | 0xb60 << 13;

// Row, and first column, in the tile of pair i of run p.
inline int row_of(int p, int i) { return p + 8 * (i % 2); }
inline int column_of(int i) { return 2 * (i / 4) + 8 * (i / 2 % 2); }

// Where kLanes states lie, 2 RATE bits apart from bit FIRST of a byte on: in two words of 16 bits
// each, whose numbers and, for shuffles of 16 bytes, whose bytes these are.
template <int RATE, int FIRST>
struct Places {
  uint16_t words[2 * kLanes] = {};
  uint8_t bytes[4 * kLanes] = {};
  int32_t shifts[kLanes] = {};
  constexpr Places() {
    for (int i = 0; i < kLanes; ++i) {
      const int bit = FIRST + 2 * RATE * i;
      for (int w = 0; w < 2; ++w) words[2 * i + w] = bit / 16 + w;
      for (int b = 0; b < 4; ++b) {
        const int at = bit / 16 * 2 + b;
        bytes[4 * i + b] = at < 16 ? at : 0x80;  // none, where the second word is not needed
      }
      shifts[i] = bit % 16;
    }
  }
};

// h of these states.
template <int RATE, int FIRST>
inline Words hashes(const uint8_t* from) {
  alignas(64) static constexpr Places<RATE, FIRST> kPlaces;
#if defined(__AVX512BW__)
  const __m512i words =
      _mm512_permutexvar_epi16(_mm512_loadu_si512(kPlaces.words), _mm512_loadu_si512(from));
  const __m512i bits = _mm512_srlv_epi32(words, _mm512_loadu_si512(kPlaces.shifts));
  return (reinterpret_cast<Words>(bits) & 0xffff) * kMultiplier;
#elif defined(__AVX2__)
  const auto load = [](const void* at) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(at));
  };
  const __m256i both =
      _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  const __m256i words = _mm256_shuffle_epi8(both, load(kPlaces.bytes));
  const __m256i bits = _mm256_srlv_epi32(words, load(kPlaces.shifts));
  return (reinterpret_cast<Words>(bits) & 0xffff) * kMultiplier;
#else
  Words found;
  for (int i = 0; i < kLanes; ++i) {
    uint32_t bits;
    std::memcpy(&bits, from + 2 * kPlaces.words[2 * i], sizeof bits);
    found[i] = (bits >> kPlaces.shifts[i] & 0xffff) * kMultiplier;
  }
  return found;
#endif
}

inline Words reversed(Words h) {
#if defined(__AVX512BW__)
  const __m512i turned = _mm512_broadcast_i32x4(
      _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  return reinterpret_cast<Words>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(h), turned));
#elif defined(__AVX2__)
  const __m256i turned = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(3, 2, 1, 0, 7, 6, 5, 4, 11, 10, 9, 8, 15, 14, 13, 12));
  return reinterpret_cast<Words>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(h), turned));
#else
  return h << 24 | (h << 8 & 0xff0000) | (h >> 8 & 0xff00) | h >> 24;
#endif
}

// f of the upper halves.
inline Floats upper(Words h) {
  return reinterpret_cast<Floats>((reinterpret_cast<Ints>(h) >> 3 & kKept) ^ kFlipped);
}

// To fp16, the same with multiplications fused or not.
inline Floats rounded(Floats s) {
  const Floats large = s * 8192.0f;
  return (s + large) - large;
}

// Both values of kLanes pairs of a circle in a row, of which the first state begins at `from`.
template <int RATE>
inline void decode(const uint8_t* from, Floats& even, Floats& odd) {
  const Words h = hashes<RATE, 0>(from);
  if constexpr (RATE <= 4) {
    const Words r = reversed(h);
    even = rounded(upper(h << 16) + upper(r << 16));
    odd = rounded(upper(h) + upper(r));
  } else {
    const Words next = hashes<RATE, RATE % 8>(from + RATE / 8);
    even = rounded(upper(h << 16) + upper(h));
    odd = rounded(upper(next << 16) + upper(next));
  }
}

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

}  // namespace

struct Group {
  const uint8_t* circles;  // [tile rows][columns][32 rate]
  int32_t rate;
  int32_t columns;  // of tiles, at most 8
  float scale;
};

namespace {

// Circles of a row of tiles, each followed by its beginning.
template <int RATE>
struct Strip {
  static constexpr int kBytes = 32 * RATE;
  alignas(64) uint8_t circles[kGroupTiles][kBytes + kSlack];

  Strip(const Group& group, int tile_row) {
    const uint8_t* from = group.circles + static_cast<int64_t>(tile_row) * group.columns * kBytes;
    for (int c = 0; c < group.columns; ++c, from += kBytes) {
      std::memcpy(circles[c], from, kBytes);
      std::memcpy(circles[c] + kBytes, from, sizeof(uint16_t));
    }
  }

  const uint8_t* at(int column, int run, int pair) const {
    return circles[column] + 4 * RATE * run + RATE * pair / 4;
  }
};

template <int RATE, int TOKENS>
__attribute__((noinline)) void add_group(const Group& group, int tile_row, const float* x,
                                         int64_t x_stride, Floats (*sums)[TOKENS]) {
  const Strip<RATE> strip(group, tile_row);
  for (int p = 0; p < kRuns; ++p) {
    Floats part[TOKENS];
    for (int t = 0; t < TOKENS; ++t) part[t] = sums[p][t];
    for (int c = 0; c < group.columns; ++c) {
#pragma GCC unroll 4
      for (int i = 0; i < kPairs; i += kLanes) {
        Floats even, odd;
        decode<RATE>(strip.at(c, p, i), even, odd);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; ++t) {
          const float* at = x + t * x_stride + c * kRun + i;
          part[t] += even * load(at);
          part[t] += odd * load(at + kPairs);
        }
      }
    }
    for (int t = 0; t < TOKENS; ++t) sums[p][t] = part[t];
  }
}

// run<RATE>() of a rate that is known at run time.
template <typename Run>
inline void by_rate(int rate, Run run) {
  switch (rate) {
    case 1: return run(std::integral_constant<int, 1>());
    case 2: return run(std::integral_constant<int, 2>());
    case 3: return run(std::integral_constant<int, 3>());
    case 4: return run(std::integral_constant<int, 4>());
    case 5: return run(std::integral_constant<int, 5>());
    case 6: return run(std::integral_constant<int, 6>());
    case 7: return run(std::integral_constant<int, 7>());
    default: return run(std::integral_constant<int, 8>());
  }
}

template <int TOKENS>
void multiply_row(const Group* groups, int group_count, int tile_row, const float* x,
                  int64_t x_stride, const float* row_scales, int N, float* y, int64_t y_stride) {
  Floats sums[kRuns][TOKENS] = {};
  for (int g = 0; g < group_count; ++g, x += kGroupTiles * kRun)
    by_rate(groups[g].rate, [&](auto rate) {
      add_group<rate, TOKENS>(groups[g], tile_row, x, x_stride, sums);
    });
  for (int t = 0; t < TOKENS; ++t) {
    float total[kTile];
    for (int p = 0; p < kRuns; ++p) {
      float lanes[kLanes];
      std::memcpy(lanes, &sums[p][t], sizeof lanes);
      for (int half = kLanes / 2; half > 1; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      for (int i = 0; i < 2; ++i) total[row_of(p, i)] = lanes[i];
    }
    for (int r = 0; r < kTile && tile_row * kTile + r < N; ++r) {
      const int n = tile_row * kTile + r;
      y[t * y_stride + n] = row_scales[n] * total[r];
    }
  }
}

// A row of tiles of one group; out is its first row and column, row_scales of its first row.
template <int RATE>
__attribute__((noinline)) void decode_group(const Group& group, int tile_row, int rows, int columns,
                                            const float* row_scales, float* out, int64_t K) {
  const Strip<RATE> strip(group, tile_row);
  for (int c = 0; c < group.columns; ++c) {
    const int live = columns - c * kTile < kTile ? columns - c * kTile : kTile;
    for (int p = 0; p < kRuns; ++p) {
      float values[2][kPairs];
      for (int i = 0; i < kPairs; i += kLanes) {
        Floats even, odd;
        decode<RATE>(strip.at(c, p, i), even, odd);
        std::memcpy(values[0] + i, &even, sizeof even);
        std::memcpy(values[1] + i, &odd, sizeof odd);
      }
      for (int i = 0; i < 2 && row_of(p, i) < rows; ++i) {
        const int n = row_of(p, i);
        float row[kTile];
        for (int j = i; j < kPairs; j += 2)
          for (int odd = 0; odd < 2; ++odd)
            row[column_of(j) + odd] = row_scales[n] * (group.scale * values[odd][j]);
        float* to = out + n * K + c * kTile;
        if (live == kTile)
          std::memcpy(to, row, sizeof row);
        else
          std::memcpy(to, row, live * sizeof *row);
      }
    }
  }
}

}  // namespace

namespace {

// A group's columns times Sylvester's matrices of powers of two, over their square roots: the whole
// group, or of a shorter one the largest power that is left each time.
void rotate(float* v, int count) {
  for (int size = kGroup; count; v += size, count -= size) {
    while (size > count) size /= 2;
    const float factor = 1.0f / std::sqrt(static_cast<float>(size));
    for (int k = 0; k < size; ++k) v[k] *= factor;
    for (int step = 1; step < size; step *= 2)
      for (int i = 0; i < size; i += 2 * step)
        for (int j = i; j < i + step; ++j) {
          const float one = v[j], other = v[j + step];
          v[j] = one + other;
          v[j + step] = one - other;
        }
  }
}

// One group's inputs times its scale, as values lie: f32 [tile columns, 2, kPairs].
void lay(const float* x, int count, const Group& group, float* out) {
  float v[kGroup] = {};
  std::memcpy(v, x, count * sizeof *x);
  for (int c = 0; c < group.columns; ++c)
    for (int odd = 0; odd < 2; ++odd)
      for (int i = 0; i < kPairs; ++i)
        *out++ = group.scale * v[c * kTile + column_of(i) + odd];
}

int useful_threads(int threads, int64_t weights) {
  return static_cast<int>(std::clamp<int64_t>(weights / kThreadWeights, 1, threads));
}

}  // namespace

// x and out f32 [tokens, K]. order, i32 [K]: what is rotated is x[order[k]], and -x[~order[k]] where
// order[k] is negative.
extern "C" void bitmill_trellis_rotate(int tokens, int K, const float* x, const int32_t* order,
                                       float* out, int threads) {
  threads = useful_threads(threads, static_cast<int64_t>(tokens) * K * kRotationSteps);
#pragma omp parallel for num_threads(threads) collapse(2) if (threads > 1)
  for (int t = 0; t < tokens; ++t)
    for (int first = 0; first < K; first += kGroup) {
      const float* from = x + static_cast<int64_t>(t) * K;
      float* to = out + static_cast<int64_t>(t) * K + first;
      const int count = K - first < kGroup ? K - first : kGroup;
      for (int k = 0; k < count; ++k) {
        const int32_t at = order[first + k];
        to[k] = at < 0 ? -from[~at] : from[at];
      }
      rotate(to, count);
    }
}

// x f32 [tokens, K] in packed, rotated columns; row_scales f32 [N]; y f32 [tokens, N], its rows
// y_stride apart.
extern "C" void bitmill_trellis_multiply(const Group* groups, int group_count, int N, int K,
                                         int tokens, const float* x, const float* row_scales,
                                         float* y, int64_t y_stride, int threads) {
  const int rows = (N + kTile - 1) / kTile;
  threads = useful_threads(threads, static_cast<int64_t>(N) * K);
  const int64_t stride = static_cast<int64_t>(group_count) * kGroupTiles * kRun;
  std::vector<float> laid(tokens * stride);
#pragma omp parallel for num_threads(threads) collapse(2) if (tokens > 1)
  for (int t = 0; t < tokens; ++t)
    for (int g = 0; g < group_count; ++g) {
      const int first = g * kGroup, count = K - first < kGroup ? K - first : kGroup;
      lay(x + static_cast<int64_t>(t) * K + first, count, groups[g],
          laid.data() + t * stride + g * kGroupTiles * kRun);
    }
  for (int t = 0; t < tokens; t += kMaxTokens) {
    const auto multiply = tokens - t == 1   ? multiply_row<1>
                          : tokens - t == 2 ? multiply_row<2>
                          : tokens - t == 3 ? multiply_row<3>
                                            : multiply_row<kMaxTokens>;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int row = 0; row < rows; ++row)
      multiply(groups, group_count, row, laid.data() + t * stride, stride, row_scales, N,
               y + t * y_stride, y_stride);
  }
}

// out f32 [end_row - first_row, K]; first_row is a multiple of 16.
extern "C" void bitmill_trellis_decode(const Group* groups, int group_count, int first_row,
                                       int end_row, const float* row_scales, float* out, int64_t K,
                                       int threads) {
  const int first = first_row / kTile, last = (end_row + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = first; row < last; ++row) {
    int64_t column = 0;
    for (int g = 0; g < group_count; column += groups[g++].columns * kTile) {
      const int64_t n = static_cast<int64_t>(row) * kTile;
      by_rate(groups[g].rate, [&](auto rate) {
        decode_group<rate>(groups[g], row, end_row - n, K - column, row_scales + n,
                           out + (n - first_row) * K + column, K);
      });
    }
  }
}
