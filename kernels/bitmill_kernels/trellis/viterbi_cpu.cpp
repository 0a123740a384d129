// The best circles for tiles on a CPU (code.py): Viterbi's algorithm over all states.
//
// State s_t = (s_{t-1} >> B) | (new << R), R = 16 - B: the lower R bits of a state are the upper R
// bits of the one before. So of all states with the same upper bits j only the cheapest is kept:
//
//   kept_t[j] = min over o of  kept_{t-1}[(j << B | o) mod 2^R] + |x_t - s_t v(j << B | o)|^2
//
// where s_t is the emphasis of the row of x_t, which x_t has been multiplied by.
// Kept costs of all steps stay; on the way back the o of a step is found again from those before.
// Two runs make a circle: one over the steps around its seam, free at both ends, gives the bits
// across the seam; the second goes around from there to there.
//
// With j = new << (R - B) | read, all 2^B new bits read the same 2^B kept costs. They lie in the
// lanes of a vector, so lanes share a kept cost, and kTiles tiles what is read of the table.
//
// Costs are less the least one of the step before, so that one far target takes no precision from
// those behind it. With AVX-512 FP16 they are halves of a word, and the way back compares in fp32.
// Elsewhere they are fp32, and two values a state cost s^2 (|v|^2 - 2 v x / s) + |x|^2, where
// kept costs are divided by s^2 before, and what does not depend on the state is added to the least
// of them. Vectors are the compiler's, so one source serves AVX-512, AVX2 and NEON.

#if defined(BITMILL_HALVES) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#pragma GCC target("avx512fp16")
#define HALVES
#endif

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int kTiles = 4, kRows = 16, kValues = 256, kStateBits = 16;

// Row in the tile of value i of a circle (code.py).
constexpr int row(int i) { return i / 32 + 8 * (i / 2 % 2); }

// What costs are computed in. kMost: more than any cost; kNever: that of states where no path may
// begin.
#ifdef HALVES
typedef _Float16 Real;
typedef Real Vector __attribute__((vector_size(64)));
typedef int16_t Numbers __attribute__((vector_size(64)));
constexpr Real kMost = 65504, kNever = 30000;
#else
typedef float Real;
typedef Floats Vector;
typedef Ints Numbers;
constexpr Real kMost = FLT_MAX, kNever = 1e30f;
#endif
constexpr bool kHalved = sizeof(Real) == 2;
constexpr int kWide = sizeof(Vector) / sizeof(Real);

template <int B, int V>
class Search {
  static constexpr int R = kStateBits - B, kCount = 1 << R, kOlds = 1 << B, kRead = kCount >> B;
  static constexpr int kSteps = kValues / V, kParts = V == 2 && !kHalved ? 3 : V;
  static constexpr int kReads = std::max(1, kWide >> B);  // of `read` in the lanes of a vector
  static constexpr int kApart = kRead / kReads;           // from one of them to the next
  static constexpr int kVectors = kReads * kOlds / kWide;
  static constexpr int kTogether = std::min(kVectors, sizeof(Vector) == 64 ? 4 : 2);
  static_assert(kRead > 0);
  const float* table_;            // [2^16][V]
  const Vector* laid_;            // [kApart][kVectors / kTogether][kOlds][kTogether][kParts]
  std::unique_ptr<Real[]> kept_;  // [kSteps + 1][kTiles][kCount], at place(j)
  Real least_[kTiles];            // of the last step

  static constexpr unsigned place(unsigned j) {
    const unsigned read = j % kRead, of = kReads == 1 ? 0 : read / kApart;
    return (read % kApart * kReads + of) << B | j / kRead;
  }

  Real* kept(int t, int tile) {
    return &kept_[(static_cast<int64_t>(t) * kTiles + tile) * kCount];
  }

