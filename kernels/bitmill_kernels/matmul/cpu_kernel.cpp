// Packed linears on a CPU, straight from the stored planes (layout.py).
//
//   bitmill_multiply:   y[t, n] = sum_g scale[g, n] * (sum_k code[n, k] * x[t, k]
//                                                      - zero[g, n] * sum_k x[t, k])
//   bitmill_dequantize: w[n, k] = scale[g, n] * (code[n, k] - zero[g, n])
//
// x is fp32 in packed column order, each group padded with zeros to whole plane bytes. A plane of
// w bits holds, in byte i and field j, column j*L + i: 16 consecutive bytes are, field by field,
// 16 consecutive columns. Planes are multiplied one by one, since the product is linear in them.
// Vectors are the compiler's own, so one source serves AVX-512, AVX2 and NEON.
// Rows go by blocks, a block's groups in turn, so scales and planes are read in order and the
// block's sums stay in the first cache.

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

constexpr int kBlockRows = 32;
constexpr int kMaxTokens = 4;

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

inline Floats load(const float* from) {
  Floats v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

// sums[t] += scale * code . x[t] over one row of one plane of W bits, `bytes` long.
template <int W, int TOKENS>
inline void add_row(const uint8_t* row, int bytes, const float* x, int64_t x_stride, float scale,
                    Floats* sums) {
  constexpr int kMask = (1 << W) - 1;
  Floats part[TOKENS] = {};
  int i = 0;
  for (; i + kLanes <= bytes; i += kLanes) {
    const Ints wide = widen(row + i);
#pragma GCC unroll 8
    for (int j = 0; j < 8 / W; ++j) {
      const Floats codes = __builtin_convertvector((wide >> (W * j)) & kMask, Floats);
#pragma GCC unroll 4
      for (int t = 0; t < TOKENS; ++t) part[t] += codes * load(x + t * x_stride + j * bytes + i);
    }
  }
  for (; i < bytes; ++i) {
    for (int j = 0; j < 8 / W; ++j) {
      const float code = static_cast<float>((row[i] >> (W * j)) & kMask);
      for (int t = 0; t < TOKENS; ++t) part[t][0] += code * x[t * x_stride + j * bytes + i];
    }
  }
  for (int t = 0; t < TOKENS; ++t) sums[t] += part[t] * scale;
}

template <int TOKENS>
inline void add_plane_row(int bits, const uint8_t* row, int bytes, const float* x,
                          int64_t x_stride, float scale, Floats* sums) {
  switch (bits) {
    case 1: return add_row<1, TOKENS>(row, bytes, x, x_stride, scale, sums);
    case 2: return add_row<2, TOKENS>(row, bytes, x, x_stride, scale, sums);
    case 4: return add_row<4, TOKENS>(row, bytes, x, x_stride, scale, sums);
    default: return add_row<8, TOKENS>(row, bytes, x, x_stride, scale, sums);
  }
}

template <int TOKENS>
void multiply_block(const Group* groups, int group_count, int first_row, int end_row,
                    const float* x, int64_t x_stride, const float* sums_of_x, float* y,
                    int64_t y_stride) {
  Floats sums[kBlockRows][TOKENS] = {};
  float offset[kBlockRows][TOKENS] = {};
  for (int g = 0; g < group_count; ++g) {
    const Group& group = groups[g];
    if (!group.planes[0]) continue;
    for (int n = first_row; n < end_row; ++n) {
      const float scale = to_float(group.scales[n]);
      const float zero = scale * static_cast<float>(group.zeros[n]) / group.zero_steps;
      float weight = scale;
      for (int p = 0; p < 2 && group.planes[p]; ++p) {
        const uint8_t* row = group.planes[p] + static_cast<int64_t>(n) * group.bytes[p];
        add_plane_row<TOKENS>(group.bits[p], row, group.bytes[p], x + group.first, x_stride, weight,
                              sums[n - first_row]);
        weight = scale * static_cast<float>(1 << group.bits[p]);
      }
      for (int t = 0; t < TOKENS; ++t) {
        offset[n - first_row][t] += zero * sums_of_x[t * group_count + g];
      }
    }
  }
  for (int n = first_row; n < end_row; ++n) {
    for (int t = 0; t < TOKENS; ++t) {
      y[t * y_stride + n] = total_of(sums[n - first_row][t]) - offset[n - first_row][t];
    }
  }
}

}  // namespace

// x f32 [tokens, x_stride], sums_of_x f32 [tokens, groups], y f32 [tokens, N]; 1 to 4 tokens.
extern "C" void bitmill_multiply(const Group* groups, int group_count, int N, int tokens,
                                 const float* x, int64_t x_stride, const float* sums_of_x, float* y,
                                 int threads) {
  const int blocks = (N + kBlockRows - 1) / kBlockRows;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int block = 0; block < blocks; ++block) {
    const int first = block * kBlockRows, end = first + kBlockRows < N ? first + kBlockRows : N;
    const auto multiply = tokens == 1   ? multiply_block<1>
                          : tokens == 2 ? multiply_block<2>
                          : tokens == 3 ? multiply_block<3>
                                        : multiply_block<kMaxTokens>;
    multiply(groups, group_count, first, end, x, x_stride, sums_of_x, y, N);
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
