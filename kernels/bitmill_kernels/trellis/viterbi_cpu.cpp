// The best circles for tiles on a CPU (code.py): Viterbi's algorithm over all states.
//
// State s_t = (s_{t-1} >> B) | (new << R), R = 16 - B: the lower R bits of a state are the upper R
// bits of the one before. So of all states with the same upper bits j only the cheapest is kept:
//
//   kept_t[j] = min over o of  kept_{t-1}[(j << B | o) mod 2^R] + |x_t - v(j << B | o)|^2
//
// Kept costs of all steps stay; on the way back the o of a step is found again from those before.
// Two runs make a circle: one over the steps around its seam, free at both ends, gives the bits
// across the seam; the second goes around from there to there.
//
// With j = new << (R - B) | read, all 2^B new bits read the same 2^B kept costs. They lie in the
// lanes of a vector, so lanes share a kept cost, and kTiles tiles what is read of the table. Two
// values a state cost |x|^2 + (|v|^2 - 2 x v), where |x|^2 is added to the least of them. Vectors
// are the compiler's, so one source serves AVX-512, AVX2 and NEON.

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int kTiles = 4, kValues = 256, kStateBits = 16;
constexpr float kNever = 1e30f;

template <int B, int V>
class Search {
  static constexpr int R = kStateBits - B, kCount = 1 << R, kOlds = 1 << B, kRead = kCount >> B;
  static constexpr int kSteps = kValues / V, kParts = V == 2 ? 3 : 1;
  static constexpr int kReads = std::max(1, kLanes >> B);  // of `read` in the lanes of a vector
  static constexpr int kApart = kRead / kReads;  // from one of them to the next
  static constexpr int kVectors = kReads * kOlds / kLanes;
  static constexpr int kTogether = std::min(kVectors, kLanes == 16 ? 4 : 2);
  static_assert(kRead > 0);
  const float* table_;             // [2^16][V]
  const Floats* laid_;             // [kApart][kVectors / kTogether][kOlds][kTogether][kParts]
  std::unique_ptr<float[]> kept_;  // [kSteps + 1][kTiles][kCount], at place(j)

  static constexpr unsigned place(unsigned j) {
    const unsigned read = j % kRead, of = kReads == 1 ? 0 : read / kApart;
    return (read % kApart * kReads + of) << B | j / kRead;
  }

  float* kept(int t, int tile) {
    return &kept_[(static_cast<int64_t>(t) * kTiles + tile) * kCount];
  }

