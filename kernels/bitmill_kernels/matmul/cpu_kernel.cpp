// Packed linears on a CPU, straight from the stored planes (layout.py).
//
//   bitmill_multiply:   y[t, n] = sum_g scale[g, n] * (sum_k code[n, k] * x[t, k]
//                                                      - zero[g, n] * sum_k x[t, k])
//   bitmill_dequantize: w[n, k] = scale[g, n] * (code[n, k] - zero[g, n])
//
// x is fp32 in packed column order, each group padded with zeros to 128 columns. A plane of w bits
// holds, in byte i and field j, column j*L + i: 16 consecutive bytes are, field by field, 16
// consecutive columns. A vector of codes is made once and multiplied with all tokens, a vector of x
// is loaded once for kRows rows.
// Rows go by blocks, a block's groups in turn, so scales and planes are read in order and the
// block's sums stay in the first cache.

#include <cstdint>
#include <cstring>

#include "../vectors.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

constexpr int kBlockRows = 32;
constexpr int kGroupSize = 128;

// Rows whose sums for all tokens leave half of the registers free.
#if defined(__AVX512F__)
template <int TOKENS>
constexpr int kRows = 2;
#elif defined(__AVX2__)
template <int TOKENS>
constexpr int kRows = TOKENS <= 4 ? 2 : 1;
#else
template <int TOKENS>
constexpr int kRows = 1;
#endif

}  // namespace

struct Group {
  // low, high or null, both null for a dropped group; row n starts at n * bytes[plane]
  const uint8_t* planes[2];
  int32_t bits[2];
  int32_t bytes[2];
  const uint16_t* scales;  // fp16 [N]
  const uint8_t* zeros;    // [N], in units of 1 / zero_steps
  int32_t zero_steps;
  int32_t columns;
  int64_t first;  // of the group in padded x
};

namespace {

// Non-negative finite fp16, subnormals included.
inline float to_float(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 13;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value * 0x1p112f;
}

inline float total_of(Floats v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// kLanes bytes as integers; compilers turn the portable loop into scalar inserts.
inline Ints widen(const uint8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Ints>(
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<Ints>(
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(__ARM_NEON)
  uint32_t word;
  std::memcpy(&word, from, sizeof word);
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(word));
  return reinterpret_cast<Ints>(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
#else
  Ints wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = from[i];
  return wide;
#endif
}

// ((index >> first) mod 2^BITS) * 2^exponent of every index.
template <int BITS>
inline Floats table(int first, int exponent) {
  Floats values;
  for (int i = 0; i < kLanes; ++i) {
    values[i] = static_cast<float>(((i >> first) & ((1 << BITS) - 1)) << exponent);
  }
  return values;
}

// Field j of each of `widen`'s bytes, times 2^EXPONENT. Where a permutation looks up its lowest 4
// (AVX-512) or 2 bits (AVX2), fields within these need neither mask nor conversion.
template <int BITS, int EXPONENT>
inline Floats field(Ints bytes, int j) {
  const int start = BITS * j;
#if defined(__AVX512F__)
  if constexpr (BITS <= 4) {
    const Ints index = start < 4 ? bytes : bytes >> 4;
    return reinterpret_cast<Floats>(
        _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index),
                              reinterpret_cast<__m512>(table<BITS>(start % 4, EXPONENT))));
  }
#elif defined(__AVX2__)
  if constexpr (BITS <= 2) {
    const Ints index = start < 2 ? bytes : bytes >> (start & ~1);
    return reinterpret_cast<Floats>(
        _mm256_permutevar_ps(reinterpret_cast<__m256>(table<BITS>(start % 2, EXPONENT)),
                             reinterpret_cast<__m256i>(index)));
  }
#endif
  Ints value = start > EXPONENT ? bytes >> (start - EXPONENT) : bytes << (EXPONENT - start);
  if (EXPONENT != 0 || start + BITS < 8) value &= ((1 << BITS) - 1) << EXPONENT;
  return __builtin_convertvector(value, Floats);
}

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// sums[r][t] += scales[r] * code[r] . x[t] over ROWS rows of a full group of width LOW + HIGH.
template <int LOW, int HIGH, int ROWS, int TOKENS>
inline __attribute__((always_inline)) void add_tile(const uint8_t* const* low,
                                                    const uint8_t* const* high, const float* x,
                                                    const float* scales, Floats (*sums)[TOKENS]) {
  constexpr int kLowBytes = kGroupSize * LOW / 8, kHighBytes = kGroupSize * HIGH / 8;
  Ints high_part[ROWS][HIGH ? kHighBytes / kLanes : 1];
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kHighBytes; i += kLanes) high_part[r][i / kLanes] = widen(high[r] + i);
  }
  Floats part[ROWS][TOKENS] = {};
#pragma GCC unroll 32
  for (int i = 0; i < kLowBytes; i += kLanes) {
    Ints low_part[ROWS];
#pragma GCC unroll 2
    for (int r = 0; r < ROWS; ++r) low_part[r] = widen(low[r] + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / LOW; ++j) {
      const int column = j * kLowBytes + i;
      Floats codes[ROWS];
#pragma GCC unroll 2
      for (int r = 0; r < ROWS; ++r) {
        codes[r] = field<LOW, 0>(low_part[r], j);
        if constexpr (HIGH != 0) {
          const Ints bytes = high_part[r][column % kHighBytes / kLanes];
          codes[r] += field<HIGH, LOW>(bytes, column / kHighBytes);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) {
        const Floats inputs = load(x + t * kGroupSize + column);
#pragma GCC unroll 2
        for (int r = 0; r < ROWS; ++r) part[r][t] += codes[r] * inputs;
      }
    }
  }
#pragma GCC unroll 2
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
    for (int t = 0; t < TOKENS; ++t) sums[r][t] += part[r][t] * scales[r];
  }
}

