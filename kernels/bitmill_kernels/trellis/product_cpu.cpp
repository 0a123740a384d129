// Linears in trellis codes on a CPU, straight from their circles (layout.py, code.py).
//
//   bitmill_trellis_multiply:  y[t, n] = row_scale[n] * sum_k x[t, k] * group_scale[g] * value[n, k]
//   bitmill_trellis_decode:    w[n, k] = row_scale[n] * group_scale[g] * value[n, k]
//
// Values are looked up by state in a table of half a megabyte, which the second cache holds. The
// values of 8 lanes are 32 in a row, of two rows and 16 columns; x is laid out as they are, so that
// whole vectors are multiplied, and a tile's sums stay vectors until the last group.

#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kTile = 16, kValues = 256, kPairs = 8, kRun = 32, kMaxTokens = 4;
typedef float Floats __attribute__((vector_size(4 * kRun)));

// Row, and column, in the tile of value i of a circle.
inline int row_of(int i) { return i / 32 + 8 * (i / 2 % 2); }
inline int column_of(int i) { return 2 * (i / 8 % 4) + 8 * (i / 4 % 2) + i % 2; }

}  // namespace

struct Group {
  const uint8_t* circles;  // [tile rows][columns][32 rate]
  int32_t rate;
  int32_t columns;  // of tiles
  float scale;
};

namespace {

// Values f32 [256] of a circle. Compilers that gather the look-ups make it several times slower.
template <int B, int V>
#if defined(__GNUC__) && !defined(__clang__)
__attribute__((optimize("no-tree-vectorize")))
#endif
void decode(const uint8_t* circle, const float* table, float* values) {
  constexpr int kSteps = kValues / V, kBytes = kSteps * B / 8;
  uint8_t bits[kBytes + 8];
  std::memcpy(bits, circle, kBytes);
  std::memcpy(bits + kBytes, circle, 8);
#pragma GCC unroll 8
  for (int t = 0; t < kSteps; ++t) {
    uint32_t word;
    std::memcpy(&word, bits + (t * B >> 3), 4);
    const uint32_t state = (word >> (t * B & 7)) & 0xffff;
    std::memcpy(values + t * V, table + state * V, 4 * V);
  }
}

inline void decode(const Group& group, const uint8_t* circle, const float* pairs,
                   const float* singles, float* values) {
  switch (group.rate) {
    case 1: return decode<2, 2>(circle, pairs, values);
    case 2: return decode<4, 2>(circle, pairs, values);
    case 3: return decode<6, 2>(circle, pairs, values);
    case 4: return decode<8, 2>(circle, pairs, values);
    case 5: return decode<5, 1>(circle, singles, values);
    case 6: return decode<6, 1>(circle, singles, values);
    case 7: return decode<7, 1>(circle, singles, values);
    default: return decode<8, 1>(circle, singles, values);
  }
}

template <int TOKENS>
void multiply_row(const Group* groups, int group_count, int tile_row, const float* x,
                  int64_t x_stride, const float* pairs, const float* singles,
                  const float* row_scales, int N, float* y) {
  Floats sums[TOKENS][kPairs] = {};
  alignas(64) float values[kValues];
  for (int g = 0; g < group_count; ++g) {
    const Group& group = groups[g];
    const int bytes = 32 * group.rate;
    const uint8_t* circle = group.circles + static_cast<int64_t>(tile_row) * group.columns * bytes;
    for (int c = 0; c < group.columns; ++c, circle += bytes, x += kRun) {
      decode(group, circle, pairs, singles, values);
      Floats at[TOKENS];
      for (int t = 0; t < TOKENS; ++t) std::memcpy(&at[t], x + t * x_stride, sizeof at[t]);
      for (int p = 0; p < kPairs; ++p) {
        Floats v;
        std::memcpy(&v, values + p * kRun, sizeof v);
        for (int t = 0; t < TOKENS; ++t) sums[t][p] += v * at[t];
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    float total[kTile] = {};
    for (int i = 0; i < kValues; ++i) total[row_of(i)] += sums[t][i / kRun][i % kRun];
    for (int r = 0; r < kTile && tile_row * kTile + r < N; ++r) {
      const int n = tile_row * kTile + r;
      y[static_cast<int64_t>(t) * N + n] = row_scales[n] * total[r];
    }
  }
}

}  // namespace

// x f32 [tokens, tile columns, 32]: columns of a tile as values lie, times the group's scale; pairs
// f32 [65536, 2], singles f32 [65536]; row_scales f32 [N]; y f32 [tokens, N]; 1 to 4 tokens.
extern "C" void bitmill_trellis_multiply(const Group* groups, int group_count, int N, int tokens,
                                         const float* x, int64_t x_stride, const float* pairs,
                                         const float* singles, const float* row_scales, float* y,
                                         int threads) {
  const int rows = (N + kTile - 1) / kTile;
  const auto multiply = tokens == 1   ? multiply_row<1>
                        : tokens == 2 ? multiply_row<2>
                        : tokens == 3 ? multiply_row<3>
                                      : multiply_row<kMaxTokens>;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = 0; row < rows; ++row)
    multiply(groups, group_count, row, x, x_stride, pairs, singles, row_scales, N, y);
}

// out f32 [end_row - first_row, K]; first_row is a multiple of 16.
extern "C" void bitmill_trellis_decode(const Group* groups, int group_count, int first_row,
                                       int end_row, const float* pairs, const float* singles,
                                       const float* row_scales, float* out, int64_t K,
                                       int threads) {
  const int first = first_row / kTile, last = (end_row + kTile - 1) / kTile;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int row = first; row < last; ++row) {
    float values[kValues];
    int64_t column = 0;
    for (int g = 0; g < group_count; ++g) {
      const Group& group = groups[g];
      const int bytes = 32 * group.rate;
      const uint8_t* circle = group.circles + static_cast<int64_t>(row) * group.columns * bytes;
      for (int c = 0; c < group.columns; ++c, circle += bytes, column += kTile) {
        decode(group, circle, pairs, singles, values);
        for (int i = 0; i < kValues; ++i) {
          const int64_t n = row * kTile + row_of(i), k = column + column_of(i);
          if (n < end_row && k < K)
            out[(n - first_row) * K + k] = row_scales[n] * (group.scale * values[i]);
        }
      }
    }
  }
}
