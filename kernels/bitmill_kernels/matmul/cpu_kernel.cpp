// Packed linears on a CPU, straight from the stored planes (layout.py).
//
//   bitmill_multiply:   y[t, n] = sum_g scale[g, n] * (sum_k code[n, k] * x[t, k]
//                                                      - zero[g, n] * sum_k x[t, k])
//   bitmill_dequantize: w[n, k] = scale[g, n] * (code[n, k] - zero[g, n])
//
// x is fp32 in packed column order, each group padded with zeros to 128 columns. A plane of w bits
// holds, in byte i and field j, column j*L + i: 16 consecutive bytes are, field by field, 16
// consecutive columns. A vector of codes is made once and multiplied with all tokens.
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

// 2^exponent, of a small one.
constexpr float power(int exponent) {
  return exponent < 0 ? 1.0f / (1 << -exponent) : static_cast<float>(1 << exponent);
}

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// sums[t] += scale * code . x[t] over one row of a full group of width LOW + HIGH.
//
// Fields are masked where they lie in their byte. The low plane's are so 2^(LOW * field) too large,
// which x has been divided by beforehand (`field_factors` in cpu.py), and the high plane's are
// brought to the same scale. All factors are powers of two, so nothing is rounded.
template <int LOW, int HIGH, int TOKENS>
inline void add_row(const uint8_t* low, const uint8_t* high, const float* x, float scale,
                    Floats* sums) {
  constexpr int kLowBytes = kGroupSize * LOW / 8, kHighBytes = kGroupSize * HIGH / 8;
  Ints high_part[HIGH ? kHighBytes / kLanes : 1];
  for (int i = 0; i < kHighBytes; i += kLanes) high_part[i / kLanes] = widen(high + i);
  Floats part[TOKENS] = {};
#pragma GCC unroll 32
  for (int i = 0; i < kLowBytes; i += kLanes) {
    const Ints low_part = widen(low + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / LOW; ++j) {
      const int column = j * kLowBytes + i;
      Floats codes = __builtin_convertvector(low_part & (((1 << LOW) - 1) << (LOW * j)), Floats);
      if constexpr (HIGH != 0) {
        const int field = column / kHighBytes;
        const Ints bits = high_part[column % kHighBytes / kLanes] &
                          (((1 << HIGH) - 1) << (HIGH * field));
        codes += __builtin_convertvector(bits, Floats) * power(LOW * (j + 1) - HIGH * field);
      }
#pragma GCC unroll 8
      for (int t = 0; t < TOKENS; ++t) part[t] += codes * load(x + t * kGroupSize + column);
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < TOKENS; ++t) sums[t] += part[t] * scale;
}

// The same over a last group of fewer columns, plane by plane; x as it is.
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

// Not inline: in one large function GCC keeps sums in memory.
template <int LOW, int HIGH, int TOKENS>
__attribute__((noinline)) void add_rows(const Group& group, int first_row, int end_row,
                                        const float* x, Floats (*sums)[TOKENS]) {
  for (int n = first_row; n < end_row; ++n) {
    add_row<LOW, HIGH, TOKENS>(group.planes[0] + static_cast<int64_t>(n) * group.bytes[0],
                               group.planes[1] + static_cast<int64_t>(n) * group.bytes[1], x,
                               to_float(group.scales[n]), sums[n - first_row]);
  }
}

template <int TOKENS>
void add_group(const Group& group, int first_row, int end_row, const float* x,
               Floats (*sums)[TOKENS]) {
  if (group.columns != kGroupSize) {
    for (int n = first_row; n < end_row; ++n) {
      add_tail_row<TOKENS>(group, n, x, to_float(group.scales[n]), sums[n - first_row]);
    }
    return;
  }
  const auto add = [&](auto rows) { rows(group, first_row, end_row, x, sums); };
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
  float offset[kBlockRows][TOKENS] = {};
  for (int g = 0; g < group_count; ++g) {
    const Group& group = groups[g];
    if (!group.planes[0]) continue;
    add_group<TOKENS>(group, first_row, end_row, x + group.first * TOKENS, sums);
    for (int n = first_row; n < end_row; ++n) {
      const float scale = to_float(group.scales[n]);
      const float zero = scale * static_cast<float>(group.zeros[n]) / group.zero_steps;
      for (int t = 0; t < TOKENS; ++t) {
        offset[n - first_row][t] += zero * sums_of_x[g * TOKENS + t];
      }
    }
  }
  for (int n = first_row; n < end_row; ++n) {
    for (int t = 0; t < TOKENS; ++t) {
      y[t * y_stride + n] = total_of(sums[n - first_row][t]) - offset[n - first_row][t];
    }
  }
}

using Multiply = void (*)(const Group*, int, int, int, const float*, const float*, float*, int64_t);
constexpr Multiply kMultiply[] = {multiply_block<1>, multiply_block<2>, multiply_block<3>,
                                  multiply_block<4>, multiply_block<5>, multiply_block<6>,
                                  multiply_block<7>, multiply_block<8>};

}  // namespace

// x f32 [groups, tokens, 128], times field_factors (cpu.py), sums_of_x f32 [groups, tokens] of x
// before that, y f32 [tokens, N]; 1 to 8 tokens.
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