// The same over one row of a last group of fewer columns, plane by plane.
template <int TOKENS>
inline void add_tail_row(const Group& group, int n, const float* x, float scale, Floats* sums) {
  for (int p = 0; p < 2 && group.planes[p]; ++p) {
    const int bits = group.bits[p], bytes = group.bytes[p];
    const uint8_t* row = group.planes[p] + static_cast<int64_t>(n) * bytes;
    for (int i = 0; i < bytes; ++i) {
      for (int j = 0; j < 8 / bits; ++j) {
        const float code = static_cast<float>((row[i] >> (bits * j)) & ((1 << bits) - 1));
        for (int t = 0; t < TOKENS; ++t) {
          sums[t][0] += scale * code * x[t * kGroupSize + j * bytes + i];
        }
      }
    }
    scale *= static_cast<float>(1 << bits);
  }
}

// Asks for `count` rows of a group. Always inline: GCC takes a function of this kind for one without
// effect, and drops its calls.
inline __attribute__((always_inline)) void prefetch(const Group& group, int row, int count) {
  for (int p = 0; p < 2; ++p) {
    const uint8_t* from = group.planes[p] + static_cast<int64_t>(row) * group.bytes[p];
    for (int i = 0; i < count * group.bytes[p]; i += 64) __builtin_prefetch(from + i);
  }
}

// `next` or null: the group that comes next. Its rows lie far from this group's, and the processor
// sees too few rows ahead to hide the wait for them.
// A block that ends within a tile has its last row again, with scale 0.
// Not inline: in one large function GCC keeps sums in memory.
template <int LOW, int HIGH, int TOKENS>
__attribute__((noinline)) void add_rows(const Group& group, int first_row, int end_row,
                                        const float* x, const float* scales,
                                        Floats (*sums)[TOKENS], const Group* next) {
  constexpr int kTile = kRows<TOKENS>;
  for (int n = first_row; n < end_row; n += kTile) {
    if (next) prefetch(*next, n, kTile);
    const uint8_t *low[kTile], *high[kTile];
    for (int r = 0; r < kTile; ++r) {
      const int64_t row = n + r < end_row ? n + r : end_row - 1;
      low[r] = group.planes[0] + row * group.bytes[0];
      high[r] = group.planes[1] + row * group.bytes[1];
    }
    add_tile<LOW, HIGH, kTile>(low, high, x, scales + n - first_row, sums + n - first_row);
  }
}

template <int TOKENS>
void add_group(const Group& group, int first_row, int end_row, const float* x, const float* scales,
               Floats (*sums)[TOKENS], const Group* next) {
  if (group.columns != kGroupSize) {
    for (int n = first_row; n < end_row; ++n) {
      add_tail_row<TOKENS>(group, n, x, scales[n - first_row], sums[n - first_row]);
    }
    return;
  }
  const auto add = [&](auto rows) { rows(group, first_row, end_row, x, scales, sums, next); };
  switch (group.bits[0] + (group.planes[1] ? group.bits[1] : 0)) {
    case 1: return add(add_rows<1, 0, TOKENS>);
    case 2: return add(add_rows<2, 0, TOKENS>);
    case 3: return add(add_rows<2, 1, TOKENS>);
    case 4: return add(add_rows<4, 0, TOKENS>);
    case 5: return add(add_rows<4, 1, TOKENS>);
    case 6: return add(add_rows<4, 2, TOKENS>);
    default: return add(add_rows<8, 0, TOKENS>);
  }
}

