// The best circles for tiles on a CPU (code.py): Viterbi's algorithm over all states.
//
// State s_t = (s_{t-1} >> B) | (new << R), R = 16 - B: the lower R bits of a state are the upper R
// bits of the one before. So of all states with the same upper bits j only the cheapest is kept:
//
//   kept_t[j] = min over o of  kept_{t-1}[(j << B | o) mod 2^R] + |x_t - v(j << B | o)|^2
//
// and the o of each step and j, for the way back. Two runs make a circle: one over the steps around
// its seam, free at both ends, gives the bits across the seam; the second goes around from there to
// there. Each lane of a vector searches for a tile of its own; vectors are the compiler's, so one
// source serves AVX-512, AVX2 and NEON. They are as wide as the processor's: GCC chooses between
// wider ones lane by lane.

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../vectors.h"

namespace {

constexpr int kTogether = 4, kValues = 256, kStateBits = 16;
constexpr float kNever = 1e30f;
typedef uint8_t Octets __attribute__((vector_size(kLanes)));

template <int B, int V>
class Search {
  static constexpr int R = kStateBits - B, kCount = 1 << R, kOlds = 1 << B;
  static constexpr int kRead = kCount >> B;  // blocks of kept costs, each read by kOlds of the j
  static constexpr int kSteps = kValues / V;
  static_assert(kRead > 0);
  const float* table_;  // [2^16][V]
  std::vector<Floats> kept_, next_;
  std::vector<Octets> olds_;  // [kSteps][kCount]

  // One step: kept costs and olds behind it, from the kept costs before it. kTogether of the j that
  // read the same costs go together, since the choices of one wait for each other.
  void forward(Floats x0, Floats x1, Octets* olds) {
    constexpr int64_t kStride = static_cast<int64_t>(kRead) * kOlds * V;
    for (int block = 0; block < kRead; ++block) {
      const Floats* from = &kept_[block * kOlds];
      for (int j = block; j < kCount; j += kTogether * kRead) {
        const float* v = table_ + static_cast<int64_t>(j) * kOlds * V;
        Floats best[kTogether];
        Ints old[kTogether] = {};
        for (Floats& b : best) b = Floats{} + FLT_MAX;
        for (int o = 0; o < kOlds; ++o) {
#pragma GCC unroll 4
          for (int i = 0; i < kTogether; ++i) {
            const Floats d = x0 - v[i * kStride + o * V];
            Floats cost = from[o] + d * d;
            if (V == 2) {
              const Floats e = x1 - v[i * kStride + o * V + 1];
              cost += e * e;
            }
            const auto less = cost < best[i];
            best[i] = less ? cost : best[i];
            old[i] = less ? Ints{} + o : old[i];
          }
        }
        for (int i = 0; i < kTogether; ++i) {
          next_[j + i * kRead] = best[i];
          olds[j + i * kRead] = __builtin_convertvector(old[i], Octets);
        }
      }
    }
    kept_.swap(next_);
  }

  void run(const float* x, int first, int steps) {
    for (int t = 0; t < steps; ++t) {
      const float* at = x + static_cast<int64_t>((first + t) % kSteps) * V * kLanes;
      Floats x0, x1;
      std::memcpy(&x0, at, sizeof x0);
      std::memcpy(&x1, at + (V - 1) * kLanes, sizeof x1);
      forward(x0, x1, &olds_[static_cast<int64_t>(t) * kCount]);
    }
  }

  int before(int t, int lane, int j) const {
    return (j << B | olds_[static_cast<int64_t>(t) * kCount + j][lane]) & (kCount - 1);
  }

 public:
  explicit Search(const float* table)
      : table_(table), kept_(kCount), next_(kCount), olds_(static_cast<size_t>(kSteps) * kCount) {}

  // x [kSteps][V][kLanes], circles [kLanes][bytes]; seam: steps on each side of it.
  void encode(const float* x, uint8_t* const* circles, int bytes, int seam) {
    int ends[kLanes];
    std::fill(kept_.begin(), kept_.end(), Floats{});
    run(x, kSteps - seam, 2 * seam);
    for (int lane = 0; lane < kLanes; ++lane) {
      int j = 0;
      for (int p = 1; p < kCount; ++p)
        if (kept_[p][lane] < kept_[j][lane]) j = p;
      for (int t = 2 * seam - 1; t >= seam; --t) j = before(t, lane, j);
      ends[lane] = j;
    }
    std::fill(kept_.begin(), kept_.end(), Floats{} + kNever);
    for (int lane = 0; lane < kLanes; ++lane) kept_[ends[lane]][lane] = 0.0f;
    run(x, 0, kSteps);
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memset(circles[lane], 0, bytes);
      for (int t = kSteps - 1, j = ends[lane]; t >= 0; j = before(t--, lane, j)) {
        const int old = olds_[static_cast<int64_t>(t) * kCount + j][lane];
        for (int i = 0, bit = t * B; i < B; ++i, ++bit)
          circles[lane][bit >> 3] |= ((old >> i) & 1) << (bit & 7);
      }
    }
  }
};

template <int B, int V>
void encode_all(const float* targets, int64_t count, const float* table, int bytes, int seam,
                uint8_t* circles, int threads) {
  const int64_t blocks = (count + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads)
  {
    Search<B, V> search(table);
    std::vector<float> x(kValues * kLanes);
    std::vector<uint8_t> spare(bytes);
#pragma omp for schedule(dynamic)
    for (int64_t block = 0; block < blocks; ++block) {
      uint8_t* to[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t tile = block * kLanes + lane;
        to[lane] = tile < count ? circles + tile * bytes : spare.data();
        const float* from = targets + std::min(tile, count - 1) * kValues;
        for (int i = 0; i < kValues; ++i) x[i * kLanes + lane] = from[i];
      }
      search.encode(x.data(), to, bytes, seam);
    }
  }
}

}  // namespace

// targets f32 [count, 256] in the sequence of the circle, table f32 [2^16, V],
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