  // Kept costs of step t + 1 from those of step t, for x [kTiles][V].
  void forward(int t, const float (*x)[V]) {
    float twice[kTiles][V], squares[kTiles];
    const float* old[kTiles];
    for (int k = 0; k < kTiles; ++k) {
      old[k] = kept(t, k);
      squares[k] = V == 2 ? x[k][0] * x[k][0] + x[k][V - 1] * x[k][V - 1] : 0.0f;
      for (int i = 0; i < V; ++i) twice[k][i] = -2 * x[k][i];
    }
    const Floats* v = laid_;
    in_turn([&](int read) {
      for (int first = 0; first < kVectors; first += kTogether) {
        Floats best[kTiles][kTogether];
        for (auto& of_tile : best)
          for (Floats& one : of_tile) one = Floats{} + FLT_MAX;
        for (int o = 0; o < kOlds; ++o, v += kTogether * kParts) {
          Floats from[kTiles];
#pragma GCC unroll 8
          for (int k = 0; k < kTiles; ++k) from[k] = before(old[k], read, o);
#pragma GCC unroll 8
          for (int n = 0; n < kTogether; ++n) {
#pragma GCC unroll 8
            for (int k = 0; k < kTiles; ++k) {
              Floats cost;
              if (V == 2) {
                cost = v[3 * n + 2] + v[3 * n] * twice[k][0];
                cost += v[3 * n + 1] * twice[k][V - 1];
                cost += from[k];
              } else {
                const Floats d = x[k][0] - v[n];
                cost = from[k] + d * d;
              }
              best[k][n] = cost < best[k][n] ? cost : best[k][n];
            }
          }
        }
        for (int k = 0; k < kTiles; ++k)
          for (int n = 0; n < kTogether; ++n) {
            const Floats next = best[k][n] + squares[k];
            std::memcpy(kept(t + 1, k) + place(read) + (first + n) * kLanes, &next, sizeof next);
          }
      }
    });
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
  static Floats before(const float* kept, int read, int o) {
    const float* first = kept + place(read << B | o);
    if (kReads == 1) return Floats{} + *first;
    Floats found;
    Ints which;
    std::memcpy(&found, first, sizeof found);
    for (int l = 0; l < kLanes; ++l) which[l] = l / kOlds * (kApart * kOlds / kRead);
    return __builtin_shuffle(found, which);
  }

  void run(const float* x, int first, int steps) {
    for (int t = 0; t < steps; ++t) {
      float now[kTiles][V];
      for (int k = 0; k < kTiles; ++k)
        for (int i = 0; i < V; ++i) now[k][i] = x[k * kValues + (first + t) % kSteps * V + i];
      forward(t, now);
    }
  }

  // The old bits behind j at step t, for x [V].
  int old(int t, int tile, int j, const float* x) {
    const float *from = kept(t, tile), *v = table_ + static_cast<int64_t>(j) * kOlds * V;
    float costs[kOlds], best = FLT_MAX;
    for (int o = 0; o < kOlds; ++o) {
      costs[o] = from[place((j << B | o) & (kCount - 1))];
      for (int i = 0; i < V; ++i) costs[o] += (x[i] - v[o * V + i]) * (x[i] - v[o * V + i]);
    }
    for (const float cost : costs) best = std::min(best, cost);
    return static_cast<int>(std::find(costs, costs + kOlds - 1, best) - costs);
  }

 public:
  Search(const float* table, const Floats* laid)
      : table_(table),
        laid_(laid),
        kept_(new float[static_cast<size_t>(kSteps + 1) * kTiles * kCount + kLanes]) {}

  // What `forward` reads of the table, in the sequence of its reading.
  static std::vector<Floats> laid_out(const float* table) {
    std::vector<Floats> laid;
    laid.reserve((kParts << kStateBits) / kLanes);
    in_turn([&](int read) {
      for (int first = 0; first < kVectors; first += kTogether)
        for (int o = 0; o < kOlds; ++o)
          for (int n = first; n < first + kTogether; ++n) {
            Floats parts[kParts];
            for (int l = 0; l < kLanes; ++l) {
              const int place = n * kLanes + l;
              const int j = place % kOlds * kRead + read + place / kOlds * kApart;
              const float* v = table + (static_cast<int64_t>(j) << B | o) * V;
              for (int i = 0; i < V; ++i) parts[i][l] = v[i];
              if (V == 2) parts[kParts - 1][l] = v[0] * v[0] + v[V - 1] * v[V - 1];
            }
            laid.insert(laid.end(), parts, parts + kParts);
          }
    });
    return laid;
  }

  // x [kTiles][kValues], circles [kTiles][bytes]; seam: steps on each side of it.
  void encode(const float* x, uint8_t* const* circles, int bytes, int seam) {
    int ends[kTiles];
    std::fill_n(kept(0, 0), kTiles * kCount, 0.0f);
    run(x, kSteps - seam, 2 * seam);
    for (int k = 0; k < kTiles; ++k) {
      const float* last = kept(2 * seam, k);
      int j = 0;
      for (int p = 1; p < kCount; ++p)
        if (last[place(p)] < last[place(j)]) j = p;
      for (int t = 2 * seam - 1; t >= seam; --t)
        j = (j << B | old(t, k, j, x + k * kValues + (t - seam) * V)) & (kCount - 1);
      ends[k] = j;
    }
    std::fill_n(kept(0, 0), kTiles * kCount, kNever);
    for (int k = 0; k < kTiles; ++k) kept(0, k)[place(ends[k])] = 0.0f;
    run(x, 0, kSteps);
    for (int k = 0; k < kTiles; ++k) {
      std::memset(circles[k], 0, bytes);
      for (int t = kSteps - 1, j = ends[k]; t >= 0; --t) {
        const int bits = old(t, k, j, x + k * kValues + t * V);
        for (int i = 0, bit = t * B; i < B; ++i, ++bit)
          circles[k][bit >> 3] |= ((bits >> i) & 1) << (bit & 7);
        j = (j << B | bits) & (kCount - 1);
      }
    }
  }
};

template <int B, int V>
void encode_all(const float* targets, int64_t count, const float* table, int bytes, int seam,
                uint8_t* circles, int threads) {
  static const std::vector<Floats> laid = Search<B, V>::laid_out(table);
  const int64_t blocks = (count + kTiles - 1) / kTiles;
#pragma omp parallel num_threads(threads)
  {
    Search<B, V> search(table, laid.data());
    std::vector<float> x(kTiles * kValues);
    std::vector<uint8_t> spare(bytes);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* to[kTiles];
      for (int k = 0; k < kTiles; ++k) {
        const int64_t tile = block * kTiles + k;
        to[k] = tile < count ? circles + tile * bytes : spare.data();
        const float* from = targets + std::min(tile, count - 1) * kValues;
        std::copy_n(from, kValues, &x[k * kValues]);
      }
      search.encode(x.data(), to, bytes, seam);
    }
  }
}

}  // namespace

// targets f32 [count, 256] in the sequence of the circle, table f32 [2^16, V] of the rate,
// circles u8 [count, 32 rate].
extern "C" void bitmill_trellis_encode(const float* targets, int64_t count, const float* table,
                                       int rate, int seam, uint8_t* circles, int threads) {
  switch (rate) {
    case 1: return encode_all<2, 2>(targets, count, table, 32, seam, circles, threads);
    case 2: return encode_all<4, 2>(targets, count, table, 64, seam, circles, threads);
    case 3: return encode_all<6, 2>(targets, count, table, 96, seam, circles, threads);
    case 4: return encode_all<8, 2>(targets, count, table, 128, seam, circles, threads);
    case 5: return encode_all<5, 1>(targets, count, table, 160, seam, circles, threads);
    case 6: return encode_all<6, 1>(targets, count, table, 192, seam, circles, threads);
    case 7: return encode_all<7, 1>(targets, count, table, 224, seam, circles, threads);
    default: return encode_all<8, 1>(targets, count, table, 256, seam, circles, threads);
  }
}