  // Kept costs of step t + 1 from those of step t, for x [kTiles][V] and their emphasis [kTiles].
  void forward(int t, const float (*x)[V], const float* emphasis) {
    Real at[kTiles][V], last[kTiles] = {}, weight[kTiles], part[kTiles];
    const Real* old[kTiles];
    Vector least[kTiles];
    for (int k = 0; k < kTiles; ++k) {
      old[k] = kept(t, k);
      least[k] = Vector{} + kMost;
      weight[k] = kParts > V ? emphasis[k] * emphasis[k] : emphasis[k];
      part[k] = 1 / weight[k];
      for (int i = 0; i < V; ++i) {
        at[k][i] = kParts > V ? -2 * x[k][i] / emphasis[k] : x[k][i];
        if (kParts > V) last[k] += x[k][i] * x[k][i];
      }
      last[k] -= least_[k];
    }
    const Vector* v = laid_;
    in_turn([&](int read) {
      for (int first = 0; first < kVectors; first += kTogether) {
        Vector best[kTiles][kTogether];
        for (auto& of_tile : best)
          for (Vector& one : of_tile) one = Vector{} + kMost;
        for (int o = 0; o < kOlds; ++o, v += kTogether * kParts) {
          Vector from[kTiles];
#pragma GCC unroll 8
          for (int k = 0; k < kTiles; ++k) {
            from[k] = before(old[k], read, o);
            if (kParts > V) from[k] *= part[k];
          }
#pragma GCC unroll 8
          for (int n = 0; n < kTogether; ++n) {
#pragma GCC unroll 8
            for (int k = 0; k < kTiles; ++k) {
              Vector cost = from[k];
              if (kParts > V) {
                cost = v[3 * n + 2] + v[3 * n] * at[k][0];
                cost += v[3 * n + 1] * at[k][V - 1];
                cost += from[k];
              } else {
                for (int i = 0; i < V; ++i) {
                  const Vector d = at[k][i] - v[V * n + i] * weight[k];
                  cost += d * d;
                }
              }
              best[k][n] = cost < best[k][n] ? cost : best[k][n];
            }
          }
        }
        for (int k = 0; k < kTiles; ++k)
          for (int n = 0; n < kTogether; ++n) {
            const Vector next = (kParts > V ? best[k][n] * weight[k] : best[k][n]) + last[k];
            least[k] = next < least[k] ? next : least[k];
            std::memcpy(kept(t + 1, k) + place(read) + (first + n) * kWide, &next, sizeof next);
          }
      }
    });
    for (int k = 0; k < kTiles; ++k) {
      least_[k] = least[k][0];
      for (int l = 1; l < kWide; ++l) least_[k] = std::min(least_[k], Real(least[k][l]));
    }
  }

  // The first of all that vectors hold of `read`. Those follow each other whose kept costs lie in
  // the same cache lines.
  template <class Each>
  static void in_turn(Each each) {
    constexpr int kLines = std::max(1, kApart >> B);
    for (int first = 0; first < kLines; ++first)
      for (int read = first; read < kApart; read += kLines) each(read);
  }

  // What the lanes read of old bits o: kOlds of them the same.
  static Vector before(const Real* kept, int read, int o) {
    const Real* first = kept + place(read << B | o);
    if (kReads == 1) return Vector{} + *first;
    Vector found;
    Numbers which;
    std::memcpy(&found, first, sizeof found);
    for (int l = 0; l < kWide; ++l) which[l] = place((l / kOlds * kApart) << B);
    return __builtin_shuffle(found, which);
  }

  void run(const float* x, const float* emphasis, int first, int steps) {
    std::fill_n(least_, kTiles, Real(0));
    for (int t = 0; t < steps; ++t) {
      const int at = (first + t) % kSteps * V;
      float now[kTiles][V], counts[kTiles];
      for (int k = 0; k < kTiles; ++k) {
        for (int i = 0; i < V; ++i) now[k][i] = x[k * kValues + at + i];
        counts[k] = emphasis[k * kRows + row(at)];
      }
      forward(t, now, counts);
    }
  }

  // The old bits behind j at step t, for value `at` of a tile with x [kValues], emphasis [kRows].
  int old(int t, int tile, int j, const float* x, const float* emphasis, int at) {
    const float s = emphasis[row(at)];
    const Real* from = kept(t, tile);
    const float* v = table_ + static_cast<int64_t>(j) * kOlds * V;
    float costs[kOlds], best = FLT_MAX;
    for (int o = 0; o < kOlds; ++o) {
      costs[o] = from[place((j << B | o) & (kCount - 1))];
      for (int i = 0; i < V; ++i) {
        const float d = x[at + i] - s * v[o * V + i];
        costs[o] += d * d;
      }
    }
    for (const float cost : costs) best = std::min(best, cost);
    return static_cast<int>(std::find(costs, costs + kOlds - 1, best) - costs);
  }

 public:
  Search(const float* table, const Vector* laid)
      : table_(table),
        laid_(laid),
        kept_(new Real[static_cast<size_t>(kSteps + 1) * kTiles * kCount + kWide]) {}