template <int TOKENS>
void multiply_block(const Group* groups, int group_count, int first_row, int end_row,
                    const float* x, const float* sums_of_x, float* y, int64_t y_stride) {
  Floats sums[kBlockRows][TOKENS] = {};
  // Tokens outside, so that rows are the lanes of a vector.
  float offsets[TOKENS][kBlockRows] = {};
  float scales[kBlockRows] = {}, zeros[kBlockRows];
  const int rows = end_row - first_row;
  for (int g = 0; g < group_count; ++g) {
    const Group& group = groups[g];
    if (!group.planes[0]) continue;
    const float step = 1.0f / static_cast<float>(group.zero_steps);
    for (int n = 0; n < rows; ++n) {
      scales[n] = to_float(group.scales[first_row + n]);
      zeros[n] = scales[n] * static_cast<float>(group.zeros[first_row + n]) * step;
    }
    for (int t = 0; t < TOKENS; ++t) {
      const float sum_of_x = sums_of_x[g * TOKENS + t];
      for (int n = 0; n < rows; ++n) offsets[t][n] += zeros[n] * sum_of_x;
    }
    add_group<TOKENS>(group, first_row, end_row, x + group.first * TOKENS, scales, sums,
                      g + 1 < group_count ? &groups[g + 1] : nullptr);
  }
  for (int n = first_row; n < end_row; ++n) {
    for (int t = 0; t < TOKENS; ++t) {
      y[t * y_stride + n] = total_of(sums[n - first_row][t]) - offsets[t][n - first_row];
    }
  }
}

using Multiply = void (*)(const Group*, int, int, int, const float*, const float*, float*, int64_t);
constexpr Multiply kMultiply[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>,
                                  multiply_block<4>, multiply_block<5>, multiply_block<6>,
                                  multiply_block<7>, multiply_block<8>};

}  // namespace

// x f32 [groups, tokens, 128], sums_of_x f32 [groups, tokens], y f32 [tokens, N]; 1 to 8 tokens.
extern "C" void bitmill_multiply(const Group* groups, int group_count, int N, int tokens,
                                 const float* x, const float* sums_of_x, float* y, int threads) {
  const int blocks = (N + kBlockRows - 1) / kBlockRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int block = 0; block < blocks; ++block) {
    const int first = block * kBlockRows, end = first + kBlockRows < N ? first + kBlockRows : N;
    kMultiply[tokens - 1](groups, group_count, first, end, x, sums_of_x, y, N);
  }
}

// out f32 [end_row - first_row, K] in packed column order.
extern "C" void bitmill_dequantize(const Group* groups, int group_count, int first_row,
                                   int end_row, float* out, int64_t K, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int n = first_row; n < end_row; ++n) {
    float* to = out + (n - first_row) * K;
    for (int g = 0; g < group_count; ++g) {
      const Group& group = groups[g];
      const float scale = to_float(group.scales[n]);
      const float zero = static_cast<float>(group.zeros[n]) / group.zero_steps;
      if (!group.planes[0]) std::memset(to, 0, group.columns * sizeof *to);
      float weight = 1.0f;
      for (int p = 0; p < 2 && group.planes[p]; ++p) {
        const int bytes = group.bytes[p], bits = group.bits[p];
        const uint8_t* row = group.planes[p] + static_cast<int64_t>(n) * bytes;
        for (int start = 0, shift = 0; start < group.columns; start += bytes, shift += bits) {
          const int live = group.columns - start < bytes ? group.columns - start : bytes;
          for (int i = 0; i < live; ++i) {
            const float code = weight * static_cast<float>((row[i] >> shift) & ((1 << bits) - 1));
            to[start + i] = p == 0 ? code : to[start + i] + code;
          }
        }
        weight = static_cast<float>(1 << bits);
      }
      for (int k = 0; k < group.columns; ++k) to[k] = scale * (to[k] - zero);
      to += group.columns;
    }
  }
}