  // What `forward` reads of the table, in the sequence of its reading.
  static std::vector<Vector> laid_out(const float* table) {
    std::vector<Vector> laid;
    laid.reserve((kParts << kStateBits) / kWide);
    in_turn([&](int read) {
      for (int first = 0; first < kVectors; first += kTogether)
        for (int o = 0; o < kOlds; ++o)
          for (int n = first; n < first + kTogether; ++n) {
            Vector parts[kParts];
            for (int l = 0; l < kWide; ++l) {
              const int place = n * kWide + l;
              const int j = place % kOlds * kRead + read + place / kOlds * kApart;
              const float* v = table + (static_cast<int64_t>(j) << B | o) * V;
              for (int i = 0; i < V; ++i) parts[i][l] = v[i];
              if (kParts > V) parts[kParts - 1][l] = v[0] * v[0] + v[V - 1] * v[V - 1];
            }
            laid.insert(laid.end(), parts, parts + kParts);
          }
    });
    return laid;
  }

  // x [kTiles][kValues], emphasis [kTiles][kRows], circles [kTiles][bytes]; seam: steps on each side
  // of it.
  void encode(const float* x, const float* emphasis, uint8_t* const* circles, int bytes, int seam) {
    int ends[kTiles];
    std::fill_n(kept(0, 0), kTiles * kCount, Real(0));
    run(x, emphasis, kSteps - seam, 2 * seam);
    for (int k = 0; k < kTiles; ++k) {
      const Real* last = kept(2 * seam, k);
      int j = 0;
      for (int p = 1; p < kCount; ++p)
        if (last[place(p)] < last[place(j)]) j = p;
      for (int t = 2 * seam - 1; t >= seam; --t)
        j = (j << B |
             old(t, k, j, x + k * kValues, emphasis + k * kRows, (t - seam) * V)) & (kCount - 1);
      ends[k] = j;
    }
    std::fill_n(kept(0, 0), kTiles * kCount, kNever);
    for (int k = 0; k < kTiles; ++k) kept(0, k)[place(ends[k])] = 0;
    run(x, emphasis, 0, kSteps);
    for (int k = 0; k < kTiles; ++k) {
      std::memset(circles[k], 0, bytes);
      for (int t = kSteps - 1, j = ends[k]; t >= 0; --t) {
        const int bits = old(t, k, j, x + k * kValues, emphasis + k * kRows, t * V);
        for (int i = 0, bit = t * B; i < B; ++i, ++bit)
          circles[k][bit >> 3] |= ((bits >> i) & 1) << (bit & 7);
        j = (j << B | bits) & (kCount - 1);
      }
    }
  }
};

template <int B, int V>
void encode_all(const float* targets, const float* emphasis, int64_t count, const float* table,
                int bytes, int seam, uint8_t* circles, int threads) {
  static const std::vector<Vector> laid = Search<B, V>::laid_out(table);
  const int64_t blocks = (count + kTiles - 1) / kTiles;
#pragma omp parallel num_threads(threads)
  {
    Search<B, V> search(table, laid.data());
    std::vector<float> x(kTiles * kValues), counts(kTiles * kRows);
    std::vector<uint8_t> spare(bytes);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* to[kTiles];
      for (int k = 0; k < kTiles; ++k) {
        const int64_t tile = block * kTiles + k;
        to[k] = tile < count ? circles + tile * bytes : spare.data();
        const int64_t from = std::min(tile, count - 1);
        std::copy_n(targets + from * kValues, kValues, &x[k * kValues]);
        std::copy_n(emphasis + from * kRows, kRows, &counts[k * kRows]);
      }
      search.encode(x.data(), counts.data(), to, bytes, seam);
    }
  }
}

}  // namespace

// targets f32 [count, 256] in the sequence of the circle, times emphasis f32 [count, 16] of their
// rows and at most 16 in size, table f32 [2^16, V] of the rate, circles u8 [count, 32 rate].
extern "C" void bitmill_trellis_encode(const float* targets, const float* emphasis, int64_t count,
                                       const float* table, int rate, int seam, uint8_t* circles,
                                       int threads) {
  switch (rate) {
    case 1: return encode_all<2, 2>(targets, emphasis, count, table, 32, seam, circles, threads);
    case 2: return encode_all<4, 2>(targets, emphasis, count, table, 64, seam, circles, threads);
    case 3: return encode_all<6, 2>(targets, emphasis, count, table, 96, seam, circles, threads);
    case 4: return encode_all<8, 2>(targets, emphasis, count, table, 128, seam, circles, threads);
    case 5: return encode_all<5, 1>(targets, emphasis, count, table, 160, seam, circles, threads);
    case 6: return encode_all<6, 1>(targets, emphasis, count, table, 192, seam, circles, threads);
    case 7: return encode_all<7, 1>(targets, emphasis, count, table, 224, seam, circles, threads);
    default: return encode_all<8, 1>(targets, emphasis, count, table, 256, seam, circles, threads);
  }
}
